# SPDX-License-Identifier: GPL-2.0-or-later
"""Moving clusters from a reader to a sink: many requests in flight, bounded memory, no work for each cluster.

::

    parts ─► batches ─► [read]  ─────────► [filled, filtered, written] ─► done
                        the copy's thread,     worker threads,
                        which never blocks     which block

A read error is fatal: not one byte of a failed read is written. The copy's own thread polls sockets, keeps
the rate limit, calls `check` and watches for stalls. It neither hashes nor writes.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from backupctl.digests import clusters
from backupctl.digests.clusters import CLUSTER_BYTES, Clusters
from backupctl.errors import ReadFailed, TransferError, WriteFailed
from backupctl.system.threads import CHECK_SECONDS, END_SECONDS, Workers
from backupctl.transfer import batch as batches
from backupctl.transfer.batch import Batch, Part
from backupctl.transfer.polling import Wakeup, poll_once
from backupctl.transfer.rate_limit import TokenBucket
from backupctl.transfer.reader import Reader
from backupctl.transfer.sink import Sink

WORKERS = 2
_AHEAD = 2  # batches for each worker that are read already, so that it never waits


class Wanted(NamedTuple):
    """What of a batch is to be written: a flag for each of its clusters, as data and as zeroes."""

    data: NDArray[np.bool_]
    zero: NDArray[np.bool_]


Filter = Callable[[Clusters, memoryview | None], Wanted]
"""Called in a worker with the clusters of a batch and their content (None: known to be zeroes). What it
raises ends the copy."""


@dataclass(frozen=True)
class Copied:
    """The result of a copy. copied_bytes: read. zero_bytes: known to be zeroes, and therefore not read."""

    copied_bytes: int
    zero_bytes: int


def pass_all(numbers: Clusters, content: memoryview | None) -> Wanted:
    """Let everything pass as it is."""
    data = np.full(len(numbers), content is not None)
    return Wanted(data, ~data)


@dataclass(frozen=True)
class Copy:
    """A copy from a reader to a sink; `run` does it.

    sink: None if the filter lets nothing pass: then everything is only read.
    check: called at least every 100 ms while bytes move; what it raises ends the copy.
    progress: called with the bytes done. stall_seconds: the longest time without any batch making progress.
    filter_batch: chooses what of each batch is written.
    on_unreadable: called with each cluster that the source could not read, and the copy goes on without it.
    None: a read error ends the copy.
    zero_clusters: how many zeroes are one batch, at most; fewer for a sink that may have to write them.
    workers: shared with other copies; None: two of its own.
    """

    reader: Reader
    sink: Sink | None
    _: KW_ONLY
    check: Callable[[], None]
    progress: Callable[[int], None] = lambda _done_bytes: None
    limiter: TokenBucket = field(default_factory=partial(TokenBucket, None))
    stall_seconds: float = 60.0
    filter_batch: Filter = pass_all
    on_unreadable: Callable[[Clusters], None] | None = None
    zero_clusters: int = batches.ZERO_CLUSTERS
    workers: Workers | None = None

    def run(self, parts: Iterable[Part]) -> Copied:
        """Copy all parts. Raises ReadFailed, WriteFailed, and what `check` and `filter_batch` raise."""
        with ExitStack() as held:
            workers = self.workers or held.enter_context(Workers(WORKERS))
            wakeup = held.enter_context(Wakeup())
            copied = _RunningCopy(self, wakeup, workers).run(batches.cut(parts, self.zero_clusters))
        self.progress(copied.copied_bytes + copied.zero_bytes)
        return copied


class _RunningCopy:
    """The batches of one running copy, and what it has come to so far."""

    def __init__(self, copy: Copy, wakeup: Wakeup, workers: Workers) -> None:
        self._copy = copy
        self._wakeup = wakeup
        self._workers = workers
        self._pollables = [*copy.reader.pollables, wakeup]
        self._most = copy.reader.batches + _AHEAD * workers.count
        self._again: deque[Part] = deque()
        self._in_flight: set[Batch] = set()
        self._free: list[memoryview] = []
        self._worked: deque[tuple[Batch, BaseException | None]] = deque()
        self._working = _Working()
        self._copied_bytes = self._zero_bytes = 0

    def run(self, pieces: Iterator[Part]) -> Copied:
        try:
            self._run(pieces)
        except BaseException:
            self._working.stop()
            raise
        return Copied(self._copied_bytes, self._zero_bytes)

    def _run(self, pieces: Iterator[Part]) -> None:
        copy = self._copy
        waiting = next(pieces, None)
        checked = moved = time.monotonic()
        while waiting is not None or self._in_flight:
            pause = copy.limiter.wait_seconds()
            while waiting is not None and pause <= 0 and len(self._in_flight) < self._most:
                self._start(waiting)
                waiting = self._again.popleft() if self._again else next(pieces, None)
                pause = copy.limiter.wait_seconds()
            poll_once(self._pollables, min(pause, CHECK_SECONDS) if pause > 0 else CHECK_SECONDS)
            now = time.monotonic()
            if self._advance() or not self._in_flight:
                moved = now
            if waiting is None and self._again:
                waiting = self._again.popleft()
            if now - checked >= CHECK_SECONDS:
                checked = now
                copy.check()
                copy.progress(self._copied_bytes + self._zero_bytes)
            if now - moved > copy.stall_seconds:
                writing = any(one.writing for one in self._in_flight)
                raise (WriteFailed if writing else ReadFailed)(f"no byte moved for {copy.stall_seconds:g} s")

    def _start(self, piece: Part) -> None:
        if piece.zero:
            batch = Batch(piece.numbers, None)
            self._work(batch)
        else:
            self._copy.limiter.spend(self._bytes(piece.numbers))
            batch = Batch(piece.numbers, self._free.pop() if self._free else batches.new_buffer())
            self._copy.reader.start(batch)
        self._in_flight.add(batch)

    def _advance(self) -> bool:
        """Take every batch that can go on one step further; returns whether any could."""
        moved = False
        for batch in self._copy.reader.ended():
            moved = True
            if batch.failure is None:
                self._work(batch)
            else:
                self._unreadable(batch, batch.failure)
        while self._worked:
            moved = True
            batch, failure = self._worked.popleft()
            if isinstance(failure, ReadFailed):
                self._unreadable(batch, failure)
            elif failure is not None:
                raise failure
            else:
                self._finish(batch)
        return moved

    def _unreadable(self, batch: Batch, failure: TransferError) -> None:
        if self._copy.on_unreadable is None:
            raise failure
        self._release(batch)
        if len(batch.numbers) == 1:
            self._copy.on_unreadable(batch.numbers)
        else:  # which of its clusters cannot be read is found by reading them one by one
            self._again.extend(batches.each(batch.numbers))

    def _finish(self, batch: Batch) -> None:
        if batch.buffer is None:
            self._zero_bytes += self._bytes(batch.numbers)
        else:
            self._copied_bytes += self._bytes(batch.numbers)
        self._release(batch)

    def _release(self, batch: Batch) -> None:
        """Let go of a batch, and reuse its buffer: the page faults of new ones cost more than the copy."""
        self._in_flight.remove(batch)
        if batch.buffer is not None:
            self._free.append(batch.buffer)

    def _bytes(self, numbers: Clusters) -> int:
        return clusters.bytes_of(numbers, self._copy.reader.size)

    def _work(self, batch: Batch) -> None:
        self._workers.submit(partial(self._handle, batch))

    def _handle(self, batch: Batch) -> None:
        """Do in a worker what blocks."""
        failure: BaseException | None = None
        if not self._working.begin():
            return
        try:
            self._fill_and_write(batch)
        except BaseException as err:  # noqa: BLE001 - the copy's thread raises it
            failure = err
        finally:
            self._working.end()
        self._worked.append((batch, failure))
        self._wakeup.set()

    def _fill_and_write(self, batch: Batch) -> None:
        copy, content = self._copy, batch.content
        if content is not None:
            copy.reader.fill(batch)
        wanted = copy.filter_batch(batch.numbers, content)
        if not self._working.wanted:
            return
        batch.writing = True
        if wanted.data.any():
            assert copy.sink is not None
            assert content is not None
            copy.sink.write(batch.numbers[wanted.data], _slices(content, wanted.data))
        if wanted.zero.any():
            assert copy.sink is not None
            copy.sink.zero(batch.numbers[wanted.zero])


class _Working:
    """How many workers work for a copy, and whether it still wants them to."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0
        self.wanted = True

    def begin(self) -> bool:
        with self._changed:
            self._count += self.wanted
            return self.wanted

    def end(self) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify()

    def stop(self) -> None:
        """Want nothing any more, and wait for what is under way, unless it hangs."""
        with self._changed:
            self.wanted = False
            self._changed.wait_for(lambda: not self._count, END_SECONDS)


def _slices(content: memoryview, chosen: NDArray[np.bool_]) -> list[memoryview]:
    """Return the parts of a buffer that hold the chosen clusters."""
    if chosen.all():
        return [content]
    edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False)) * CLUSTER_BYTES
    return [content[first:stop] for first, stop in edges.reshape(-1, 2).tolist()]
