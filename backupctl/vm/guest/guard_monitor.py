# SPDX-License-Identifier: GPL-2.0-or-later
"""The guard's own conversation with QEMU's monitor: a few commands, small enough to need no library.

It is held only when the run is dead, so that the monitor, which serves one client, is free.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from backupctl.system.address import Address
from backupctl.vm.qmp import throttle
from backupctl.vm.qmp.wire import Message, Wire

TIMEOUT_SECONDS = 10.0
MAX_REPLY_BYTES = 4 << 20
_PAUSE_SECONDS = 0.02

Execute = Callable[..., Message]
"""Sends a command with its arguments; returns the answer, which may be an error."""


class Leftovers(NamedTuple):
    """What a dead run left in QEMU that can't stay. groups: the throttle groups below its jobs."""

    exports: tuple[str, ...]
    jobs: tuple[str, ...]
    groups: tuple[str, ...]


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
        for _ in _until_too_late():
            if not _any(execute("query-jobs"), left.jobs):
                break


def _set(execute: Execute, groups: tuple[str, ...], bytes_per_second: int) -> None:
    for group in groups:
        limits = throttle.rate_limits(bytes_per_second)
        execute("qom-set", path=f"/objects/{group}", property="limits", value=limits)


def _any(answer: Message, names: tuple[str, ...]) -> bool:
    return any(entry["id"] in names for entry in answer["return"])


@contextmanager
def _conversation(address: Address) -> Iterator[Execute]:
    with address.connect(TIMEOUT_SECONDS) as connection:
        wire = Wire(connection, MAX_REPLY_BYTES)

        def execute(command: str, **arguments: object) -> Message:
            deadline = time.monotonic() + TIMEOUT_SECONDS
            wire.send({"execute": command, "arguments": arguments}, deadline)
            return _answer(wire, deadline, "return", "error")

        _answer(wire, time.monotonic() + TIMEOUT_SECONDS, "QMP")
        execute("qmp_capabilities")
        yield execute


def _until_too_late() -> Iterator[None]:
    """Yield again and again, with a pause. Raises TimeoutError."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        yield
        time.sleep(_PAUSE_SECONDS)
    raise TimeoutError


def _answer(wire: Wire, deadline: float, *wanted: str) -> Message:
    while time.monotonic() < deadline:  # events without end are no answer
        message = wire.receive(deadline)
        if any(name in message for name in wanted):
            return message
    raise TimeoutError
