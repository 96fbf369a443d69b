# SPDX-License-Identifier: GPL-2.0-or-later
"""How a command is asked to end."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from backupctl.errors import Interrupted


class Cancellation:
    """Whether the run was asked to end.

    A signal only raises a flag; the run looks at it between steps and while it copies. An exception
    thrown into the middle of a clean-up would leave the clean-up half done.
    """

    def __init__(self) -> None:
        self._why = ""

    def request(self, why: str) -> None:
        """Ask the run to end; `why` becomes part of the error's message."""
        self._why = self._why or why

    @property
    def requested(self) -> bool:
        """Whether the run was asked to end."""
        return bool(self._why)

    def check(self) -> None:
        """Raise Interrupted if the run was asked to end."""
        if self._why:
            raise Interrupted(f"stopped by {self._why}")

    def also(self, check: Callable[[], None]) -> "Cancellation":
        """Return a Cancellation that is requested when this one is, and whose `check` calls `check` too."""
        return _CancellationAlso(self, check)

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Turn SIGINT, SIGTERM and SIGHUP into a request to end, until the block ends. Main thread only."""

        def handler(number: int, _frame: FrameType | None) -> None:
            self.request(signal.Signals(number).name)

        before = {
            number: signal.signal(number, handler)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)


class _CancellationAlso(Cancellation):
    """One that checks something more; a request goes to the first one."""

    def __init__(self, first: Cancellation, check: Callable[[], None]) -> None:
        super().__init__()
        self._first = first
        self._check = check

    def request(self, why: str) -> None:
        self._first.request(why)

    @property
    def requested(self) -> bool:
        return self._first.requested

    def check(self) -> None:
        self._first.check()
        self._check()
