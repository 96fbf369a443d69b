# SPDX-License-Identifier: GPL-2.0-or-later
"""A whole disk as one stream of bytes, in order: for pipes.

::

    parts ─► batches ─► [reads in flight, at most `BATCHES`] ─► written strictly in order
"""

import errno
import os
import select
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np

from backupctl.digests import clusters, hashing
from backupctl.errors import ReadFailed, WriteFailed
from backupctl.transfer.batch import BATCH_BYTES, BATCH_CLUSTERS, Batch, Part, new_buffers
from backupctl.transfer.copy import Filter
from backupctl.transfer.polling import poll_once
from backupctl.transfer.reader import Reader

BATCHES = 8
CHECK_SECONDS = 0.1
STALL_SECONDS = 60.0
_ZEROES = memoryview(bytes(BATCH_BYTES))


def stream(
    reader: Reader,
    parts: Iterable[Part],
    descriptor: int,
    *,
    check: Callable[[], None],
    progress: Callable[[int], None],
    filter_records: Filter | None = None,
) -> None:
    """Write all of a disk to a descriptor. parts: its data, as `cluster_map.all_parts` yields it.

    filter_records: called with the records of each batch before any byte of it is written; what it raises
    ends the stream. check: called at least every 100 ms while the reader takes no bytes; what it raises ends
    the stream. progress: called with the bytes done. Raises ReadFailed, WriteFailed.
    """
    free: list[memoryview] = []
    waiting = _batches(parts, reader.size, free)
    in_flight: deque[Batch] = deque()
    reads = _Reads(reader, check)
    done = 0
    with _outlet(descriptor) as write:
        while True:
            while len(in_flight) < BATCHES and (batch := next(waiting, None)) is not None:
                reads.start(batch)
                in_flight.append(batch)
            if not in_flight:
                return
            batch = in_flight.popleft()
            reads.wait(batch)
            if filter_records is not None:
                filter_records(hashing.of_content(batch.numbers, batch.content))
            length = clusters.bytes_of(batch.numbers, reader.size)
            _write_all(write, (batch.content or _ZEROES)[:length], check)
            if batch.buffer is not None:
                free.append(batch.buffer)
            done += length
            check()
            progress(done)


class _Reads:
    """Reads that end in any order, and are waited for in turn."""

    def __init__(self, reader: Reader, check: Callable[[], None]) -> None:
        self._reader = reader
        self._check = check
        self._flying: set[Batch] = set()

    def start(self, batch: Batch) -> None:
        if batch.buffer is not None:
            self._flying.add(batch)
            self._reader.start(batch)

    def wait(self, batch: Batch) -> None:
        """Wait for the content of a batch. Raises ReadFailed."""
        quiet = time.monotonic()
        while batch in self._flying:
            poll_once(self._reader.pollables, CHECK_SECONDS)
            for ended in self._reader.ended():
                self._flying.remove(ended)
                quiet = time.monotonic()
            if time.monotonic() - quiet > STALL_SECONDS:
                raise ReadFailed(f"no byte moved for {STALL_SECONDS:g} s")
            self._check()
        if batch.failure is not None:
            raise batch.failure
        if batch.buffer is not None:
            self._reader.fill(batch)


def _batches(parts: Iterable[Part], size_bytes: int, free: list[memoryview]) -> Iterator[Batch]:
    """Yield all of the disk in order, in batches of neighbours: to be read where any of them has data."""
    count = clusters.count(size_bytes)
    at = 0
    for part in parts:
        if part.zero:
            continue
        for block in np.unique(part.numbers // np.uint64(BATCH_CLUSTERS)).tolist():
            yield from _zeroes(at, block * BATCH_CLUSTERS)
            at = min((block + 1) * BATCH_CLUSTERS, count)
            numbers = np.arange(block * BATCH_CLUSTERS, at, dtype=np.uint64)
            if not free:
                free.extend(new_buffers())
            yield Batch(numbers, free.pop())
    yield from _zeroes(at, count)


def _zeroes(first: int, stop: int) -> Iterator[Batch]:
    for begin in range(first, stop, BATCH_CLUSTERS):
        yield Batch(np.arange(begin, min(begin + BATCH_CLUSTERS, stop), dtype=np.uint64), None)


@contextmanager
def _outlet(descriptor: int) -> Iterator[Callable[[memoryview], int]]:
    """Yield a function that writes what it can and returns within `CHECK_SECONDS`.

    A pipe whose reader sleeps would block us in `write`, so that we could not react to a request to stop. So
    the pipe is opened once more with O_NONBLOCK: set on the descriptor itself, the flag would also change for
    every process that shares it. A file or block device is fsynced at the end, or a late write error would be
    lost.
    """
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISFIFO(mode):
        yield partial(os.write, descriptor)
        if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
            _sync(descriptor)
        return
    own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield partial(_write_some, own)
    finally:
        os.close(own)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as err:
        raise WriteFailed(f"cannot sync the output: {err.strerror}") from err


def _write_some(descriptor: int, content: memoryview) -> int:
    try:
        return os.write(descriptor, content)
    except BlockingIOError:
        waiting = select.poll()
        waiting.register(descriptor, select.POLLOUT)
        waiting.poll(CHECK_SECONDS * 1000)
        return 0


def _write_all(write: Callable[[memoryview], int], content: memoryview, check: Callable[[], None]) -> None:
    while content:
        try:
            written = write(content)
        except OSError as err:
            why = "the reader closed it" if err.errno == errno.EPIPE else err.strerror
            raise WriteFailed(f"cannot write the image to the output: {why}") from err
        content = content[written:]
        if not written:
            check()
