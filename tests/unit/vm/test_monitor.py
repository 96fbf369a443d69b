# SPDX-License-Identifier: GPL-2.0-or-later
"""What the monitor hears between commands."""

import gc
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from backupctl.errors import CommandFailed, OutcomeUnknown
from backupctl.system.address import Address
from backupctl.vm.qmp.monitor import Monitor

STAMP = {"seconds": 1, "microseconds": 2}


def event(name: object, data: object) -> bytes:
    return json.dumps({"event": name, "data": data, "timestamp": STAMP}).encode() + b"\n"


@contextmanager
def speaking(
    path: Path, events: bytes = b"", answer: Callable[[str], bytes] = lambda _: b"", seconds: float = 5.0
) -> Iterator[Monitor]:
    """A monitor that says `events` when it has answered the first questions, then `answer`, given an id."""

    def serve() -> None:
        version = {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}
        client, _ = listener.accept()
        with client:
            client.sendall(json.dumps({"QMP": {"version": version, "capabilities": []}}).encode() + b"\n")
            for value in ({}, version, [{"name": "query-version"}]):
                asked = json.loads(client.recv(65536))
                client.sendall(json.dumps({"return": value, "id": asked.get("id")}).encode() + b"\n")
            client.sendall(events)
            if asked := client.recv(65536):
                client.sendall(answer(json.loads(asked)["id"]))
                client.recv(1)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        thread = threading.Thread(target=serve)
        thread.start()
        with Monitor.connect(Address(path=str(path)), seconds) as monitor:
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


def told(content: object) -> bytes:
    return json.dumps(content).encode() + b"\n"


def test_an_answer_is_found_behind_events(tmp_path):
    def answer(mark: str) -> bytes:
        return event("BLOCK_JOB_CANCELLED", {"device": "job0"}) + told({"return": {"a": 1}, "id": mark})

    with speaking(tmp_path / "qmp", answer=answer) as monitor:
        assert monitor.execute("query-status") == {"a": 1}
        assert monitor.jobs_ended() == {"job0"}


def test_a_refusal_leaves_the_connection_as_it_was(tmp_path):
    def answer(mark: str) -> bytes:
        return told({"error": {"class": "GenericError", "desc": "no"}, "id": mark})

    with speaking(tmp_path / "qmp", answer=answer) as monitor:
        with pytest.raises(CommandFailed, match="no"):
            monitor.execute("blockdev-del", {"node-name": "tmp0"})
        assert monitor.alive


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda _: b"", "silent for"),
        (lambda _: told({"return": {}, "id": "another"}), "makes no sense"),
        (lambda _: told({"return": {}}), "makes no sense"),
        (lambda mark: told({"id": mark}), "makes no sense"),
        (lambda mark: told({"return": 1, "error": {}, "id": mark}), "makes no sense"),
        (lambda mark: told({"error": {"class": "GenericError"}, "id": mark}), "makes no sense"),
        (lambda _: b"[]\n", "no QMP"),
        (lambda _: b"\xff\xfe\n", "no QMP"),
        (lambda _: b"[" * 100_000 + b"\n", "no QMP"),
    ],
    ids=range(9),
)
def test_after_an_answer_that_is_none_nothing_more_is_asked(tmp_path, answer, why):
    """A late answer would be taken for that to the next question."""
    with speaking(tmp_path / "qmp", answer=answer, seconds=1.0) as monitor:
        with pytest.raises(OutcomeUnknown, match=why):
            monitor.execute("transaction", {"actions": []})
        assert not monitor.alive
        with pytest.raises(OutcomeUnknown, match=why):
            monitor.execute("query-jobs")


def test_after_an_interrupted_command_nothing_more_is_asked(tmp_path):
    def interrupt(_number, _frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        with speaking(tmp_path / "qmp") as monitor:
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                monitor.execute("transaction", {"actions": []})
            with pytest.raises(OutcomeUnknown, match="interrupted"):
                monitor.execute("query-jobs")
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def test_a_monitor_that_hangs_up_between_commands_is_noticed(tmp_path):
    with speaking(tmp_path / "qmp", answer=lambda mark: told({"return": {}, "id": mark})) as monitor:
        monitor.execute("query-status")
        monitor._connection.shutdown(socket.SHUT_RD)
        assert not monitor.alive
        with pytest.raises(OutcomeUnknown, match="broke"):
            monitor.pump()


def test_nonsense_between_commands_ends_the_conversation(tmp_path):
    with speaking(tmp_path / "qmp", told({"return": {}, "id": "x"})) as monitor:
        with pytest.raises(OutcomeUnknown):
            heard(monitor, 5)
        with pytest.raises(OutcomeUnknown):
            monitor.execute("query-status")
