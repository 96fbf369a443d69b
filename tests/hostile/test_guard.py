# SPDX-License-Identifier: GPL-2.0-or-later
"""What the guard hears from a monitor that lies, when it stands in for a dead run."""

import socket
import threading
import time
import tracemalloc
from contextlib import suppress

import pytest

from backupctl.system.address import Address
from backupctl.vm.guest import guard_monitor

EVENT = b'{"event": "X", "timestamp": {}}\n'
DRIP = 0.05
WORDS = {
    "a greeting by drops": (b"", b"x", DRIP),
    "an answer by drops": (b'{"QMP": {}}\n', b" ", DRIP),
    "blank lines by drops": (b'{"QMP": {}}\n', b"\n{}\n", DRIP),
    "silence": (b"", b""),
    "events without end": (b'{"QMP": {}}\n', EVENT * 1000),
    "a line without end": (b"", b"x" * 65536),
    "garbage": (b"{]]\n", b""),
    "answers without end": (b'{"QMP": {}}\n', b'{"return": [{"id": "e"}]}\n' * 1000),
    "other types": (b'{"QMP": {}}\n', b'{"return": [5]}\n' * 1000),
    "deep": (b"[" * 100_000 + b"\n", b""),
    "no utf-8": (b"\xff\xfe\n", b""),
}


@pytest.mark.parametrize("name", WORDS)
def test_the_guard_gives_a_try_up_in_time_and_in_bounds(tmp_path, monkeypatch, name):
    monkeypatch.setattr(guard_monitor, "TIMEOUT_SECONDS", 1.0)
    first, again, *pause = WORDS[name]

    def talk() -> None:
        with suppress(OSError):
            client, _ = listener.accept()
            with client:
                client.sendall(first)
                while again:
                    client.sendall(again)
                    time.sleep(sum(pause))
                client.settimeout(10)
                while client.recv(65536):
                    pass

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "qmp"))
        listener.listen(1)
        thread = threading.Thread(target=talk)
        thread.start()
        begun = time.monotonic()
        tracemalloc.start()
        left = guard_monitor.Leftovers(("e",), ("j",), ("g",))
        with pytest.raises((OSError, ValueError, EOFError, KeyError, TypeError, RecursionError)):
            guard_monitor.take_down(Address(path=str(tmp_path / "qmp")), left, lambda: None)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert time.monotonic() - begun < 20
        assert most < 32 << 20
        thread.join(10)
