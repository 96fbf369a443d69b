# SPDX-License-Identifier: GPL-2.0-or-later
"""Moving extents from a source to a sink: many requests in flight, bounded memory, one thread.

::

    extents ─► chunks of 1 MiB ─► [read in flight] ─► [in the filter] ─► [writes in flight] ─► done
                                        at most `DEPTH` for each connection of the source

A read error is fatal: not one byte of a failed read is written. All that waits for sockets is one
thread; the filter (digests) works in a thread of its own.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from functools import partial

import nbd

from backupctl.errors import ReadFailed, WriteFailed
from backupctl.transfer.extents import Extent, split
from backupctl.transfer.nbd_client import Connection
from backupctl.transfer.polling import Wakeup, poll_once
from backupctl.transfer.rate_limit import TokenBucket
from backupctl.transfer.sink import Sink, Ticket
from backupctl.transfer.source import Source

CHUNK_BYTES = 1 << 20
ZERO_CHUNK_BYTES = 256 << 20
DEPTH = 6
CHECK_SECONDS = 0.1
FILTER_THREADS = 1  # measured (fixtures/bench_copy.py): a second one only contends for the interpreter

Filter = Callable[[Extent, memoryview | None], Sequence[Extent]]
"""Called in a thread with each chunk and its content (None: known to be zeroes); returns what of it is
to be written, sorted. What it raises ends the copy."""


@dataclass(frozen=True)
class Copied:
    """The result of a copy. copied_bytes: read. zero_bytes: known to be zeroes, and therefore not read."""

    copied_bytes: int
    zero_bytes: int


def pass_all(extent: Extent, content: memoryview | None) -> Sequence[Extent]:
    """Let everything pass; what turns out to contain only zeroes, as zeroes."""
    zero = content is None or nbd.Buffer.from_buffer(content).is_zero()
    return (Extent(extent.offset, extent.length, zero),)


@dataclass(frozen=True)
class Copy:
    """A copy from a source to a sink; `run` does it.

    sink: None if the filter lets nothing pass: then everything is only read.
    check: called at least every 100 ms while bytes move; what it raises ends the copy.
    progress: called with the bytes done. stall_seconds: the longest time without any chunk making progress.
    filter_chunk: chooses what of each chunk is written.
    on_unreadable: called with each chunk that the source could not read, and the copy goes on without it.
    None: a read error ends the copy.
    """

    source: Source
    sink: Sink | None
    _: KW_ONLY
    check: Callable[[], None]
    progress: Callable[[int], None] = lambda _done_bytes: None
    limiter: TokenBucket = field(default_factory=partial(TokenBucket, None))
    stall_seconds: float = 60.0
    filter_chunk: Filter = pass_all
    on_unreadable: Callable[[Extent], None] | None = None

    def run(self, extents: Iterable[Extent]) -> Copied:
        """Copy all extents. Raises ReadFailed, WriteFailed, and what `check` and `filter_chunk` raise."""
        with Wakeup() as wakeup, ThreadPoolExecutor(FILTER_THREADS, "filter") as threads:
            copied = _RunningCopy(self, wakeup, threads).run(_chunks(extents))
        self.progress(copied.copied_bytes + copied.zero_bytes)
        return copied


@dataclass
class _Chunk:
    """One request under way: read first, unless it is zeroes, then filtered, then written.

    pending: of the requests in flight. filtering: what the filter will return, until that was taken.
    """

    extent: Extent
    source: Connection
    content: bytearray | None = None
    pending: list[Ticket] = field(default_factory=list)
    filtering: "Future[Sequence[Extent]] | None" = None
    writing: bool = False

    def is_idle(self) -> bool:
        """Whether nothing of it is in flight any more. Raises ReadFailed, WriteFailed."""
        if self.filtering is not None:
            return self.filtering.done()
        self.pending = [has_ended for has_ended in self.pending if not has_ended()]
        return not self.pending


class _RunningCopy:
    """The chunks of one running copy, and what it has come to so far."""

    def __init__(self, copy: Copy, wakeup: Wakeup, threads: ThreadPoolExecutor) -> None:
        self._copy = copy
        self._wakeup = wakeup
        self._threads = threads
        self._pollables = [*copy.source.connections, *(copy.sink.pollables if copy.sink else ()), wakeup]
        self._in_flight: deque[_Chunk] = deque()
        self._free: list[bytearray] = []
        self._copied_bytes = self._zero_bytes = 0

    def run(self, chunks: Iterator[Extent]) -> Copied:
        copy, connections = self._copy, self._copy.source.connections
        waiting = next(chunks, None)
        started = 0
        checked = moved = time.monotonic()
        while waiting is not None or self._in_flight:
            pause = copy.limiter.wait_seconds()
            while waiting is not None and pause <= 0 and len(self._in_flight) < DEPTH * len(connections):
                self._start(waiting, connections[started % len(connections)])
                started += 1
                waiting = next(chunks, None)
                pause = copy.limiter.wait_seconds()
            poll_once(self._pollables, min(pause, CHECK_SECONDS) if pause > 0 else CHECK_SECONDS)
            now = time.monotonic()
            if self._advance() or not self._in_flight:
                moved = now
            if now - checked >= CHECK_SECONDS:
                checked = now
                copy.check()
                copy.progress(self._copied_bytes + self._zero_bytes)
            if now - moved > copy.stall_seconds:
                failure = WriteFailed if self._in_flight[0].writing else ReadFailed
                raise failure(f"no byte moved for {copy.stall_seconds:g} s")
        return Copied(self._copied_bytes, self._zero_bytes)

    def _start(self, extent: Extent, source: Connection) -> None:
        chunk = _Chunk(extent, source)
        if extent.zero:
            self._filter(chunk)
        else:
            self._copy.limiter.spend(extent.length)
            chunk.content = self._buffer(extent.length)
            cookie = source.start_read(nbd.Buffer.from_buffer(chunk.content), extent.offset)
            chunk.pending = [partial(source.has_ended, cookie)]
        self._in_flight.append(chunk)

    def _advance(self) -> bool:
        """Take every chunk that can go on one step further; returns whether any could."""
        moved = False
        for _ in range(len(self._in_flight)):
            chunk = self._in_flight.popleft()
            try:
                idle = chunk.is_idle()
            except ReadFailed:
                # A lost server says nothing about this chunk: only a read error of a live one is tolerated.
                if self._copy.on_unreadable is None or not chunk.source.alive():
                    raise
                moved = True
                self._copy.on_unreadable(chunk.extent)
                continue
            if idle:
                moved = True
                if chunk.writing:
                    self._finish(chunk)
                    continue
                if chunk.filtering is None:
                    self._filter(chunk)
                else:
                    self._write(chunk, chunk.filtering.result())
            self._in_flight.append(chunk)
        return moved

    def _filter(self, chunk: _Chunk) -> None:
        content = memoryview(chunk.content) if chunk.content is not None else None
        chunk.filtering = self._threads.submit(self._copy.filter_chunk, chunk.extent, content)
        chunk.filtering.add_done_callback(lambda _done: self._wakeup.set())

    def _write(self, chunk: _Chunk, wanted: Sequence[Extent]) -> None:
        chunk.filtering, chunk.writing = None, True
        for extent in wanted:
            assert self._copy.sink is not None
            if extent.zero:
                chunk.pending.append(self._copy.sink.zero(extent))
            else:
                begin = extent.offset - chunk.extent.offset
                assert chunk.content is not None
                part = memoryview(chunk.content)[begin : begin + extent.length]
                chunk.pending.append(self._copy.sink.write(extent, part))

    def _finish(self, chunk: _Chunk) -> None:
        if chunk.content is None:
            self._zero_bytes += chunk.extent.length
            return
        self._copied_bytes += chunk.extent.length
        if chunk.extent.length == CHUNK_BYTES:
            self._free.append(chunk.content)

    def _buffer(self, length: int) -> bytearray:
        """Return a buffer, a used one if possible: the page faults of new ones cost more than the copy."""
        return self._free.pop() if length == CHUNK_BYTES and self._free else bytearray(length)


def _chunks(extents: Iterable[Extent]) -> Iterator[Extent]:
    for extent in extents:
        yield from split(extent, ZERO_CHUNK_BYTES if extent.zero else CHUNK_BYTES)
