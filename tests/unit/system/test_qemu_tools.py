# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's tools as children of ours."""

import sys
import tempfile

from backupctl.system import qemu_tools

IGNORES = """
import signal, sys
heard = 0
def hear(*_):
    global heard
    heard += 1
    if heard > int(sys.argv[1]):
        sys.exit(0)
signal.signal(signal.SIGTERM, hear)
print("ready", flush=True)
while True:
    signal.pause()
"""


def start(signals: int) -> qemu_tools.Child:
    with tempfile.TemporaryFile() as complaints:
        command = [sys.executable, "-c", IGNORES, str(signals)]
        child = qemu_tools.start(command, complaints=complaints, output=-1)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    return child


def test_a_server_that_does_not_notice_its_sigterm_gets_another_one(monkeypatch):
    monkeypatch.setattr(qemu_tools, "_AGAIN_SECONDS", 0.1)
    with start(signals=2) as child:
        assert qemu_tools.end(child) == 0


def test_a_server_that_does_not_end_is_told_so_in_time(monkeypatch):
    monkeypatch.setattr(qemu_tools, "_AGAIN_SECONDS", 0.1)
    monkeypatch.setattr(qemu_tools, "END_SECONDS", 0.5)
    with start(signals=sys.maxsize) as child:
        assert qemu_tools.end(child) is None
        child.kill()
