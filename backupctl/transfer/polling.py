# SPDX-License-Identifier: GPL-2.0-or-later
"""One wait for everything that moves bytes: the sockets of NBD connections, and threads with a result."""

import os
import select
import threading
from collections.abc import Iterable
from typing import Protocol, Self


class Pollable(Protocol):
    """Something with a descriptor that `poll_once` waits for and then serves."""

    def events(self) -> int:
        """Return the poll(2) events to wait for now; 0: none."""

    def fileno(self) -> int:
        """Return the descriptor; asked for only while there are events to wait for."""

    def on_events(self, events: int) -> None:
        """Do without blocking what has become possible."""


class Wakeup:
    """A Pollable that any thread can set to end a wait; closed at the end of its block."""

    def __init__(self) -> None:
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        with self._lock:
            self._open = False
            os.close(self._descriptor)

    def set(self) -> None:
        """End the wait that is under way, or else the next one. After the block it does nothing."""
        with self._lock:  # once it is closed, its number may be that of another file
            if self._open:
                os.eventfd_write(self._descriptor, 1)

    def events(self) -> int:
        """Return the event to wait for."""
        return select.POLLIN

    def fileno(self) -> int:
        """Return the eventfd."""
        return self._descriptor

    def on_events(self, _events: int) -> None:
        """Reset it."""
        os.eventfd_read(self._descriptor)


def poll_once(pollables: Iterable[Pollable], seconds: float) -> None:
    """Serve all that is ready, after at most `seconds` for the first. Raises what `on_events` raises."""
    waiting = select.poll()
    by_descriptor: dict[int, Pollable] = {}
    for one in pollables:
        if events := one.events():
            descriptor = one.fileno()
            by_descriptor[descriptor] = one
            waiting.register(descriptor, events)
    for descriptor, events in waiting.poll(seconds * 1000):
        by_descriptor[descriptor].on_events(events)
