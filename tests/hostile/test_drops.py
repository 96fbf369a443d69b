# SPDX-License-Identifier: GPL-2.0-or-later
"""A peer that says a byte now and then, and never comes to an end: each wait ends when its time is up."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from backupctl.errors import AgentUnavailable, MonitorUnreachable, OutcomeUnknown, ReadFailed
from backupctl.system.address import Address
from backupctl.transfer.nbd_client import Connection
from backupctl.vm.guest.agent import Agent
from backupctl.vm.qmp.monitor import Monitor

SECONDS = 1.0
DRIP_SECONDS = 0.05
GREETING = (
    b'{"QMP": {"version": {}, "capabilities": []}}\n{"return": {}}\n'
    b'{"return": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}, "id": "__qmp#00000"}\n'
    b'{"return": [], "id": "__qmp#00001"}\n'
)
NEWSTYLE = b"NBDMAGICIHAVEOPT\x00\x03"


@contextmanager
def dripping(path: Path, first: bytes, drop: bytes) -> Iterator[Address]:
    """Listen; say each line of `first`, then `drop` again and again."""
    done = threading.Event()

    def talk() -> None:
        client, _ = listener.accept()
        with client, suppress(OSError):
            for line in first.splitlines(keepends=True):
                client.sendall(line)
                if line.endswith(b"\n"):  # the next one answers what is asked now
                    client.recv(65536)
            while not done.wait(DRIP_SECONDS):
                client.sendall(drop)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        thread = threading.Thread(target=talk)
        thread.start()
        try:
            yield Address(path=str(path))
        finally:
            done.set()
            thread.join(10)


def ask_monitor(address: Address) -> None:
    with Monitor.connect(address, SECONDS) as monitor:
        monitor.execute("query-status")


def ask_agent(address: Address) -> None:
    with Agent.connect(address, SECONDS) as agent:
        agent.freeze_status()


def shake_hands(address: Address) -> None:
    connection = Connection("e", ReadFailed, SECONDS)
    try:
        connection.connect(Path(address.path or ""), ("base:allocation",))
    finally:
        connection.close()


CASES = {
    "a monitor's greeting": (ask_monitor, b"", b" ", MonitorUnreachable),
    "a monitor's answer": (ask_monitor, GREETING, b"x", OutcomeUnknown),
    "a monitor's events": (
        ask_monitor,
        GREETING,
        b'{"event": "X", "timestamp": {"seconds": 1, "microseconds": 2}}\n',
        OutcomeUnknown,
    ),
    "an agent's delimiter": (ask_agent, b"", b"x", AgentUnavailable),
    "an agent's answer": (ask_agent, b"\xff", b" ", AgentUnavailable),
    "an agent's old answers": (ask_agent, b"", b'\xff{"return": 1}\n', AgentUnavailable),
    "an NBD server's greeting": (shake_hands, NEWSTYLE[:3], b"", ReadFailed),
    "an NBD server's options": (
        shake_hands,
        NEWSTYLE,
        b"\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x08\x80\x00\x00\x01\x00\x00\x10\x00",
        ReadFailed,
    ),
}


@pytest.mark.parametrize(("ask", "first", "drop", "error"), CASES.values(), ids=CASES)
def test_a_peer_that_speaks_by_drops_is_given_up_in_time(
    tmp_path: Path, ask: Callable[[Address], None], first: bytes, drop: bytes, error: type[Exception]
):
    with dripping(tmp_path / "s", first, drop) as address:
        begun = time.monotonic()
        with pytest.raises(error):
            ask(address)
    assert time.monotonic() - begun < 30 * SECONDS
