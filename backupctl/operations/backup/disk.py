# SPDX-License-Identifier: GPL-2.0-or-later
"""Step 7 for one disk: from its point-in-time view to a layer of the point, with its digest map.

What may have changed is known in one of three ways: from a dirty bitmap (incremental), not at all (scan), or
everything is new (full). All of it passes through the digests: what the layers below hold already is not
stored again.

A differential has several bitmaps, and what changed between its base and the newest point is known twice:
from the older bitmaps, and from the digests of the two points. Both count. The bitmaps alone could not show
that one in between was removed by hand after its point had been pruned.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from backupctl.digests import digest_map
from backupctl.digests.clusters import CLUSTER_BYTES, EffectiveContent
from backupctl.digests.record_table import RecordTable
from backupctl.errors import ReadFailed, moving
from backupctl.images import create
from backupctl.images.qcow2_writer import Qcow2Writer
from backupctl.names import DiskName
from backupctl.operations.backup.activity_log import ActivityLog
from backupctl.operations.backup.plan import DiskPlan
from backupctl.progress import Overall, Reporter
from backupctl.repository.checked_chains import CheckedChains
from backupctl.repository.manifest import DiskEntry
from backupctl.repository.pending_point import PendingPoint
from backupctl.system.threads import Workers
from backupctl.transfer.cluster_map import ClusterMap
from backupctl.transfer.copy import Copy
from backupctl.transfer.dedup_filter import DedupFilter
from backupctl.transfer.extents import DIRTY, ZERO, Extents
from backupctl.transfer.rate_limit import TokenBucket
from backupctl.transfer.reader import NbdReader
from backupctl.transfer.source import Source

DISKS_AT_ONCE = 2 * (os.cpu_count() or 1)
"""Reading one disk waits for its source most of the time."""


class DiskProgress:
    """How far each disk is: noted by the threads that copy, reported by the main thread.

    sizes: of all disks of the run. How much of a disk must be read is known when its copy begins; until then
    it is taken for as large a part as of the other disks, so that the end of all can be foretold.
    """

    def __init__(
        self, reporter: Reporter, sizes: Mapping[DiskName, int], activity: ActivityLog | None = None
    ) -> None:
        self._reporter = reporter
        self._sizes = sizes
        self._activity = activity
        self._overall = Overall()
        self._noted: dict[DiskName, tuple[int, int]] = {}
        self._reported: dict[DiskName, tuple[int, int]] = {}

    def note(self, disk: DiskName, done_bytes: int, total_bytes: int) -> None:
        """So much of a disk is done."""
        self._noted[disk] = (done_bytes, total_bytes)

    def report(self) -> None:
        """Tell the reporter, and whoever asks for the status, what they have not been told."""
        found = self._all()
        for disk, (done_bytes, total_bytes, _) in found.items():
            if self._reported.get(disk) != (done_bytes, total_bytes):
                self._reported[disk] = (done_bytes, total_bytes)
                self._overall.note(disk, done_bytes, total_bytes)
                self._reporter.progress(disk, done_bytes, total_bytes)
        if self._activity is not None and found:
            self._activity.progress(found, self._overall)

    def _all(self) -> dict[DiskName, tuple[int, int, bool]]:
        """Return bytes done and in all of each disk, and whether the latter is an estimate."""
        noted = dict(self._noted)  # threads add to it
        known = sum(self._sizes[disk] for disk in noted)
        if not known:
            return {}
        share = sum(total for _, total in noted.values()) / known
        return {
            disk: (*noted[disk], False) if disk in noted else (0, round(size * share), True)
            for disk, size in self._sizes.items()
        }


@dataclass(frozen=True)
class LayerCopier:
    """Copies the disks of one point, several at once, each in a thread of its own."""

    chains: CheckedChains
    partial: PendingPoint
    limiter: TokenBucket
    workers: Workers
    progress: DiskProgress
    stall_seconds: float

    def copy_disk(self, one: DiskPlan, source: Source, check: Callable[[], None]) -> DiskEntry:
        """Copy what a disk's layer must hold, and flush image and digest map to stable storage.

        check: called at least every 100 ms while bytes move; what it raises ends the copy.
        Raises DamageFound, ReadFailed, WriteFailed, RepositoryError.
        """
        disk = one.disk
        source.use_check(check)
        if source.size != disk.size:
            raise ReadFailed(f"the export of {disk.name} has {source.size} bytes; the disk has {disk.size}")
        below = self.chains.content(one.base, disk.name, disk.size)
        wanted, dirty_bytes = self._wanted(one, source, below)
        table = RecordTable(self.partial.path)
        dedup = DedupFilter(below, table)
        total = wanted.marked_bytes()
        path = self.partial.path / f"{disk.name}.qcow2"
        link = f"../{one.base}/{disk.name}.qcow2" if one.base else None
        with create.new_file(path) as image:
            with (
                moving(disk.name, f"{path.name} in {self.chains.directory.path}"),
                Qcow2Writer(image, disk.size, link) as sink,
            ):
                copied = Copy(
                    NbdReader(source),
                    sink,
                    check=check,
                    progress=lambda done_bytes: self.progress.note(disk.name, done_bytes, total),
                    limiter=self.limiter,
                    stall_seconds=self.stall_seconds,
                    filter_records=dedup,
                    workers=self.workers,
                ).run(wanted.parts())
                sink.finish()
                check()
                map_path = digest_map.path_of(path)
                checksum = digest_map.write_parts(map_path, disk.size, table.count, table.parts)
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
            dirty_bytes=dirty_bytes,
            copied_bytes=copied.copied_bytes,
            zero_bytes=copied.zero_bytes,
            stored_bytes=stored.st_blocks * 512,
            file_bytes=stored.st_size,
            unchanged_bytes=dedup.unchanged_bytes if one.base else 0,
            scanned=one.scanned,
            digests=checksum,
        )

    def _wanted(self, one: DiskPlan, source: Source, below: EffectiveContent) -> tuple[ClusterMap, int]:
        """Return what the layer may have to hold, and how many bytes of it the disk's source names."""
        newest = below
        if one.newest is not None:
            newest = self.chains.content(one.newest, one.disk.name, one.disk.size)
        described_bytes = min(below.described_bytes, newest.described_bytes)
        cluster_map, dirty_bytes = _find_clusters(one, source.statuses(), below, described_bytes)
        if newest is not below:
            cluster_map.mark_differences(below, newest)
        return cluster_map, dirty_bytes


