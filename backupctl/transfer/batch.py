# SPDX-License-Identifier: GPL-2.0-or-later
"""What moves from a source to a sink: batches of up to 16 clusters, in one buffer.

The clusters of a batch need not be neighbours. Each lies in the buffer at its place in `numbers`::

    numbers      3        4        9       12
    buffer   |--------|--------|--------|--------|     64 KiB each; the disk's short last one is padded
    runs     |-----------------|--------|--------|     what one request reads or writes

Zeroes have no buffer, and many of them are one batch.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from backupctl.digests.clusters import CLUSTER_BYTES, Clusters, Records
from backupctl.errors import TransferError
from backupctl.system.direct_io import aligned

BATCH_CLUSTERS = 16
"""1 MiB. Requests of 2 MiB took three times the CPU in the source's QEMU, which serves a guest as well."""
BATCH_BYTES = BATCH_CLUSTERS * CLUSTER_BYTES
ZERO_CLUSTERS = 4096
_BUFFERS = 8  # made together: a huge page, of 2 MiB mostly, has several


class Part(NamedTuple):
    """Some clusters of a disk, ascending, of any count. zero: they are known to be zeroes."""

    numbers: Clusters
    zero: bool


class Run(NamedTuple):
    """Neighbours in a batch. place: of the first one in the buffer. number: its own. clusters: how many."""

    place: int
    number: int
    clusters: int


@dataclass(eq=False)
class Batch:
    """Clusters on their way.

    buffer: for their content, page-aligned; None if they are zeroes. reads: requests in flight that fill it.
    failure: why they could not be read. records: of the clusters, once their digests are computed. writing:
    whether a worker has begun to write them.
    """

    numbers: Clusters
    buffer: memoryview | None
    reads: int = field(default=0, init=False)
    failure: TransferError | None = field(default=None, init=False)
    records: Records | None = field(default=None, init=False)
    writing: bool = field(default=False, init=False)

    @property
    def content(self) -> memoryview | None:
        """The bytes of its clusters, one behind the other; None if they are zeroes."""
        return None if self.buffer is None else self.buffer[: len(self.numbers) * CLUSTER_BYTES]


def new_buffers() -> list[memoryview]:
    """Return memory for some batches, as direct I/O needs it; what is not written to needs no memory yet."""
    memory = aligned(_BUFFERS * BATCH_BYTES, huge_pages=True)
    return [memory[at : at + BATCH_BYTES] for at in range(0, len(memory), BATCH_BYTES)]


def runs(numbers: Clusters) -> Iterator[Run]:
    """Yield the runs of neighbours."""
    count = len(numbers)
    if int(numbers[-1]) - int(numbers[0]) == count - 1:
        yield Run(0, int(numbers[0]), count)
        return
    listed = numbers.tolist()
    first = 0
    for place in range(1, count):
        if listed[place] != listed[place - 1] + 1:
            yield Run(first, listed[first], place - first)
            first = place
    yield Run(first, listed[first], count - first)


def cut(parts: Iterable[Part], zero_clusters: int = ZERO_CLUSTERS) -> Iterator[Part]:
    """Cut parts into pieces for a batch each. zero_clusters: how many zeroes are one batch, at most."""
    for part in parts:
        most = zero_clusters if part.zero else BATCH_CLUSTERS
        for first in range(0, len(part.numbers), most):
            yield Part(part.numbers[first : first + most], part.zero)


def each(numbers: Clusters) -> Iterator[Part]:
    """Yield clusters one by one, as data."""
    for place in range(len(numbers)):
        yield Part(numbers[place : place + 1], zero=False)
