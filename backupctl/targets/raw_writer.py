# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes a disk as raw bytes, each cluster at its own place: into a sparse file or a block device."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Self

import numpy as np
from numpy.typing import NDArray

from backupctl.errors import WriteFailed
from backupctl.images.open_image import OpenImage
from backupctl.sizes import CLUSTER_BYTES
from backupctl.system.direct_io import DirectWriter, aligned

Clusters = NDArray[np.uint64]

_ZEROES = aligned(16 * CLUSTER_BYTES)


class RawWriter:
    """Writes into a file or device that is open for writing. size_bytes: of the disk.

    `write` and `zero` may be called by several threads at once, with whole clusters by their numbers in the
    disk, ascending. They return when the bytes are written, not yet durable. WriteFailed has no subject here.
    """

    def __init__(self, image: OpenImage, size_bytes: int, *, onto_device: bool) -> None:
        self._size_bytes = size_bytes
        self._onto_device = onto_device
        self._file = DirectWriter(image.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def write(self, numbers: Clusters, parts: Sequence[memoryview]) -> None:
        """Write clusters. parts: their bytes, one behind the other. Raises WriteFailed."""
        begin = 0
        for part in parts:
            stop = begin + part.nbytes // CLUSTER_BYTES
            self._each_run(numbers[begin:stop], part, self._write)
            begin = stop

    def zero(self, numbers: Clusters) -> None:
        """Make clusters zeroes, if possible without writing them. Raises WriteFailed."""
        self._each_run(numbers, None, self._zero)

    def finish(self) -> None:
        """Flush it all to stable storage. All calls have ended. Raises WriteFailed."""
        try:
            if not self._onto_device:
                self._file.cut(self._size_bytes)
            self._file.sync()
        except OSError as err:
            raise WriteFailed(str(err.strerror)) from err

    def _each_run(
        self,
        numbers: Clusters,
        content: memoryview | None,
        put: Callable[[int, int, memoryview | None], None],
    ) -> None:
        edges = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
        try:
            for first, stop in pairwise(edges):
                part = None if content is None else content[first * CLUSTER_BYTES : stop * CLUSTER_BYTES]
                put(int(numbers[first]) * CLUSTER_BYTES, (stop - first) * CLUSTER_BYTES, part)
        except OSError as err:
            raise WriteFailed(str(err.strerror)) from err

    def _write(self, offset: int, length: int, content: memoryview | None) -> None:
        assert content is not None
        # The last cluster of a file is written whole, as direct I/O needs it, and cut by `finish`. Behind the
        # end of the disk a device has bytes of somebody else.
        if self._onto_device:
            length = min(length, self._size_bytes - offset)
        self._file.write([content[:length]], offset)

    def _zero(self, offset: int, length: int, _content: memoryview | None) -> None:
        length = min(length, self._size_bytes - offset)
        if self._file.punch(offset, length):
            return
        for begin in range(0, length, _ZEROES.nbytes):
            self._file.write([_ZEROES[: length - begin]], offset + begin)
