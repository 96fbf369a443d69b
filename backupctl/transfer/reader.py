# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a copy reads from: the seam between `copy` and whatever has the bytes.

A reader either starts requests that end by themselves (an NBD export), or reads in the worker that then
digests, filters and writes the batch (files of ours).
"""

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Protocol

import nbd

from backupctl.digests.clusters import CLUSTER_BYTES
from backupctl.transfer.batch import Batch, runs
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

    @property
    def blocking(self) -> bool:
        """Whether `fill` does the reading, in a worker; otherwise a batch that has ended is complete."""

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

    blocking = False

    def __init__(self, source: Source, size: int | None = None) -> None:
        self.size = source.size if size is None else size
        self.pollables = source.connections
        self.batches = BATCHES * len(source.connections)
        # What each connection's requests in flight belong to, by their cookies.
        self._reads = [(connection, dict[int, Batch]()) for connection in source.connections]
        self._turns = cycle(self._reads)

    def start(self, batch: Batch) -> None:
        """Ask for all runs of the batch. Raises ReadFailed."""
        connection, reads = next(self._turns)
        buffer = batch.buffer
        assert buffer is not None
        for place, number, count in runs(batch.numbers):
            at, offset, length = place * CLUSTER_BYTES, number * CLUSTER_BYTES, count * CLUSTER_BYTES
            if offset + length > self.size:  # the disk's last cluster may be short
                buffer[at + self.size - offset : at + length] = bytes(offset + length - self.size)
                length = self.size - offset
            reads[connection.start_read(nbd.Buffer.from_buffer(buffer[at : at + length]), offset)] = batch
            batch.reads += 1

    def ended(self) -> Iterator[Batch]:
        """Yield what has been read. Raises ReadFailed if the connection is lost."""
        for connection, reads in self._reads:
            while reads and (retired := connection.retire()):
                cookie, failure = retired
                batch = reads.pop(cookie)
                batch.failure = failure or batch.failure
                batch.reads -= 1
                if not batch.reads:  # its buffer is free only when no request fills it any more
                    yield batch

    def fill(self, batch: Batch) -> None:
        """Do nothing: the bytes are there."""
