# SPDX-License-Identifier: GPL-2.0-or-later
"""The guard's own conversation with QEMU's monitor: a few commands, small enough to need no library.

It is held only when the run is dead, so that the monitor, which serves one client, is free.
"""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from backupctl.system.address import Address
from backupctl.vm.qmp import throttle

TIMEOUT_SECONDS = 10.0
MAX_REPLY_BYTES = 4 << 20
_PAUSE_SECONDS = 0.02

Execute = Callable[..., dict[str, Any]]
"""Sends a command with its arguments; returns the answer, which may be an error."""


class Leftovers(NamedTuple):
    """What a dead run left in QEMU that can't stay.

    groups: the throttle groups below its jobs. hang_up: disconnects the clients that are in their handshake.
    """

    exports: tuple[str, ...]
    jobs: tuple[str, ...]
    groups: tuple[str, ...]
    hang_up: Callable[[], object] = bool


def take_down(monitor: Address, left: Leftovers, drain: Callable[[], object]) -> None:
    """Do what `teardown.teardown` does for exports and jobs, in its order, and wait until they are gone.

    drain: called again and again while exports go. Raises OSError, ValueError, EOFError, KeyError, TypeError.
    """
    with _conversation(monitor) as execute:
        _set(execute, left.groups, throttle.SLOW_BYTES_PER_SECOND)
        for export in left.exports:
            execute("block-export-del", id=export, mode="hard")
        for _ in _until_too_late():
            drain()
            if not _any(execute("query-block-exports"), left.exports):
                break
        _set(execute, left.groups, throttle.UNLIMITED)
        if left.groups:
            execute("transaction", actions=[])  # see `throttle.disable`
        for job in left.jobs:
            execute("block-job-cancel", device=job, force=True)
        # An answer that is none ends this: unlike a client of an export, a cancelled job needs no guard.
        with suppress(KeyError, TypeError, ValueError):
            for _ in _until_too_late():
                if not _any(execute("query-jobs"), left.jobs):
                    break


def _set(execute: Execute, groups: tuple[str, ...], bytes_per_second: int) -> None:
    for group in groups:
        limits = throttle.rate_limits(bytes_per_second)
        execute("qom-set", path=f"/objects/{group}", property="limits", value=limits)


def _any(answer: dict[str, Any], names: tuple[str, ...]) -> bool:
    """Whether an entry bears one of the names; one without a name is not ours.

    Raises KeyError, TypeError or ValueError for an answer that is none.
    """
    return any(dict(entry).get("id") in names for entry in answer["return"])


@contextmanager
def _conversation(address: Address) -> Iterator[Execute]:
    with address.connect(TIMEOUT_SECONDS) as connection:
        lines = Lines(connection)

        def execute(command: str, **arguments: object) -> dict[str, Any]:
            deadline = time.monotonic() + TIMEOUT_SECONDS
            connection.settimeout(TIMEOUT_SECONDS)  # for all of it
            connection.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
            return _answer(lines, deadline, "return", "error")

        _answer(lines, time.monotonic() + TIMEOUT_SECONDS, "QMP")
        execute("qmp_capabilities")
        yield execute


class Lines:
    """What arrives on a socket, line by line. Each wait ends at its deadline, whatever trickles in."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = bytearray()

    def next(self, deadline: float) -> bytes:
        """Return the next line. Raises TimeoutError, EOFError, OSError, ValueError if it has no end."""
        looked = 0
        while (end := self._received.find(b"\n", looked)) < 0:
            looked = len(self._received)
            if looked > MAX_REPLY_BYTES:
                raise ValueError
            self._receive(deadline)
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line

    def _receive(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        content = self._connection.recv(65536)
        if not content:
            raise EOFError
        self._received += content


def _until_too_late() -> Iterator[None]:
    """Yield again and again, with a pause. Raises TimeoutError."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        yield
        time.sleep(_PAUSE_SECONDS)
    raise TimeoutError


def _answer(lines: Lines, deadline: float, *wanted: str) -> dict[str, Any]:
    while time.monotonic() < deadline:  # events without end are no answer
        message = json.loads(lines.next(deadline))
        if isinstance(message, dict) and any(name in message for name in wanted):
            return message
    raise TimeoutError
