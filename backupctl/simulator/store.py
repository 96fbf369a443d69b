# SPDX-License-Identifier: GPL-2.0-or-later
"""Content in sparse files, and which parts of it are allocated.

`RawStore`: the file is the disk; a hole of the file is a hole of the disk.
`ClusterStore`: as in qcow2 a cluster is unallocated (it reads from the backing node), data, or zero. The
state is one byte per cluster; cluster n is at a fixed offset of a sparse file, so a disk of 1 TiB takes as
much space as was written to it. Clusters without data are holes of the file, so they read as zeroes.

Both files are in the page cache: what was written survives a crash of the process, as with QEMU.
"""

import ctypes
import errno
import os
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

CLUSTER = 65536
_PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

Bytes = bytes | bytearray | memoryview
States = npt.NDArray[np.uint8]
Run = tuple[int, int, "State"]


class State(IntEnum):
    """The state of a range."""

    UNALLOCATED = 0
    DATA = 1
    ZERO = 2


class Store(Protocol):
    """Content of `size` bytes. Offsets and lengths are bytes; ranges lie inside. Raises OSError.

    cluster: the unit of allocation, in bytes.
    """

    size: int
    cluster: int

    def read_into(self, offset: int, view: memoryview) -> None:
        """Read into a view; unallocated ranges read as zeroes."""

    def write(self, offset: int, data: Bytes) -> None:
        """Write; every cluster touched becomes data."""

    def punch(self, offset: int, length: int, state: State) -> None:
        """Make whole clusters read as zeroes, in a state that is not data."""

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """Yield (offset, length, state) over a range, neighbours in different states."""

    def resize(self, size: int) -> None:
        """Grow with zeroes, or shrink."""

    def allocated_bytes(self) -> int:
        """Return the bytes that it takes on the disk."""

    def close(self) -> None:
        """Close the files."""


class RawStore:
    """A raw image file."""

    cluster = 1

    def __init__(self, descriptor: int) -> None:
        self._fd = self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size

    def read_into(self, offset: int, view: memoryview) -> None:
        """See `Store`."""
        _read_into(self._fd, offset, view)

    def write(self, offset: int, data: Bytes) -> None:
        """See `Store`."""
        _write(self._fd, offset, data)

    def punch(self, offset: int, length: int, state: State) -> None:  # noqa: ARG002 - a file knows one kind of hole
        """See `Store`; a file punches bytes, not clusters."""
        _punch(self._fd, offset, length)

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """See `Store`."""
        end = offset + length
        while offset < end:
            data = _seek(self._fd, offset, os.SEEK_DATA, self.size)
            if data > offset:
                yield offset, min(data, end) - offset, State.UNALLOCATED
                offset = data
                continue
            hole = min(_seek(self._fd, offset, os.SEEK_HOLE, self.size), end)
            yield offset, hole - offset, State.DATA
            offset = hole

    def resize(self, size: int) -> None:
        """See `Store`."""
        os.ftruncate(self._fd, size)
        self.size = size

    def allocated_bytes(self) -> int:
        """See `Store`."""
        return os.fstat(self._fd).st_blocks * 512

    def close(self) -> None:
        """See `Store`."""
        os.close(self._fd)


class ClusterStore:
    """Content with a state per cluster.

    descriptor: the file with the bytes. states: one byte per cluster. data_offset: offset of
    cluster 0 in the file, for files that begin with something else.
    """

    cluster = CLUSTER

    def __init__(self, descriptor: int, states: States, size: int, data_offset: int = 0) -> None:
        self._fd = descriptor
        self._base = data_offset
        self.states = states
        self.size = size

    def read_into(self, offset: int, view: memoryview) -> None:
        """See `Store`."""
        _read_into(self._fd, self._base + offset, view)

    def write(self, offset: int, data: Bytes) -> None:
        """See `Store`; the rest of a new cluster must have been copied up from the backing node before."""
        _write(self._fd, self._base + offset, data)
        self.states[offset // CLUSTER : -(-(offset + len(data)) // CLUSTER)] = State.DATA

    def punch(self, offset: int, length: int, state: State) -> None:
        """See `Store`."""
        _punch(self._fd, self._base + offset, length)
        self.states[offset // CLUSTER : -(-(offset + length) // CLUSTER)] = state

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """See `Store`."""
        first, end = offset // CLUSTER, offset + length
        states = self.states[first : -(-end // CLUSTER)]
        borders = np.flatnonzero(states[1:] != states[:-1]) + 1
        starts = [0, *borders.tolist()]
        for number, start in enumerate(starts):
            stop = starts[number + 1] if number + 1 < len(starts) else len(states)
            low, high = max((first + start) * CLUSTER, offset), min((first + stop) * CLUSTER, end)
            if high > low:
                yield low, high - low, State(int(states[start]))

    def new_clusters(self, offset: int, length: int) -> int:
        """Return how many clusters a write of this range would add."""
        states = self.states[offset // CLUSTER : -(-(offset + length) // CLUSTER)]
        return int(np.count_nonzero(states != State.DATA))

    def resize(self, size: int) -> None:
        """See `Store`. As in qcow2, a cluster that the new end cuts keeps its data beyond that end.

        When the disk grows again, they are visible again (measured: the conformance script
        `a_cluster_that_a_shrunk_disk_cut_is_whole_again_when_it_grows`).
        """
        clusters = -(-size // CLUSTER)
        if size < self.size:
            _punch(self._fd, self._base + clusters * CLUSTER, max(self.size - clusters * CLUSTER, 0))
        kept = self.states[:clusters]
        if isinstance(self.states, np.memmap):
            self.states = _mapped(Path(str(self.states.filename)), clusters)
        else:
            self.states = np.zeros(clusters, np.uint8)
            self.states[: len(kept)] = kept
        self.size = size

    def allocated_bytes(self) -> int:
        """See `Store`."""
        return os.fstat(self._fd).st_blocks * 512

    def close(self) -> None:
        """See `Store`."""
        os.close(self._fd)


def kept_clusters(data: Path, states: Path, size: int, data_offset: int) -> ClusterStore:
    """Open or create a cluster store in two named files."""
    descriptor = os.open(data, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    return ClusterStore(descriptor, _mapped(states, -(-size // CLUSTER)), size, data_offset)


def _mapped(path: Path, clusters: int) -> States:
    with path.open("ab") as file:
        file.truncate(max(clusters, 1))
    return np.memmap(path, np.uint8, "r+", shape=(max(clusters, 1),))


def _read_into(descriptor: int, offset: int, view: memoryview) -> None:
    done = os.preadv(descriptor, [view], offset)
    if done < len(view):
        view[done:] = bytes(len(view) - done)  # beyond the end of the file nothing was ever written


def _write(descriptor: int, offset: int, data: Bytes) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done


def _punch(descriptor: int, offset: int, length: int) -> None:
    if length and _libc.fallocate(descriptor, _PUNCH_HOLE, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _seek(descriptor: int, offset: int, whence: int, end: int) -> int:
    try:
        return os.lseek(descriptor, offset, whence)
    except OSError as err:
        if err.errno == errno.ENXIO:  # nothing but a hole up to the end
            return end
        raise