def _find_clusters(
    one: DiskPlan, statuses: Iterable[Extents], below: EffectiveContent, described_bytes: int
) -> tuple[ClusterMap, int]:
    """Return what must be read or zeroed, and how many bytes the dirty bitmap or the allocation map names.

    described_bytes: up to where the earlier points describe the disk; it has grown if it is larger.
    """
    cluster_map, dirty_bytes = ClusterMap(one.disk.size), 0
    for found in statuses:
        zero = (found.flags[0] & ZERO) != 0
        named = (found.flags[1] & DIRTY) != 0 if one.bitmaps else ~zero
        dirty_bytes += int(found.lengths[named].sum())
        cluster_map.zero(found.offsets[zero], found.lengths[zero])
        # The bitmap is clean where a disk has grown (measured:
        # test_a_resized_disk_keeps_its_chain_and_has_the_right_bytes), while a raw disk on a volume that
        # was extended has there whatever the volume held before.
        stops = found.offsets + found.lengths
        read = ~zero & (named | (stops > described_bytes))
        offsets = np.where(named, found.offsets, np.maximum(found.offsets, described_bytes))[read]
        cluster_map.data(offsets, stops[read] - offsets)
    # A disk that was shrunk: its bitmap does not name the cluster that the new end cuts, whose rest is lost.
    if one.bitmaps and one.disk.size % CLUSTER_BYTES:
        cluster_map.data(np.array([one.disk.size - 1]), np.array([1]))
    # A disk that was shrunk and has grown again: its bitmap lost the bits of the old end (measured:
    # test_shrunk_then_grown_over_two_points_shows_no_old_bytes).
    # Zeroes stay marked where the layers below hold data, or that old data would come back at a restore.
    cluster_map.drop_unneeded_zeroes(below)
    return cluster_map, dirty_bytes
