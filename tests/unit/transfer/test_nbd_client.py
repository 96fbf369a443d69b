# SPDX-License-Identifier: GPL-2.0-or-later
"""What one NBD connection looks at of its own process, and how long it waits."""

import signal
import subprocess
import sys
import threading

import pytest

from backupctl.errors import WriteFailed
from backupctl.transfer.sink import open_nbd_sink
from tests.conftest import ROOT
from tests.unit.transfer.conftest import raw_node

MIB = 1 << 20


GREETED = """
from backupctl.transfer.nbd_client import _memory_bytes
once = b"x" * (256 << 20)
del once
before = _memory_bytes()
taken = b"x" * (128 << 20)
print(_memory_bytes() - before)
"""


def test_what_a_process_once_had_does_not_hide_what_a_greeting_takes():
    """In a process of its own: what other tests have freed would be taken again, and not grow it."""
    command = [sys.executable, "-c", GREETED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert 100 * MIB < int(done.stdout) < 200 * MIB


def test_a_flush_is_waited_for_as_long_as_a_slow_disk_may_take(serve, tmp_path):
    (tmp_path / "disk").write_bytes(bytes(MIB))
    export = serve(raw_node(tmp_path / "disk"), writable=True)
    for seconds in (0.3, 30.0):
        woken = threading.Timer(1.0, export.process.send_signal, [signal.SIGCONT])

        def flushed(seconds: float = seconds, woken: threading.Timer = woken) -> None:
            with open_nbd_sink(export.address, export.name, 1, flush_seconds=seconds):
                export.freeze()
                woken.start()

        if seconds < 1:
            with pytest.raises(WriteFailed, match="silent"):
                flushed()
        else:
            flushed()
        woken.join()
