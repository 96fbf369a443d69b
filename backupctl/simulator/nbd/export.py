# SPDX-License-Identifier: GPL-2.0-or-later
"""An exported node: its flags and meta contexts, and its extents in each context."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from backupctl.simulator.dirty import DirtyBitmap
from backupctl.simulator.graph import chain
from backupctl.simulator.nbd.wire import ExportFlag
from backupctl.simulator.nodes import Link, Node, Qcow2Node, joined
from backupctl.simulator.store import State

ALLOCATION = "base:allocation"
DEPTH = "qemu:allocation-depth"
BITMAP = "qemu:dirty-bitmap:"


@dataclass(eq=False)
class Export:
    """What `block-export-add` made.

    link: to the node. depth: whether it offers the allocation depth. clients: connections that chose it.
    """

    id: str
    name: str
    link: Link
    writable: bool = False
    description: str = ""
    depth: bool = False
    bitmaps: tuple[DirtyBitmap, ...] = ()
    clients: int = 0
    shutting_down: bool = False
    _contexts: dict[str, int] = field(default_factory=dict)

    @property
    def node(self) -> Node:
        """The exported node."""
        return self.link.node

    @property
    def contexts(self) -> dict[str, int]:
        """Meta contexts by name, with the number that QEMU gives each."""
        if not self._contexts:
            self._contexts = {ALLOCATION: 0} | ({DEPTH: 1} if self.depth else {})
            self._contexts |= {BITMAP + bitmap.name: 2 + n for n, bitmap in enumerate(self.bitmaps)}
        return self._contexts

    def flags(self, *, structured: bool) -> ExportFlag:
        """Return the transmission flags."""
        found = (
            ExportFlag.HAS_FLAGS
            | ExportFlag.FLUSH
            | ExportFlag.FUA
            | ExportFlag.MULTI_CONN
            | ExportFlag.CACHE
        )
        if structured:
            found |= ExportFlag.DONT_FRAGMENT
        if self.writable:
            return found | ExportFlag.TRIM | ExportFlag.WRITE_ZEROES | ExportFlag.FAST_ZERO
        return found | ExportFlag.READ_ONLY

    def extents(self, context: int, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield (length, flags) of one context over a range. Raises OSError."""
        if context == 0:
            return ((part, int(flags)) for part, flags in joined(self.node.extents(offset, length)))
        if context == 1:
            return _depths(self.node, offset, length)
        return _dirty(self.bitmaps[context - 2], offset, length)


def _dirty(bitmap: DirtyBitmap, offset: int, length: int) -> Iterator[tuple[int, int]]:
    unit, end = bitmap.granularity, offset + length
    for first, count in bitmap.bits.areas(offset // unit, -(-end // unit)):
        start, stop = max(first * unit, offset), min((first + count) * unit, end)
        if start > offset:
            yield start - offset, 0
        yield stop - start, 1
        offset = stop
    if offset < end:
        yield end - offset, 0


def _depths(node: Node, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield the layer of the backing chain that allocates each part: 1 for the topmost, 0 for none."""
    layers = [layer for layer in chain(node) if isinstance(layer, Qcow2Node)]
    end = offset + length
    while offset < end:
        part, depth = end - offset, 0
        for number, layer in enumerate(layers, 1):
            _, here, state = next(layer.store.runs(offset, min(part, max(layer.size - offset, 1))))
            part = min(part, here)
            if state != State.UNALLOCATED:
                depth = number
                break
        yield part, depth
        offset += part
