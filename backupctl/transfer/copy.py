# SPDX-License-Identifier: GPL-2.0-or-later
"""Moving clusters from a reader to a sink: many requests in flight, bounded memory, no work for each cluster.

::

    parts ─► batches ─► [read, digested] ─► a few ─► [filtered, written] ─► done
                        the copy's thread,            worker threads,
                        which never blocks            which block

A read error is fatal: not one byte of a failed read is written. The copy's own thread polls sockets, computes
digests, keeps the rate limit, calls `check` and watches for stalls. It neither looks at digest maps, which
may be on a disk that hangs, nor writes. Where a reader blocks, a worker reads and digests too.

A worker gets several batches at once: each time that threads hand the interpreter to each other costs as
much as the digest of a cluster.
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

from backupctl.digests import clusters, hashing
from backupctl.digests.clusters import CLUSTER_BYTES, Clusters, Records
from backupctl.errors import ReadFailed, TransferError, WriteFailed
from backupctl.system.threads import CHECK_SECONDS, END_SECONDS, Workers
from backupctl.transfer import batch as batches
from backupctl.transfer.batch import Batch, Part
from backupctl.transfer.polling import Wakeup, poll_once
from backupctl.transfer.rate_limit import TokenBucket
from backupctl.transfer.reader import Reader
from backupctl.transfer.sink import Sink

WORKERS = 2
_TOGETHER = 4
"""How many batches a worker gets at once, at most."""
_AHEAD = 2 * _TOGETHER  # batches that are read already, so that no worker waits


class Wanted(NamedTuple):
    """What is to be written of some clusters: a flag for each of them, as data and as zeroes."""

    data: NDArray[np.bool_]
    zero: NDArray[np.bool_]


Filter = Callable[[Records], Wanted]
"""Called in a worker with the records of some clusters, ascending. What it raises ends the copy."""


@dataclass(frozen=True)
class Copied:
    """The result of a copy. copied_bytes: read. zero_bytes: known to be zeroes, and therefore not read."""

    copied_bytes: int
    zero_bytes: int


@dataclass(frozen=True)
class Copy:
    """A copy from a reader to a sink; `run` does it.

    sink: None if the filter lets nothing pass: then everything is only read.
    check: called at least every 100 ms while bytes move; what it raises ends the copy.
    progress: called with the bytes done. stall_seconds: the longest time without any batch making progress.
    filter_records: chooses what is written. None: all of it as it is, and no digest is computed.
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
    filter_records: Filter | None = None
    on_unreadable: Callable[[Clusters], None] | None = None
    zero_clusters: int = batches.ZERO_CLUSTERS
    workers: Workers | None = None

    def run(self, parts: Iterable[Part]) -> Copied:
        """Copy all parts. Raises ReadFailed, WriteFailed, and what `check` and `filter_records` raise."""
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
        self._most = copy.reader.batches + _AHEAD
        self._again: deque[Part] = deque()
        self._in_flight: set[Batch] = set()
        self._reading = 0
        self._gathered: list[Batch] = []
        self._free: list[memoryview] = []
        self._worked: deque[tuple[list[Batch], BaseException | None]] = deque()
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
            self._work([batch])
        else:
            self._copy.limiter.spend(self._bytes(piece.numbers))
            self._free = self._free or batches.new_buffers()
            batch = Batch(piece.numbers, self._free.pop())
            self._copy.reader.start(batch)
            self._reading += 1
        self._in_flight.add(batch)

    def _advance(self) -> bool:
        """Take every batch that can go on one step further; returns whether any could."""
        moved = False
        for batch in self._copy.reader.ended():
            moved = True
            self._reading -= 1
            self._read(batch)
        # The last ones must not wait for others, of which none may come.
        if self._gathered and not self._reading:
            self._work_gathered()
        while self._worked:
            moved = True
            self._end(*self._worked.popleft())
        return moved

    def _read(self, batch: Batch) -> None:
        if batch.failure is not None:
            self._unreadable(batch, batch.failure)
        elif self._copy.reader.blocking:
            self._work([batch])
        else:
            self._digest(batch)
            self._gathered.append(batch)
            if len(self._gathered) == _TOGETHER:
                self._work_gathered()

    def _work_gathered(self) -> None:
        gathered, self._gathered = self._gathered, []
        for some in _ascending(gathered):
            self._work(some)

    def _end(self, worked: list[Batch], failure: BaseException | None) -> None:
        if isinstance(failure, ReadFailed) and self._copy.reader.blocking:
            (batch,) = worked
            self._unreadable(batch, failure)
        elif failure is not None:
            raise failure
        else:
            for batch in worked:
                self._finish(batch)

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

    def _work(self, some: list[Batch]) -> None:
        self._workers.submit(partial(self._handle, some))

    def _handle(self, some: list[Batch]) -> None:
        """Do in a worker what blocks."""
        failure: BaseException | None = None
        if not self._working.begin():
            return
        try:
            self._filter_and_write(some)
        except BaseException as err:  # noqa: BLE001 - the copy's thread raises it
            failure = err
        finally:
            self._working.end()
        self._worked.append((some, failure))
        self._wakeup.set()

    def _digest(self, batch: Batch) -> None:
        if self._copy.filter_records is not None:
            batch.records = hashing.of_content(batch.numbers, batch.content)

    def _filter_and_write(self, some: list[Batch]) -> None:
        """Work on some batches, whose clusters ascend: all of data, or one of zeroes."""
        copy, first = self._copy, some[0]
        if first.records is None:
            if first.buffer is not None and copy.reader.blocking:
                copy.reader.fill(first)
            self._digest(first)
        numbers, wanted = self._wanted(some)
        if not self._working.wanted:
            return
        for batch in some:
            batch.writing = True
        if wanted.data.any():
            assert copy.sink is not None
            copy.sink.write(numbers[wanted.data], list(_slices(some, wanted.data)))
        if wanted.zero.any():
            assert copy.sink is not None
            copy.sink.zero(numbers[wanted.zero])

    def _wanted(self, some: list[Batch]) -> tuple[Clusters, Wanted]:
        """Return the clusters of some batches, and what of them is to be written."""
        choose = self._copy.filter_records
        if choose is None:
            numbers = np.concatenate([batch.numbers for batch in some])
            data = np.full(len(numbers), some[0].buffer is not None)
            return numbers, Wanted(data, ~data)
        records = np.concatenate([batch.records for batch in some if batch.records is not None])
        return records["cluster"], choose(records)


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


def _ascending(gathered: list[Batch]) -> list[list[Batch]]:
    """Return batches, which were read in any order, as sinks take them: their clusters ascend."""
    found: list[list[Batch]] = []
    for batch in sorted(gathered, key=lambda one: int(one.numbers[0])):
        if found and found[-1][-1].numbers[-1] < batch.numbers[0]:
            found[-1].append(batch)
        else:
            found.append([batch])
    return found


def _slices(some: list[Batch], chosen: NDArray[np.bool_]) -> Iterator[memoryview]:
    """Yield the parts of the batches' buffers that hold the chosen clusters."""
    begin = 0
    for batch in some:
        stop, content = begin + len(batch.numbers), batch.content
        its, begin = chosen[begin:stop], stop
        if content is None:
            continue
        if its.all():
            yield content
            continue
        edges = np.flatnonzero(np.diff(its, prepend=False, append=False)) * CLUSTER_BYTES
        for first, last in edges.reshape(-1, 2).tolist():
            yield content[first:last]
