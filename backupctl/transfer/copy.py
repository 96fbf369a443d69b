# SPDX-License-Identifier: GPL-2.0-or-later
"""Moving extents from a source to a target: many requests in flight, bounded memory, one thread.

::

    extents ─► pieces of 1 MiB ─► [read in flight] ─► [write in flight] ─► done
                                        at most `DEPTH` for each connection

A read error is fatal: not one byte of a failed read is written.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nbd

from backupctl.errors import WriteFailed
from backupctl.transfer.connection import Connection, turn
from backupctl.transfer.extents import Extent, pieces
from backupctl.transfer.limit import TokenBucket
from backupctl.transfer.source import Source

PIECE_BYTES = 1 << 20
ZERO_PIECE_BYTES = 256 << 20
DEPTH = 6
WATCH_SECONDS = 0.1


@dataclass(frozen=True)
class Copied:
    """What a copy came to. zero_bytes: stored as zeroes, without having been read."""

    copied_bytes: int
    zero_bytes: int


@dataclass
class _Piece:
    """One request on its way: read first, unless it is zeroes, then written."""

    extent: Extent
    source: Connection
    target: Connection
    cookie: int = 0
    buffer: "nbd.Buffer | None" = None
    writing: bool = False

    @property
    def connection(self) -> Connection:
        return self.target if self.writing else self.source


@contextmanager
def open_target(address: Path, export: str, connections: int = 2) -> Iterator[tuple[Connection, ...]]:
    """Connect to a writable export; when the block ends well, all written is flushed. Raises WriteFailed."""
    made = []
    try:
        for _ in range(connections):
            connection = Connection(export, WriteFailed, stall_seconds=120.0)
            made.append(connection)
            connection.connect(address)
        yield tuple(made)
        made[0].flush()
    finally:
        for connection in made:
            connection.close()


class Copy:
    """One disk's copy; `run` does it.

    check: called at least every 100 ms while bytes move; what it raises ends the copy.
    progress: told the bytes done. stall_seconds: the longest time without any piece ending.
    """

    def __init__(
        self,
        source: Source,
        target: tuple[Connection, ...],
        limiter: TokenBucket,
        check: Callable[[], None],
        progress: Callable[[int], None],
        stall_seconds: float = 60.0,
    ) -> None:
        self._pairs = [
            (connection, target[number % len(target)]) for number, connection in enumerate(source.connections)
        ]
        self._connections = [*source.connections, *target]
        self._limiter = limiter
        self._check = check
        self._progress = progress
        self._stall_seconds = stall_seconds
        self._flying: deque[_Piece] = deque()
        self._idle: list[nbd.Buffer] = []
        self._copied = self._zero = 0

    def run(self, extents: Iterable[Extent]) -> Copied:
        """Copy all extents. Raises ReadFailed, WriteFailed, and what `check` raises."""
        ahead = _pieces(extents)
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
            turn(self._connections, min(pause, WATCH_SECONDS) if pause > 0 else WATCH_SECONDS)
            now = time.monotonic()
            if self._advance() or not self._flying:
                moved = now
            if now - watched >= WATCH_SECONDS:
                watched = now
                self._check()
                self._progress(self._copied + self._zero)
            if now - moved > self._stall_seconds:
                raise self._flying[0].connection.failure(f"no byte moved for {self._stall_seconds:g} s")
        self._progress(self._copied + self._zero)
        return Copied(self._copied, self._zero)

    def _start(self, extent: Extent, source: Connection, target: Connection) -> None:
        piece = _Piece(extent, source, target)
        if extent.zero:
            self._write(piece)
        else:
            self._limiter.spend(extent.length)
            piece.buffer = self._buffer(extent.length)
            piece.cookie = source.start_read(piece.buffer, extent.offset)
        self._flying.append(piece)

    def _write(self, piece: _Piece) -> None:
        extent, handle = piece.extent, piece.target.handle
        piece.writing = True
        try:
            if piece.buffer is None or piece.buffer.is_zero():
                piece.cookie = handle.aio_zero(extent.length, extent.offset)
            else:
                piece.cookie = handle.aio_pwrite(piece.buffer, extent.offset)
        except nbd.Error as err:
            raise piece.target.explained(err) from err

    def _advance(self) -> bool:
        """Take every piece that can go on one step further; whether any could."""
        moved = False
        for _ in range(len(self._flying)):
            piece = self._flying.popleft()
            if not piece.connection.completed(piece.cookie):
                if not piece.connection.alive():
                    raise piece.connection.failure("the NBD connection was lost")
                self._flying.append(piece)
                continue
            moved = True
            if piece.writing:
                self._count(piece)
            else:
                self._write(piece)
                self._flying.append(piece)
        return moved

    def _count(self, piece: _Piece) -> None:
        if piece.extent.zero:
            self._zero += piece.extent.length
            return
        self._copied += piece.extent.length
        if piece.extent.length == PIECE_BYTES:
            self._idle.append(piece.buffer)

    def _buffer(self, length: int) -> "nbd.Buffer":
        """Return a buffer, a used one if there is: the page faults of new ones cost more than the copy."""
        return self._idle.pop() if length == PIECE_BYTES and self._idle else nbd.Buffer(length)


def _pieces(extents: Iterable[Extent]) -> Iterator[Extent]:
    for extent in extents:
        yield from pieces(extent, ZERO_PIECE_BYTES if extent.zero else PIECE_BYTES)
