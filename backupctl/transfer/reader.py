# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a copy reads from: the seam between `copy` and whatever has the bytes.

A reader either starts requests that end by themselves (an NBD export), or reads in the worker that then
filters and writes the batch (files of ours).
"""

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Protocol

import nbd

from backupctl.digests.clusters import CLUSTER_BYTES
from backupctl.errors import ReadFailed
from backupctl.transfer.batch import Batch, runs
from backupctl.transfer.nbd_client import Connection
from backupctl.transfer.polling import Pollable
from backupctl.transfer.source import Source

BATCHES = 6
"""In flight on each connection."""


class Reader(Protocol):
    """What a copy needs of its source. `start`, `ended` and the pollables belong to the copy's own thread."""

    @property
    def pollables(self) -> Sequence[Pollable]:
        """What becomes ready when a read makes progress."""

    @property
    def batches(self) -> int:
        """How many batches are to be read at once."""

    @property
    def size(self) -> int:
        """The size of the disk in bytes."""

    def start(self, batch: Batch) -> None:
        """Begin to read a batch into its buffer, which must stay until the batch has ended."""

    def ended(self) -> Iterator[Batch]:
        """Yield batches that have been read, or whose `failure` says why a live source could not.

        Raises ReadFailed if the source is lost.
        """

    def fill(self, batch: Batch) -> None:
        """Do the rest in a worker. Raises ReadFailed if a live source cannot read it."""


class NbdReader:
    """Reads an NBD export: a request for each run of neighbours, straight into its place in the buffer.

    size: what of the export is the disk, in bytes; None: all of it.
    """

    def __init__(self, source: Source, size: int | None = None) -> None:
        self.size = source.size if size is None else size
        self.pollables: Sequence[Connection] = source.connections
        self._reads = [_Reads(connection) for connection in source.connections]
        self.batches = BATCHES * len(self._reads)
        self._turns = cycle(self._reads)

    def start(self, batch: Batch) -> None:
        """Ask for all runs of the batch. Raises ReadFailed."""
        reads = next(self._turns)
        assert batch.buffer is not None
        for first, number, count in runs(batch.numbers):
            at, offset = first * CLUSTER_BYTES, number * CLUSTER_BYTES
            length = count * CLUSTER_BYTES
            if offset + length > self.size:  # the disk's last cluster may be short
                batch.buffer[at + self.size - offset : at + length] = bytes(offset + length - self.size)
                length = self.size - offset
            reads.start(batch, nbd.Buffer.from_buffer(batch.buffer[at : at + length]), offset)

    def ended(self) -> Iterator[Batch]:
        """Yield what has been read. Raises ReadFailed if the connection is lost."""
        for reads in self._reads:
            yield from reads.ended()

    def fill(self, batch: Batch) -> None:
        """Do nothing: the bytes are there."""


class _Reads:
    """The requests of one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._batches: dict[int, Batch] = {}
        self._left: dict[Batch, int] = {}

    def start(self, batch: Batch, buffer: "nbd.Buffer", offset: int) -> None:
        self._batches[self._connection.start_read(buffer, offset)] = batch
        self._left[batch] = self._left.get(batch, 0) + 1

    def ended(self) -> Iterator[Batch]:
        while self._batches:
            # The first command that has ended, without a look at those that have not.
            cookie = self._connection.next_completed()
            if not cookie:
                if not self._connection.alive():
                    raise ReadFailed("the NBD connection was lost")
                return
            batch = self._batches.pop(cookie)
            try:
                self._connection.completed(cookie)
            except ReadFailed as err:
                # A lost server says nothing about these clusters: only an error reply of a live one counts.
                if not self._connection.alive():
                    raise
                batch.failure = err
            self._left[batch] -= 1
            if not self._left[batch]:  # a buffer is free only when no request fills it any more
                del self._left[batch]
                yield batch
