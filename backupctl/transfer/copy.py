# SPDX-License-Identifier: GPL-2.0-or-later
"""Moving extents from a source to a target: many requests in flight, bounded memory, one thread.

::

    extents ─► pieces of 1 MiB ─► [read in flight] ─► [in the sieve] ─► [writes in flight] ─► done
                                        at most `DEPTH` for each connection

A read error is fatal: not one byte of a failed read is written. All that waits for sockets is one
thread; the sieve (digests) works in threads of its own.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import nbd

from backupctl.errors import ReadFailed, WriteFailed
from backupctl.transfer.extents import Extent, pieces
from backupctl.transfer.nbd_client import Connection, poll_once
from backupctl.transfer.rate_limit import TokenBucket
from backupctl.transfer.source import Source

PIECE_BYTES = 1 << 20
ZERO_PIECE_BYTES = 256 << 20
DEPTH = 6
WATCH_SECONDS = 0.1
ANSWER_SECONDS = 120.0
DISK_SECONDS = 3600.0
"""For a flush that reaches the disk: one that seeks at each cluster of what the kernel held back."""

SIEVE_THREADS = 1  # measured: a second one only fights with the first for the interpreter

Filter = Callable[[Extent, memoryview | None], Sequence[Extent]]
"""Called in a thread with each piece and its content (None: known to be zeroes); returns what of it is
to be written, sorted. What it raises ends the copy."""


@dataclass(frozen=True)
class Copied:
    """What a copy came to. copied_bytes: read. zero_bytes: named as zeroes, and not read."""

    copied_bytes: int
    zero_bytes: int


@dataclass
class _Piece:
    """One request on its way: read first, unless it is zeroes, then sifted, then written.

    cookies: of the commands that are in flight. sifting: what the sieve will say, until it was heard.
    """

    extent: Extent
    source: Connection
    target: Connection
    content: bytearray | None = None
    cookies: list[int] = field(default_factory=list)
    sifting: "Future[Sequence[Extent]] | None" = None
    writing: bool = False

    @property
    def connection(self) -> Connection:
        return self.target if self.writing else self.source

    def rests(self) -> bool:
        """Whether nothing of it is in flight any more."""
        if self.sifting is not None:
            return self.sifting.done()
        self.cookies = [cookie for cookie in self.cookies if not self.connection.completed(cookie)]
        if self.cookies and not self.connection.alive():
            raise self.connection.failure("the NBD connection was lost")
        return not self.cookies


@contextmanager
def open_target(
    address: Path,
    export: str,
    connections: int = 2,
    check: Callable[[], None] = lambda: None,
    flush_seconds: float = ANSWER_SECONDS,
) -> Iterator[tuple[Connection, ...]]:
    """Connect to a writable export; when the block ends well, all written is flushed. Raises WriteFailed.

    check: called at least every 100 ms of these waits; what it raises ends them. flush_seconds: how long the
    flush may take.
    """
    made = []
    try:
        for _ in range(connections):
            connection = Connection(export, WriteFailed, ANSWER_SECONDS, check)
            made.append(connection)
            connection.connect(address)
        yield tuple(made)
        made[0].flush(flush_seconds)
    finally:
        for connection in made:
            connection.close()


class Copy:
    """One disk's copy; `run` does it.

    target: none if the sieve lets nothing pass: then all is only read.
    check: called at least every 100 ms while bytes move; what it raises ends the copy.
    progress: told the bytes done. stall_seconds: the longest time without any piece ending.
    sieve: what chooses from each piece; None writes all, and pieces of nothing but zeroes as zeroes.
    unreadable: told of each piece that the source could not read, and the copy goes on without it. None:
    a read error ends the copy.
    """

    def __init__(
        self,
        source: Source,
        target: tuple[Connection, ...],
        limiter: TokenBucket,
        check: Callable[[], None],
        progress: Callable[[int], None],
        stall_seconds: float = 60.0,
        sieve: Filter | None = None,
        unreadable: Callable[[Extent], None] | None = None,
    ) -> None:
        sinks = target or source.connections
        self._pairs = [
            (connection, sinks[number % len(sinks)]) for number, connection in enumerate(source.connections)
        ]
        self._connections = [*source.connections, *target]
        self._limiter = limiter
        self._check = check
        self._progress = progress
        self._stall_seconds = stall_seconds
        self._sieve = sieve or _as_it_is
        self._unreadable = unreadable
        self._flying: deque[_Piece] = deque()
        self._idle: list[bytearray] = []
        self._copied = self._zero = 0

    def run(self, extents: Iterable[Extent]) -> Copied:
        """Copy all extents. Raises ReadFailed, WriteFailed, and what `check` and the sieve raise."""
        self._sifted = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            with ThreadPoolExecutor(SIEVE_THREADS, "sieve") as self._threads:
                self._run(_pieces(extents))
        finally:
            os.close(self._sifted)
        self._progress(self._copied + self._zero)
        return Copied(self._copied, self._zero)

    def _run(self, ahead: Iterator[Extent]) -> None:
        waiting = next(ahead, None)
        started = 0
        watched = moved = time.monotonic()
        while waiting is not None or self._flying:
            pause = self._limiter.wait_seconds()
            while waiting is not None and pause <= 0 and len(self._flying) < DEPTH * len(self._pairs):
                self._start(waiting, *self._pairs[started % len(self._pairs)])
                started += 1
                waiting = next(ahead, None)
                pause = self._limiter.wait_seconds()
            poll_once(
                self._connections, min(pause, WATCH_SECONDS) if pause > 0 else WATCH_SECONDS, self._sifted
            )
            now = time.monotonic()
            if self._advance() or not self._flying:
                moved = now
            if now - watched >= WATCH_SECONDS:
                watched = now
                self._check()
                self._progress(self._copied + self._zero)
            if now - moved > self._stall_seconds:
                raise self._flying[0].connection.failure(f"no byte moved for {self._stall_seconds:g} s")

    def _start(self, extent: Extent, source: Connection, target: Connection) -> None:
        piece = _Piece(extent, source, target)
        if extent.zero:
            self._sift(piece)
        else:
            self._limiter.spend(extent.length)
            piece.content = self._buffer(extent.length)
            piece.cookies = [source.start_read(nbd.Buffer.from_buffer(piece.content), extent.offset)]
        self._flying.append(piece)

    def _advance(self) -> bool:
        """Take every piece that can go on one step further; whether any could."""
        moved = False
        for _ in range(len(self._flying)):
            piece = self._flying.popleft()
            try:
                rests = piece.rests()
            except ReadFailed:
                if self._unreadable is None or not piece.connection.alive():
                    raise
                moved = True
                self._unreadable(piece.extent)
                continue
            if rests:
                moved = True
                if piece.writing:
                    self._count(piece)
                    continue
                if piece.sifting is None:
                    self._sift(piece)
                else:
                    self._write(piece, piece.sifting.result())
            self._flying.append(piece)
        return moved

    def _sift(self, piece: _Piece) -> None:
        content = memoryview(piece.content) if piece.content is not None else None
        piece.sifting = self._threads.submit(self._sieve, piece.extent, content)
        piece.sifting.add_done_callback(lambda _done: os.eventfd_write(self._sifted, 1))

    def _write(self, piece: _Piece, wanted: Sequence[Extent]) -> None:
        piece.sifting, piece.writing = None, True
        handle = piece.target.handle
        try:
            for extent in wanted:
                if extent.zero:
                    cookie = handle.aio_zero(extent.length, extent.offset)
                else:
                    begin = extent.offset - piece.extent.offset
                    assert piece.content is not None
                    part = memoryview(piece.content)[begin : begin + extent.length]
                    cookie = handle.aio_pwrite(nbd.Buffer.from_buffer(part), extent.offset)
                piece.cookies.append(int(cookie))
        except nbd.Error as err:
            raise piece.target.explained(err) from err

    def _count(self, piece: _Piece) -> None:
        if piece.content is None:
            self._zero += piece.extent.length
            return
        self._copied += piece.extent.length
        if piece.extent.length == PIECE_BYTES:
            self._idle.append(piece.content)

    def _buffer(self, length: int) -> bytearray:
        """Return a buffer, a used one if there is: the page faults of new ones cost more than the copy."""
        return self._idle.pop() if length == PIECE_BYTES and self._idle else bytearray(length)


def _as_it_is(extent: Extent, content: memoryview | None) -> Sequence[Extent]:
    """Let all pass, what turned out to be nothing but zeroes as zeroes."""
    zero = content is None or nbd.Buffer.from_buffer(content).is_zero()
    return (Extent(extent.offset, extent.length, zero),)


def _pieces(extents: Iterable[Extent]) -> Iterator[Extent]:
    for extent in extents:
        yield from pieces(extent, ZERO_PIECE_BYTES if extent.zero else PIECE_BYTES)
