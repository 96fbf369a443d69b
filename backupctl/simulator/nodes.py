# SPDX-License-Identifier: GPL-2.0-or-later
"""Block nodes: what they read and write, and which bits that makes dirty.

A node reads, writes, zeroes and discards byte ranges; a request ends before the next begins. Every
change of a node's content marks the node's recording bitmaps, as in QEMU: by node, not by disk.
"""

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntFlag

from backupctl.simulator.dirty import DirtyBitmap
from backupctl.simulator.store import Bytes, ClusterStore, State, Store


class Extent(IntFlag):
    """Flags of an extent, as in NBD's base:allocation."""

    DATA = 0
    HOLE = 1
    ZERO = 2


Piece = tuple[int, Extent]
_SIZE_IN_HEADER = 24  # of a qcow2 file
EventSink = Callable[[str, dict[str, object]], None]


@dataclass(eq=False)
class Link:
    """A link to a node: from another node (backing, file, target), a device, an export or a job.

    user: the node that it comes from, None for any other user. name: of the user, as QEMU prints it.
    """

    role: str
    user: "Node | None"
    name: str
    node: "Node"


@dataclass(eq=False)
class Node:
    """What all nodes have in common.

    parents: links to it. blockers: why it must not be deleted, newest last. owned: made by `blockdev-add`
    and not yet deleted. write_threshold: emit an event when a write ends behind this offset; 0 for never.
    unstore: called with the name of a bitmap that is removed. store_bitmaps: stores the persistent ones.
    """

    name: str
    driver: str
    emit_event: EventSink
    read_only: bool = False
    discards: bool = False
    owned: bool = True
    filename: str = ""
    write_threshold: int = 0
    bitmaps: dict[str, DirtyBitmap] = field(default_factory=dict)
    parents: list[Link] = field(default_factory=list)
    children: dict[str, Link] = field(default_factory=dict)
    blockers: list[str] = field(default_factory=list)
    unstore: Callable[[str], None] = lambda _name: None
    store_bitmaps: Callable[[], None] = lambda: None

    @property
    def size(self) -> int:
        """Bytes."""
        raise NotImplementedError

    def child(self, role: str) -> "Node | None":
        """Return the node used in a role."""
        link = self.children.get(role)
        return link.node if link else None

    def read(self, offset: int, length: int) -> bytearray:
        """Return bytes. Raises OSError."""
        content = bytearray(length)
        self.read_into(offset, memoryview(content))
        return content

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill a zeroed view. Raises OSError."""
        raise NotImplementedError

    def extents(self, offset: int, length: int) -> Iterator[Piece]:
        """Yield (length, flags) over a range, backing included. Raises OSError."""
        raise NotImplementedError

    def write(self, offset: int, data: Bytes) -> None:
        """Write. Raises OSError."""
        self._change(offset, len(data), lambda: self._write(offset, data))

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes. Raises OSError."""
        self._change(offset, length, lambda: self._zero(offset, length))

    def zeroes_fast(self, offset: int, length: int) -> bool:  # noqa: ARG002 - most nodes can anywhere
        """Whether a range can be zeroed without writing. Raises OSError."""
        return True

    def discard(self, offset: int, length: int) -> None:
        """Discard a range if the node supports that. Raises OSError."""
        if self.discards:
            self._change(offset, length, lambda: self._discard(offset, length))

    def resize(self, size: int) -> None:
        """Change the size; bitmaps follow. Raises OSError."""
        self._resize(size)
        for bitmap in self.bitmaps.values():
            bitmap.resize(size)

    def close_for_writing(self) -> None:
        """Become read-only, which stores persistent bitmaps, as a clean exit of QEMU does."""
        if not self.read_only:
            self.store_bitmaps()
        self.read_only = True
        for bitmap in self.bitmaps.values():
            bitmap.read_only = bitmap.read_only or bitmap.persistent

    def _change(self, offset: int, length: int, action: Callable[[], None]) -> None:
        if not length:
            return
        if self.read_only:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        if offset < 0 or offset + length > self.size:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._watch(offset + length)
        try:
            action()
        finally:
            # Even a failed write may have changed something.
            for bitmap in self.bitmaps.values():
                if bitmap.recording and not bitmap.inconsistent:
                    bitmap.mark(offset, length)

    def _watch(self, end: int) -> None:
        if self.write_threshold and end > self.write_threshold:
            threshold, self.write_threshold = self.write_threshold, 0
            data = {"node-name": self.name, "amount-exceeded": end - threshold, "write-threshold": threshold}
            self.emit_event("BLOCK_WRITE_THRESHOLD", data)

    def _write(self, offset: int, data: Bytes) -> None:
        raise NotImplementedError

    def _zero(self, offset: int, length: int) -> None:
        raise NotImplementedError

    def _discard(self, offset: int, length: int) -> None:
        raise NotImplementedError

    def _resize(self, size: int) -> None:  # noqa: ARG002 - most nodes can't
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


