# SPDX-License-Identifier: GPL-2.0-or-later
"""What the monitor hears between commands."""

import gc
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from qemu.qmp.message import Message

from backupctl.system.address import Address
from backupctl.vm.qmp.monitor import Monitor

STAMP = {"seconds": 1, "microseconds": 2}


def event(name: object, data: object) -> bytes:
    return json.dumps({"event": name, "data": data, "timestamp": STAMP}).encode() + b"\n"


@contextmanager
def speaking(path: Path, events: bytes) -> Iterator[Monitor]:
    """A monitor that says `events` when it has answered the first questions."""

    def serve() -> None:
        version = {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}
        client, _ = listener.accept()
        with client:
            client.sendall(json.dumps({"QMP": {"version": version, "capabilities": []}}).encode() + b"\n")
            for value in ({}, version, [{"name": "query-version"}]):
                asked = json.loads(client.recv(65536))
                client.sendall(json.dumps({"return": value, "id": asked.get("id")}).encode() + b"\n")
            client.sendall(events)
            client.recv(1)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        thread = threading.Thread(target=serve)
        thread.start()
        with Monitor.connect(Address(path=str(path)), 5.0) as monitor:
            yield monitor
        thread.join(10)


def heard(monitor: Monitor, seconds: float) -> set[str]:
    found: set[str] = set()
    deadline = time.monotonic() + seconds
    while not found and time.monotonic() < deadline:
        monitor.pump()
        found |= monitor.thresholds_passed()
    return found


def test_a_passed_write_threshold_is_heard_once(tmp_path):
    told = event("RESUME", {}) + event("BLOCK_WRITE_THRESHOLD", {"node-name": "tmp0", "write-threshold": 1})
    with speaking(tmp_path / "qmp", told) as monitor:
        assert heard(monitor, 5) == {"tmp0"}
        assert monitor.thresholds_passed() == frozenset()


@pytest.mark.parametrize(
    "told",
    [
        event("BLOCK_WRITE_THRESHOLD", {"node-name": "x" * 1000}),
        event("BLOCK_WRITE_THRESHOLD", {"node-name": ["tmp0"]}),
        event("BLOCK_WRITE_THRESHOLD", "tmp0"),
        event({"BLOCK_WRITE_THRESHOLD": 1}, {"node-name": "tmp0"}),
        event("BLOCK_IO_ERROR", {"node-name": "tmp0"}),
    ],
    ids=range(5),
)
def test_an_event_that_is_none_of_ours_or_nonsense_is_forgotten(tmp_path, told):
    with speaking(tmp_path / "qmp", told) as monitor:
        assert heard(monitor, 0.3) == set()
        assert monitor.alive


def test_an_interrupt_while_nobody_greets_leaves_without_a_complaint(tmp_path, capfd):
    def interrupt(_number, _frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(tmp_path / "qmp"))
            listening.listen()
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                Monitor.connect(Address(path=str(tmp_path / "qmp")), 20)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    gc.collect()
    assert capfd.readouterr().err == ""


def test_a_task_that_fails_when_nobody_waits_for_it_any_more_prints_nothing(tmp_path, caplog):
    async def fails() -> None:
        raise ConnectionError("the peer has gone")

    with speaking(tmp_path / "s", b"") as monitor:
        task = monitor._loop.create_task(fails())
        monitor.pump()
        assert task.done()
        del task
        gc.collect()
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []


def test_no_text_is_made_of_messages_that_nobody_reads(tmp_path, monkeypatch):
    """Of a VM with many disks that took longer than all the rest of a command."""
    made = []
    monkeypatch.setattr(Message, "__str__", lambda _: made.append(1) or "")
    with speaking(tmp_path / "qmp", event("RESUME", {})) as monitor:
        heard(monitor, 0.3)
    assert made == []
