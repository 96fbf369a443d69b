# SPDX-License-Identifier: GPL-2.0-or-later
"""Threads that do what blocks, while the main thread reacts to signals and to what else must end the work.

All are daemon threads: one that hangs in the kernel, in a write to a dead disk, keeps neither a roll-back
nor the end of the process waiting. So what a thread uses (a descriptor, a buffer) must stay valid until the
thread itself has ended with it.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, Self, TypeVar

CHECK_SECONDS = 0.1
END_SECONDS = 2.0
"""How long a failed run waits for its threads to end. One that needs longer hangs in the kernel."""

Result = TypeVar("Result")
Check = Callable[[], None]


class Stopped(Exception):
    """Raised in a thread whose result is no longer wanted."""


class Workers:
    """A few threads that run jobs in the order in which they come; they end with the block."""

    def __init__(self, threads: int) -> None:
        self.count = threads
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        for number in range(self.count):
            threading.Thread(target=self._run, name=f"worker-{number}", daemon=True).start()
        return self

    def __exit__(self, *_raised: object) -> None:
        for _ in range(self.count):
            self._jobs.put(None)

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job as soon as a thread is free. It must not raise."""
        self._jobs.put(job)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def side_by_side(
    tasks: Sequence[Callable[[Check], Result]], at_once: int, check: Check
) -> tuple[Result, ...]:
    """Run functions in threads, `at_once` at a time; return their results in the order of the functions.

    Each is called with a function that it must call often: it raises Stopped once the result is no longer
    wanted. check: called in this thread at least every 100 ms. What it raises, or the first function that
    fails, is raised when the others have ended, or hang.
    """
    return _SideBySide(tasks).run(at_once, check)


class _SideBySide(Generic[Result]):
    def __init__(self, tasks: Sequence[Callable[[Check], Result]]) -> None:
        self._waiting = queue.SimpleQueue[tuple[int, Callable[[Check], Result]]]()
        for numbered in enumerate(tasks):
            self._waiting.put(numbered)
        self._results: dict[int, Result] = {}
        self._failures: list[BaseException] = []
        self._wanted = len(tasks)
        self._stopped = threading.Event()
        self._news = threading.Event()

    def run(self, at_once: int, check: Check) -> tuple[Result, ...]:
        threads = [
            threading.Thread(target=self._work, daemon=True) for _ in range(min(at_once, self._wanted))
        ]
        for thread in threads:
            thread.start()
        try:
            while len(self._results) < self._wanted:
                self._wait(check)
        except BaseException:
            self._stopped.set()
            deadline = time.monotonic() + END_SECONDS
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
            raise
        return tuple(self._results[number] for number in range(self._wanted))

    def _wait(self, check: Check) -> None:
        self._news.wait(CHECK_SECONDS)
        self._news.clear()
        check()
        if self._failures:
            raise self._failures[0]

    def _work(self) -> None:
        try:
            while not self._waiting.empty():
                number, task = self._waiting.get_nowait()
                self._results[number] = task(self._go_on)
                self._news.set()
        except queue.Empty:
            pass  # another thread was quicker
        except BaseException as err:  # noqa: BLE001 - `run` raises it
            self._failures.append(err)
            self._news.set()

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise Stopped