@dataclass(eq=False)
class FileNode(Node):
    """A protocol node: a file, of which `grown_bytes` were written by the format above it.

    capacity: returns how many bytes it may take (a fault), None for no limit; more fails with ENOSPC.
    """

    store: Store | None = None
    grown_bytes: int = 0
    capacity: Callable[[], int | None] = lambda: None

    @property
    def size(self) -> int:
        """Bytes."""
        return self.store.size if self.store else self.grown_bytes

    def grow(self, bytes_more: int) -> None:
        """Account for new clusters. Raises OSError (ENOSPC) where a fault says so."""
        capacity = self.capacity()
        if capacity is not None and self.grown_bytes + bytes_more > capacity:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.grown_bytes += bytes_more
        self._watch(self.grown_bytes)

    def read_into(self, offset: int, view: memoryview) -> None:
        """See `Node`."""
        if self.store:
            self.store.read_into(offset, view)

    def extents(self, offset: int, length: int) -> Iterator[Piece]:
        """See `Node`."""
        if self.store is None:
            yield length, Extent.DATA
            return
        for _, part, state in self.store.runs(offset, length):
            yield part, Extent.DATA if state == State.DATA else Extent.HOLE | Extent.ZERO

    def _write(self, offset: int, data: Bytes) -> None:
        if self.store:
            self.store.write(offset, data)

    def _zero(self, offset: int, length: int) -> None:
        if self.store:
            self.store.punch(offset, length, State.ZERO)

    _discard = _zero

    def _resize(self, size: int) -> None:
        if self.store:
            self.store.resize(size)


@dataclass(eq=False)
class RawNode(Node):
    """The raw format: its file, as it is."""

    @property
    def file(self) -> Node:
        """The node below."""
        return self.children["file"].node

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
        self.file.write(offset, data)

    def _zero(self, offset: int, length: int) -> None:
        self.file.zero(offset, length)

    def _discard(self, offset: int, length: int) -> None:
        self.file.zero(offset, length)

    def _resize(self, size: int) -> None:
        self.file.resize(size)


@dataclass(eq=False)
class ThrottleNode(RawNode):
    """A throttle filter with the limits of its group, which here never slows anything down."""

    group: str = ""

    def _discard(self, offset: int, length: int) -> None:
        self.file.discard(offset, length)


def protocol_of(node: Node | None) -> FileNode | None:
    """Return the file node at the bottom of throttle nodes, None if it is another kind of node."""
    while isinstance(node, ThrottleNode):
        node = node.file
    return node if isinstance(node, FileNode) else None


