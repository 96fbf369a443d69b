# SPDX-License-Identifier: GPL-2.0-or-later
"""A chain of our images as a copy reads it: files are read in the workers, past the page cache."""

from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np

from backupctl.digests import clusters
from backupctl.errors import RepositoryUnreadable
from backupctl.images.layered_image import WINDOW_CLUSTERS, LayeredImage
from backupctl.transfer.batch import Batch, Part
from backupctl.transfer.polling import Pollable, Wakeup

WORKERS = 4
"""Threads that read. More than there are cores, since each waits for the disk most of the time."""


class ChainReader:
    """A Reader of `transfer`. disk: stays the caller's.

    A read fails with ReadFailed both for damage and where the operating system refuses: see `refused`.
    """

    blocking = True

    def __init__(self, disk: LayeredImage) -> None:
        self.size = disk.size
        self.batches = 0
        self._disk = disk
        self._wakeup = Wakeup()
        self._started: list[Batch] = []
        self.pollables: Sequence[Pollable] = (self._wakeup,)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self._wakeup.__exit__()

    @property
    def refused(self) -> RepositoryUnreadable | None:
        """What the operating system refused to read, if anything."""
        return self._disk.refused

    def parts(self) -> Iterator[Part]:
        """Yield all of the disk: its data and its zeroes, a window at a time.

        A window whose tables cannot be read counts as data: to read that fails, and fails no other.
        """
        for index in range(-(-clusters.count(self.size) // WINDOW_CLUSTERS)):
            first = index * WINDOW_CLUSTERS
            try:
                data = self._disk.window(index).data
            except RepositoryUnreadable:
                data = np.ones(min(WINDOW_CLUSTERS, clusters.count(self.size) - first), np.bool_)
            for zero, chosen in ((False, data), (True, ~data)):
                numbers = np.flatnonzero(chosen).astype(np.uint64) + np.uint64(first)
                if len(numbers):
                    yield Part(numbers, zero)

    def start(self, batch: Batch) -> None:
        """Leave it all to a worker."""
        self._started.append(batch)
        self._wakeup.set()

    def ended(self) -> Iterator[Batch]:
        """Yield all that was started."""
        while self._started:
            yield self._started.pop()

    def fill(self, batch: Batch) -> None:
        """Read a batch. Raises ReadFailed if one of its clusters cannot be read."""
        assert batch.buffer is not None
        self._disk.read(batch.numbers, batch.buffer)
