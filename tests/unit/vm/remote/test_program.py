# SPDX-License-Identifier: GPL-2.0-or-later
"""The program on the other host: whom it pairs with whom."""

import os
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from backupctl.errors import Failed
from backupctl.vm.remote.names import MONITOR
from backupctl.vm.remote.program import RemoteProgram


def client(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(20)
    made.connect(str(path))
    return made


def test_a_client_for_whom_the_monitor_could_not_be_reached_is_not_taken_for_the_next_one(tmp_path):
    monitor, forwarded = tmp_path / "qmp", tmp_path / "sockets"
    options: dict[str, object] = {"monitor": str(monitor), "agent": "", "guard": False}
    options |= {"directory": str(forwarded), "agent_seconds": 1, "lock_seconds": 1}
    with ExitStack() as held:
        program = RemoteProgram(options, held)
        first = held.enter_context(client(forwarded / MONITOR))
        assert program._answer({"do": "monitor"})["error"] == "OSError"
        assert first.recv(1) == b""
        listener = held.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(monitor))
        listener.listen()
        second = held.enter_context(client(forwarded / MONITOR))
        assert "error" not in program._answer({"do": "monitor"})
        qemu = held.enter_context(listener.accept()[0])
        qemu.sendall(b"greeting")
        assert second.recv(8) == b"greeting"
        program.end()


def test_a_program_that_cannot_begin_leaves_no_lock_and_no_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() or 12345)
    locks = tmp_path / f"backupctl-{os.getuid() or 12345}"
    locks.mkdir(mode=0o700)
    os.chown(locks, os.getuid() or 12345, -1)
    options: dict[str, object] = {"image": "/images/vda.qcow2", "images": True, "lock_seconds": 1}
    options |= {"directory": str(tmp_path / "no" / "place"), "agent_seconds": 1}
    with ExitStack() as held, pytest.raises(Failed, match="cannot make the directory"):
        RemoteProgram(options, held)
    assert not list(tmp_path.iterdir())
