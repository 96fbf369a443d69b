# SPDX-License-Identifier: GPL-2.0-or-later
"""Step 7 for one disk: from its point-in-time view to a layer of the point, with its digest map.

Three ways to know what may have changed: a bitmap (incremental), nothing (scan), everything (full). All
of it goes through the digests: what the layers below hold already is not stored again.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from backupctl.clusters import CLUSTER_BYTES, Logical
from backupctl.planning import DiskPlan
from backupctl.report import Reporter
from backupctl.repository import chain, digests, images
from backupctl.repository.layout import Partial
from backupctl.repository.manifest import DiskEntry
from backupctl.transfer import extents
from backupctl.transfer.copy import Copy, open_target
from backupctl.transfer.digests import Recorder, vanished
from backupctl.transfer.extents import DIRTY, ZERO, Extent, Status
from backupctl.transfer.limit import TokenBucket
from backupctl.transfer.source import Source


@dataclass(frozen=True)
class Taker:
    """Takes the disks of one point, one after the other.

    check: called at least every 100 ms while bytes move; what it raises ends the copy.
    """

    partial: Partial
    limiter: TokenBucket
    reporter: Reporter
    check: Callable[[], None]
    stall_seconds: float

    def take(self, one: DiskPlan, source: Source) -> DiskEntry:
        """Copy what a disk's layer must hold, and bring image and digest map to the disk.

        Raises DamageFound, ReadFailed, WriteFailed, RepositoryError, and what `check` raises.
        """
        disk = one.disk
        path = self.partial.path / f"{disk.name}.qcow2"
        layers = chain.below(self.partial.folder, one.base, disk.name)
        below = chain.logical(layers, disk.size)
        images.create_layer(path, disk.size, f"../{one.base}/{disk.name}.qcow2" if one.base else None)
        statuses = list(source.statuses())
        wanted = list(_wanted(one, statuses, below))
        recorder = Recorder(below)
        with (
            images.serve((path, *(layer.path for layer in layers)), writable=True) as address,
            open_target(address, images.EXPORT, check=self.check) as target,
        ):
            total = sum(extent.length for extent in wanted)
            copied = Copy(
                source,
                target,
                self.limiter,
                check=self.check,
                progress=lambda done_bytes: self.reporter.progress(disk.name, done_bytes, total),
                stall_seconds=self.stall_seconds,
                sieve=recorder,
            ).run(wanted)
        checksum = digests.write(digests.path_of(path), disk.size, recorder.records())
        stored = path.stat()
        return DiskEntry(
            name=disk.name,
            kind=one.kind,
            parent=one.base,
            size=disk.size,
            node=disk.node,
            format=disk.driver,
            persistent=disk.persistent,
            reason=one.reason,
            dirty_bytes=sum(status.length for status in statuses if _named(one, status)),
            copied_bytes=copied.copied_bytes,
            zero_bytes=copied.zero_bytes,
            stored_bytes=stored.st_blocks * 512,
            file_bytes=stored.st_size,
            unchanged_bytes=recorder.unchanged_bytes if one.base else 0,
            scanned=one.scanned,
            digests=checksum,
        )


def _named(one: DiskPlan, status: Status) -> bool:
    """Whether a range is one that bitmap or allocation map name."""
    return bool(status.flags[1] & DIRTY) if one.bitmaps else not status.flags[0] & ZERO


def _wanted(one: DiskPlan, statuses: Iterable[Status], below: Logical) -> Iterator[Extent]:
    """Yield what must be looked at: what is named, and zeroes where the layers below hold something else.

    Zeroes that nobody named are there when a disk was shrunk and grew again: its bitmap lost the bits of
    the end that went, and the old data would come back (measured). Nor does it name the cluster that a
    new end cuts, whose rest was lost.
    """
    looked_at = [
        Extent(status.offset, status.length, bool(status.flags[0] & ZERO))
        for status in statuses
        if _named(one, status) or status.flags[0] & ZERO
    ]
    if one.bitmaps and (short := one.disk.size % CLUSTER_BYTES):
        looked_at.append(Extent(one.disk.size - short, short, zero=False))
    for extent in extents.aligned(looked_at, one.disk.size, CLUSTER_BYTES):
        if extent.zero:
            yield from vanished(extent, below)
        else:
            yield extent
