# SPDX-License-Identifier: GPL-2.0-or-later
"""Step 7 for one disk: from its point-in-time view to a layer of the point, with its digest map.

Three ways to know what may have changed: a bitmap (incremental), nothing (scan), everything (full). All
of it goes through the digests: what the layers below hold already is not stored again.

A differential has several bitmaps, and what changed between its base and the newest point is known twice:
to the older ones of them, and to the digests of the two points. Both count. Of the bitmaps alone nobody
could tell that one in between was removed by hand, whose point was pruned since.
"""

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass

from backupctl.digests import digest_map
from backupctl.digests.clusters import CLUSTER_BYTES, EffectiveContent
from backupctl.errors import ReadFailed, moving
from backupctl.images import create, nbd_server
from backupctl.operations.backup.plan import DiskPlan
from backupctl.progress import Reporter
from backupctl.repository import chain
from backupctl.repository.manifest import DiskEntry
from backupctl.repository.pending_point import PendingPoint
from backupctl.repository.vm_folder import VmFolder
from backupctl.transfer.cluster_map import ClusterMap
from backupctl.transfer.copy import Copy, open_target
from backupctl.transfer.dedup_filter import DedupFilter
from backupctl.transfer.extents import DIRTY, ZERO, Status
from backupctl.transfer.rate_limit import TokenBucket
from backupctl.transfer.source import Source


@dataclass(frozen=True)
class LayerCopier:
    """Copies the disks of one point, one after the other.

    check: called at least every 100 ms while bytes move; what it raises ends the copy.
    """

    folder: VmFolder
    partial: PendingPoint
    limiter: TokenBucket
    reporter: Reporter
    check: Callable[[], None]
    stall_seconds: float

    def copy_disk(self, one: DiskPlan, source: Source) -> DiskEntry:
        """Copy what a disk's layer must hold, and flush image and digest map to stable storage.

        Raises DamageFound, ReadFailed, WriteFailed, RepositoryError, and what `check` raises.
        """
        disk = one.disk
        path = self.partial.path / f"{disk.name}.qcow2"
        layers = chain.below(self.folder, one.base, disk.name)
        below = chain.effective_content(layers, disk.size)
        if source.size != disk.size:
            raise ReadFailed(f"the export of {disk.name} has {source.size} bytes; the disk has {disk.size}")
        newest = below
        if one.newest is not None:
            newest = chain.effective_content(chain.below(self.folder, one.newest, disk.name), disk.size)
        known_bytes = min(below.described_bytes, newest.described_bytes)
        marks, named_bytes = _look(one, source.statuses(), below, known_bytes)
        if newest is not below:
            marks.mark_differences(below, newest)
        total = marks.marked_bytes()
        link = f"../{one.base}/{disk.name}.qcow2" if one.base else None
        with create.new_layer(path, disk.size, link) as image:
            with (
                moving(disk.name, f"{path.name} in {self.folder.path}"),
                closing(DedupFilter(below, self.partial.path)) as recorder,
                chain.opened(layers) as opened,
                nbd_server.serve((image, *opened), writable=True) as address,
                open_target(address, nbd_server.EXPORT, check=self.check) as target,
            ):
                copied = Copy(
                    source,
                    target,
                    self.limiter,
                    check=self.check,
                    progress=lambda done_bytes: self.reporter.progress(disk.name, done_bytes, total),
                    stall_seconds=self.stall_seconds,
                    sieve=recorder,
                ).run(marks.extents())
                map_path, count = digest_map.path_of(path), recorder.count()
                checksum = digest_map.write_parts(map_path, disk.size, count, recorder.parts)
            stored = image.stat()
        return DiskEntry(
            name=disk.name,
            kind=one.kind,
            parent=one.base,
            size=disk.size,
            node=disk.node,
            format=disk.driver,
            persistent=disk.persistent,
            reason=one.reason,
            dirty_bytes=named_bytes,
            copied_bytes=copied.copied_bytes,
            zero_bytes=copied.zero_bytes,
            stored_bytes=stored.st_blocks * 512,
            file_bytes=stored.st_size,
            unchanged_bytes=recorder.unchanged_bytes if one.base else 0,
            scanned=one.scanned,
            digests=checksum,
        )


def _look(
    one: DiskPlan, statuses: Iterable[Status], below: EffectiveContent, known_bytes: int
) -> tuple[ClusterMap, int]:
    """Return what must be looked at, and how many bytes bitmap or allocation map name.

    known_bytes: up to where the earlier points tell of the disk. Behind it a disk has grown: its bitmap is
    clean there (measured), and a raw disk on a volume that was extended has whatever lay there before.

    Besides what is named these are zeroes where the layers below hold something else. They are there
    when a disk was shrunk and grew again: its bitmap lost the bits of the end that went, and the old data
    would come back (measured). Nor does it name the cluster that a new end cuts, whose rest was lost.
    """
    marks, named_bytes = ClusterMap(one.disk.size), 0
    for status in statuses:
        zero, end = bool(status.flags[0] & ZERO), status.offset + status.length
        named = bool(status.flags[1] & DIRTY) if one.bitmaps else not zero
        named_bytes += status.length if named else 0
        if zero:
            marks.zero(status.offset, status.length)
        elif named or end > known_bytes:
            offset = status.offset if named else max(status.offset, known_bytes)
            marks.data(offset, end - offset)
    if one.bitmaps and one.disk.size % CLUSTER_BYTES:
        marks.data(one.disk.size - 1, 1)
    marks.drop_unneeded_zeroes(below)
    return marks, named_bytes
