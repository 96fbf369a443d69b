# SPDX-License-Identifier: GPL-2.0-or-later
"""Dirty bitmaps: a hierarchical bitmap with a name, a granularity and the states that QEMU gives it."""

from dataclasses import dataclass, field

from backupctl.simulator.bitmap import HierarchicalBitmap
from backupctl.simulator.failure import CommandError

MAX_NAME_BYTES = 1023


@dataclass
class DirtyBitmap:
    """A node's bitmap.

    size: of the node, in bytes. granularity: bytes per bit. recording: guest writes are noted.
    persistent: kept by a clean end of QEMU. busy: in use by an export or an action. inconsistent: QEMU died
    while it had been loaded; it can only be removed. read_only: it is stored, and its node
    closed for writing.
    """

    name: str
    size: int
    granularity: int
    recording: bool = True
    persistent: bool = False
    inconsistent: bool = False
    read_only: bool = False
    busy: int = 0
    bits: HierarchicalBitmap = field(init=False)

    def __post_init__(self) -> None:
        self.bits = HierarchicalBitmap(self._bits_for(self.size))

    def mark(self, offset: int, length: int) -> None:
        """Note that a range of bytes has changed."""
        first, last = offset // self.granularity, (offset + length - 1) // self.granularity
        self.bits.set(first, last - first + 1)

    def resize(self, size: int) -> None:
        """Follow the node's new size."""
        self.size = size
        self.bits.resize(self._bits_for(size))

    def merge(self, source: "DirtyBitmap") -> None:
        """Add another bitmap's dirty ranges. Raises CommandError if it is of another size."""
        if source.size != self.size:
            raise CommandError(
                f"Bitmaps are of different sizes (destination size is {self.size}, "
                f"source size is {source.size}) and can't be merged"
            )
        if source.granularity == self.granularity:
            self.bits.merge(source.bits)
            return
        for start, length in source.bits.areas():
            begin = start * source.granularity
            self.mark(begin, min(length * source.granularity, self.size - begin))

    def check(self, *, inconsistent_too: bool = False, read_only_too: bool = False) -> None:
        """Raise CommandError unless the bitmap may be used."""
        if self.busy:
            raise CommandError(
                f"Bitmap '{self.name}' is currently in use by another operation and cannot be used"
            )
        if self.read_only and not read_only_too:
            raise CommandError(f"Bitmap '{self.name}' is readonly and cannot be modified")
        if self.inconsistent and not inconsistent_too:
            raise CommandError(f"Bitmap '{self.name}' is inconsistent and cannot be used")

    def describe(self) -> dict[str, object]:
        """Return it as QEMU describes it."""
        described: dict[str, object] = {"name": self.name} if self.name else {}
        described |= {"recording": self.recording and not self.inconsistent, "persistent": self.persistent}
        described |= {"busy": bool(self.busy), "granularity": self.granularity}
        described["count"] = self.bits.count() * self.granularity
        return described | ({"inconsistent": True} if self.inconsistent else {})

    def _bits_for(self, size: int) -> int:
        return -(-size // self.granularity)


def check_granularity(granularity: int) -> None:
    """Raise CommandError unless it is a power of two from 512 up."""
    if granularity < 512 or granularity & (granularity - 1):
        raise CommandError("Granularity must be power of 2 and at least 512")


def check_name(name: str) -> None:
    """Raise CommandError for an invalid name."""
    if not name:
        raise CommandError("Bitmap name cannot be empty")