@dataclass(eq=False)
class Qcow2Node(Node):
    """The qcow2 format: clusters that are data, zero, or read from the backing node."""

    store: ClusterStore = field(kw_only=True)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.store.size

    def read_into(self, offset: int, view: memoryview) -> None:
        """See `Node`."""
        backing = self.child("backing")
        if backing is None:
            self.store.read_into(offset, view)
            return
        for start, length, state in self.store.runs(offset, len(view)):
            part = view[start - offset : start - offset + length]
            if state == State.DATA:
                self.store.read_into(start, part)
            elif state == State.UNALLOCATED and start < backing.size:
                backing.read_into(start, part[: backing.size - start])

    def extents(self, offset: int, length: int) -> Iterator[Piece]:
        """See `Node`."""
        backing = self.child("backing")
        for start, part, state in self.store.runs(offset, length):
            if state == State.DATA:
                yield part, Extent.DATA
            elif state == State.UNALLOCATED and backing is not None:
                inside = max(min(part, backing.size - start), 0)
                yield from backing.extents(start, inside)
                yield part - inside, Extent.HOLE | Extent.ZERO
            else:
                yield part, Extent.HOLE | Extent.ZERO

    def zeroes_fast(self, offset: int, length: int) -> bool:
        """See `Node`."""
        first, last = self._whole_clusters(offset, length)
        edges = (
            ((offset, length),)
            if last < first
            else ((offset, first - offset), (last, offset + length - last))
        )
        return not any(self._must_write(start, part) for start, part in edges)

    def _write(self, offset: int, data: Bytes) -> None:
        self._allocate(offset, len(data))
        self.store.write(offset, data)

    def _zero(self, offset: int, length: int) -> None:
        first, last = self._whole_clusters(offset, length)
        if last < first:
            self._blank(offset, length)
            return
        self.store.punch(first, last - first, State.ZERO)
        self._blank(offset, first - offset)
        self._blank(last, offset + length - last)

    def _discard(self, offset: int, length: int) -> None:
        first, last = self._whole_clusters(offset, length)
        if last > first:
            self.store.punch(first, last - first, State.ZERO)

    def _resize(self, size: int) -> None:
        self.store.resize(size)
        file = protocol_of(self.child("file"))
        if file is not None and file.store is not None:
            file.store.write(_SIZE_IN_HEADER, size.to_bytes(8, "big"))

    def _allocate(self, offset: int, length: int) -> None:
        """Allocate clusters for a write: account for the file's growth, copy up the parts not written."""
        cluster = self.store.cluster
        if new := self.store.new_clusters(offset, length):
            file = protocol_of(self.child("file"))
            if file is not None:
                file.grow(new * cluster)
            edges = {offset // cluster, (offset + length - 1) // cluster}
            for number in edges:
                self._copy_up(number * cluster, min(cluster, self.size - number * cluster))

    def _copy_up(self, start: int, length: int) -> None:
        backing = self.child("backing")
        state = next(iter(self.store.runs(start, length)))[2]
        if backing is not None and state == State.UNALLOCATED:
            self.store.write(start, self.read(start, length))

    def _blank(self, offset: int, length: int) -> None:
        """Zero a part of one cluster: all of it where the rest reads as zeroes too, else by writing."""
        start, whole = self._cluster_of(offset)
        if self._must_write(offset, length):
            self._write(offset, bytes(length))
        elif length:
            self.store.punch(start, whole, State.ZERO)

    def _must_write(self, offset: int, length: int) -> bool:
        """Whether the rest of the cluster, of which a part is to be zeroed, does not read as zeroes."""
        return bool(length) and any(
            flags == Extent.DATA for _, flags in self.extents(*self._cluster_of(offset))
        )

    def _cluster_of(self, offset: int) -> tuple[int, int]:
        start = offset // self.store.cluster * self.store.cluster
        return start, min(self.store.cluster, self.size - start)

    def _whole_clusters(self, offset: int, length: int) -> tuple[int, int]:
        cluster, end = self.store.cluster, offset + length
        first = -(-offset // cluster) * cluster
        # The end of the disk may cut the last cluster short; it counts as a whole one.
        return first, end if end == self.size else end // cluster * cluster


def joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield extents with equal neighbours joined, without empty ones."""
    length, flags = 0, Extent.DATA
    for more, their_flags in pieces:
        if not more:
            continue
        if length and their_flags != flags:
            yield length, flags
            length = 0
        length, flags = length + more, their_flags
    if length:
        yield length, flags
