# SPDX-License-Identifier: GPL-2.0-or-later
"""A disk as a chain of our images holds it, read by their tables, without QEMU.

::

    newest   ....NN........|          what it stores is on top
    middle   .MMM.M........|......    beyond its own end each layer hides those below it
    oldest   OOOOOOOOOOOOOO|OOOOOO
    disk     OMMMNNOOOOOOOO|

Memory: a window of 8192 clusters is looked up at a time, and the last few windows are kept.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from typing import Self

import numpy as np
from numpy.typing import NDArray

from backupctl.errors import ReadFailed, RepositoryUnreadable
from backupctl.images.open_image import OpenImage
from backupctl.images.qcow2_format import TABLE_ENTRIES, pieces
from backupctl.images.qcow2_tables import Tables
from backupctl.sizes import CLUSTER_BYTES
from backupctl.system.direct_io import DirectReader

WINDOW_CLUSTERS = TABLE_ENTRIES
_WINDOWS_KEPT = 4
_NO_LAYER = -1


@dataclass(frozen=True)
class Places:
    """Where the clusters of a window are stored.

    layer: which image, counted from the newest; -1: none, so that the cluster reads as zeroes. offset: of its
    data in the image's file, in bytes; 0: no data. lost: its entry is damaged.
    """

    layer: NDArray[np.int16]
    offset: NDArray[np.uint64]
    lost: NDArray[np.bool_]

    @property
    def data(self) -> NDArray[np.bool_]:
        """Whether a cluster must be read; otherwise it is zeroes."""
        return np.asarray((self.offset != 0) | self.lost)


class LayeredImage:
    """The disk at the top of a chain. images: newest first; they stay the caller's.

    All may be called by several threads. Raises DamageFound if QEMU would not open one of the images,
    RepositoryUnreadable.
    """

    def __init__(self, images: Sequence[OpenImage]) -> None:
        self._images = images
        self._tables = [Tables(image) for image in images]
        self._shown = list(accumulate((each.header.size for each in self._tables), min))
        self._files: dict[int, DirectReader] = {}
        self._lock = threading.Lock()
        self.size = self._tables[0].header.size
        self.refused: RepositoryUnreadable | None = None
        """What the operating system refused to read, so that nobody knows what is stored there."""
        # Not a method, whose cache would hold the object that holds it.
        self._window = lru_cache(_WINDOWS_KEPT)(partial(_overlay, self._tables, self._shown))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        with self._lock:
            for file in self._files.values():
                file.close()

    def windows(self) -> Iterator[tuple[int, Places]]:
        """Yield all of the disk, a window at a time: its first cluster, and where its clusters are.

        Raises RepositoryUnreadable.
        """
        for index in range(pieces(pieces(self.size, CLUSTER_BYTES), WINDOW_CLUSTERS)):
            yield index * WINDOW_CLUSTERS, self._window(index)

    def window(self, index: int) -> Places:
        """Return where the clusters of one window are. Raises RepositoryUnreadable."""
        return self._window(index)

    def stored_windows(self) -> list[int]:
        """Return which windows have anything that is stored, ascending."""
        found = [np.flatnonzero(each.l1[: pieces(each.clusters, TABLE_ENTRIES)]) for each in self._tables]
        return [int(index) for index in np.unique(np.concatenate(found))]

    def read(self, numbers: NDArray[np.uint64], content: memoryview) -> None:
        """Read clusters, each to its place in `content`, which is page-aligned.

        What lies beyond the end of the disk is zeroes. Raises ReadFailed if one of the clusters cannot be
        read, because its entry is damaged, or because the operating system refuses: see `refused`.
        """
        window = (numbers // np.uint64(WINDOW_CLUSTERS)).astype(np.intp)
        for index in np.unique(window).tolist():
            chosen = np.flatnonzero(window == index)
            try:
                places = self._window(index)
            except RepositoryUnreadable as err:
                self.refused = err
                raise ReadFailed(err.message) from err
            self._read(places, numbers, chosen, content)

    def _read(
        self, places: Places, numbers: NDArray[np.uint64], chosen: NDArray[np.intp], content: memoryview
    ) -> None:
        """Read those `chosen` of the clusters, all of one window, by whole runs of bytes of a file."""
        at = (numbers[chosen] % np.uint64(WINDOW_CLUSTERS)).astype(np.intp)
        layer, offset = places.layer[at], places.offset[at]
        if places.lost[at].any():
            raise ReadFailed("an entry of the image's tables leads nowhere")
        order = np.lexsort((offset, layer))
        layer, offset, chosen = layer[order], offset[order], chosen[order]
        follows = (np.diff(offset.astype(np.int64)) == CLUSTER_BYTES) & (np.diff(layer) == 0)
        begins = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(chosen)]
        for first, stop in pairwise(begins):
            parts = _slices(content, chosen[first:stop])
            done = 0 if not offset[first] else self._fill(int(layer[first]), int(offset[first]), parts)
            _clear(parts, done)
        for place in np.flatnonzero(layer != _NO_LAYER).tolist():
            begin = int(numbers[chosen[place]]) * CLUSTER_BYTES
            shown = self._shown[layer[place]] - begin
            if shown < CLUSTER_BYTES:
                _clear(_slices(content, chosen[place : place + 1]), max(shown, 0))

    def _fill(self, layer: int, offset: int, parts: Sequence[memoryview]) -> int:
        try:
            return self._file(layer).read(parts, offset)
        except OSError as err:
            path = self._images[layer].path
            self.refused = RepositoryUnreadable(f"cannot read {path}: {err.strerror}")
            raise ReadFailed(f"cannot read {path}: {err.strerror}") from err

    def _file(self, layer: int) -> DirectReader:
        """Return the file of an image; of most layers of a long chain nothing is read."""
        with self._lock:
            if layer not in self._files:
                self._files[layer] = DirectReader(self._images[layer].descriptor)
            return self._files[layer]


def _overlay(tables: Sequence[Tables], shown: Sequence[int], index: int) -> Places:
    first = index * WINDOW_CLUSTERS
    count = max(0, min(WINDOW_CLUSTERS, tables[0].clusters - first))
    layer = np.full(count, _NO_LAYER, np.int16)
    offset, lost = np.zeros(count, np.uint64), np.zeros(count, np.bool_)
    for number, (each, shown_bytes) in enumerate(zip(tables, shown, strict=True)):
        end = min(count, pieces(shown_bytes, CLUSTER_BYTES) - first)
        if end <= 0:
            break  # it hides all that is below
        if index >= len(each.l1) or not each.l1[index]:
            continue
        found = each.window(first, end)
        new = (layer[:end] == _NO_LAYER) & ((found.offset != 0) | found.zero | found.lost)
        layer[:end][new] = number
        offset[:end][new] = found.offset[new]
        lost[:end][new] = found.lost[new]
    return Places(layer, offset, lost)


def _slices(content: memoryview, places: NDArray[np.intp]) -> list[memoryview]:
    """Return the parts of a buffer for clusters at these places, neighbours as one."""
    edges = np.flatnonzero(np.diff(places) != 1) + 1
    firsts = places[np.concatenate([[0], edges])].tolist()
    lasts = places[np.concatenate([edges - 1, [len(places) - 1]])].tolist()
    return [
        content[first * CLUSTER_BYTES : (last + 1) * CLUSTER_BYTES]
        for first, last in zip(firsts, lasts, strict=True)
    ]


def _clear(parts: Sequence[memoryview], begin: int) -> None:
    """Clear memory from one byte of it on."""
    for part in parts:
        if begin < part.nbytes:
            rest = part[max(begin, 0) :]
            rest[:] = bytes(rest.nbytes)
        begin -= part.nbytes
