# SPDX-License-Identifier: GPL-2.0-or-later
"""Copy-before-write, and the node that gives access to its snapshot.

::

    writes ──► [CopyBeforeWrite] ──► file            [SnapshotAccess] ──► reads `copied` from target,
                     └── old content, once ──► target                     all else from file

Since requests do not overlap in time, "copy, then write" needs no lock.
"""

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from backupctl.simulator.bitmap import HierarchicalBitmap
from backupctl.simulator.nodes import Extent, Node, Piece
from backupctl.simulator.store import CLUSTER, Bytes


@dataclass(eq=False)
class CopyBeforeWrite(Node):
    """A filter that copies a cluster's old content to the target before it is first overwritten.

    break_guest: whether a failed copy fails the guest's write (QEMU's default) or breaks the snapshot.
    limit: clusters to copy, None for all. broken: the snapshot is lost. copied_bytes: so far.
    """

    break_guest: bool = True
    limit: HierarchicalBitmap | None = None
    broken: bool = False
    copied_bytes: int = 0
    copied: HierarchicalBitmap = field(init=False)

    def __post_init__(self) -> None:
        self.copied = HierarchicalBitmap(0)

    def begin(self) -> None:
        """Start a new snapshot: nothing is copied yet. Called once the children are linked."""
        self.copied = HierarchicalBitmap(-(-self.size // CLUSTER))

    @property
    def file(self) -> Node:
        """The node that is filtered."""
        return self.children["file"].node

    @property
    def target(self) -> Node:
        """The node that old content is copied to."""
        return self.children["target"].node

    @property
    def size(self) -> int:
        """Bytes."""
        return self.file.size

    def read_into(self, offset: int, view: memoryview) -> None:
        """See `Node`."""
        self.file.read_into(offset, view)

    def extents(self, offset: int, length: int) -> Iterator[Piece]:
        """See `Node`."""
        return self.file.extents(offset, length)

    def _write(self, offset: int, data: Bytes) -> None:
        self._keep(offset, len(data))
        self.file.write(offset, data)

    def _zero(self, offset: int, length: int) -> None:
        self._keep(offset, length)
        self.file.zero(offset, length)

    def _discard(self, offset: int, length: int) -> None:
        self._keep(offset, length)
        self.file.discard(offset, length)

    def _keep(self, offset: int, length: int) -> None:
        if self.broken:
            return
        try:
            for cluster in range(offset // CLUSTER, -(-(offset + length) // CLUSTER)):
                if not self.copied.get(cluster) and (self.limit is None or self.limit.get(cluster)):
                    self._copy(cluster * CLUSTER)
        except OSError:
            if self.break_guest:
                raise
            self.broken = True

    def _copy(self, start: int) -> None:
        length = min(CLUSTER, self.size - start)
        if any(flags == Extent.DATA for _, flags in self.file.extents(start, length)):
            self.target.write(start, self.file.read(start, length))
        else:
            self.target.zero(start, length)
        self.copied.set(start // CLUSTER, 1)
        self.copied_bytes += length


@dataclass(eq=False)
class SnapshotAccess(Node):
    """The disk as it was when the filter below it began. Reads fail once the filter's snapshot is broken.

    copies_are_data: whether holes that were copied show as data, as before QEMU 8.
    """

    copies_are_data: bool = False

    @property
    def filter(self) -> CopyBeforeWrite:
        """The filter below."""
        below = self.children["file"].node
        if not isinstance(below, CopyBeforeWrite):
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        return below

    @property
    def size(self) -> int:
        """Bytes."""
        return self.children["file"].node.size

    def _change(self, offset: int, length: int, action: Callable[[], None]) -> None:  # noqa: ARG002 - it is read-only
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    def read_into(self, offset: int, view: memoryview) -> None:
        """See `Node`."""
        for node, start, length in self._sources(offset, len(view)):
            node.read_into(start, view[start - offset : start - offset + length])

    def extents(self, offset: int, length: int) -> Iterator[Piece]:
        """See `Node`."""
        for node, start, part in self._sources(offset, length):
            if self.copies_are_data and node is self.filter.target:
                yield part, Extent.DATA
            else:
                yield from node.extents(start, part)

    def _sources(self, offset: int, length: int) -> Iterator[tuple[Node, int, int]]:
        """Yield (node that has it, offset, length). Raises OSError where the snapshot cannot be read."""
        keeper, end = self.filter, offset + length
        while offset < end:
            cluster = offset // CLUSTER
            if keeper.broken or (keeper.limit is not None and not keeper.limit.get(cluster)):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            copied = keeper.copied.get(cluster)
            last = -(-end // CLUSTER)
            after = (keeper.copied.next_clear if copied else keeper.copied.next_set)(cluster, last)
            stop = min(end, (last if after is None else after) * CLUSTER)
            if keeper.limit is not None:
                stop = min(stop, (cluster + 1) * CLUSTER)
            yield (keeper.target if copied else keeper.file), offset, stop - offset
            offset = stop
