# SPDX-License-Identifier: GPL-2.0-or-later
"""Dropping points that no rule holds any more, without losing a byte of those that stay.

::

    1 decide   which points go                                        (retention)
    2 retire   each of them is marked: from here on it is no point
    3 clear    nothing stands on a retired point: its folder goes
               one layer stands on it: that one is merged into it     (merge)
               several do (differentials): it waits until one is left

Step 3 looks at what lies there and at nothing else, so after a death anywhere the next prune goes on
where this one ended. The VM's lock is taken for each step of it: a backup need not wait for all.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

from backupctl.cancel import Cancellation
from backupctl.digests import clusters
from backupctl.digests.clusters import Records
from backupctl.errors import BackupctlError, DamageFound, Failed, Locked, NoSuchPoint, WriteFailed, moving
from backupctl.events import StepStarted
from backupctl.events.prune import LeftForNextPrune, PointDropped
from backupctl.images import nbd_server
from backupctl.images.open_image import OpenImage
from backupctl.names import DiskName, PointId
from backupctl.operations.prune import retention
from backupctl.operations.prune.retention import Decision, RetentionCandidate, Rules
from backupctl.progress import Reporter
from backupctl.repository import audit, chain, history, markers, merge
from backupctl.repository.chain import Layer
from backupctl.repository.history import Deed
from backupctl.repository.manifest import DiskEntry
from backupctl.repository.merge import Merge
from backupctl.repository.pending_point import PendingPoint
from backupctl.repository.point import Point
from backupctl.repository.vm_folder import VmFolder
from backupctl.sizes import Range
from backupctl.system import locks, safe_open
from backupctl.transfer import copy
from backupctl.transfer.copy import Copy, open_target
from backupctl.transfer.extents import Extent
from backupctl.transfer.rate_limit import TokenBucket
from backupctl.transfer.source import Source
from backupctl.transfer.verify_filter import VerifyFilter
from backupctl.vm.filling import Filling

_PATIENCE_SECONDS = 1.0
_CONNECTIONS = 2
_WINDOW_RECORDS = 1 << 16


@dataclass(frozen=True)
class MergedLayer:
    """A layer that took in the one below. point: whose layer it is. written_bytes: what that cost."""

    point: PointId
    disk: DiskName
    below: PointId
    written_bytes: int


@dataclass(frozen=True)
class PruneReport:
    """What a prune came to.

    decisions: for each point that there was. dropped: points that are none any more. removed: those whose
    folders are gone too. left: what the next prune has to do, and why. long_chains: disks of kept points
    that stand on more layers than was asked for.
    """

    decisions: tuple[Decision, ...]
    dropped: tuple[PointId, ...] = ()
    removed: tuple[PointId, ...] = ()
    merged: tuple[MergedLayer, ...] = ()
    left: tuple[str, ...] = ()
    long_chains: tuple[str, ...] = ()
    damage: tuple[str, ...] = ()


def plan(folder: VmFolder, rules: Rules) -> tuple[Decision, ...]:
    """Decide for each point of a VM. Raises UsageError, NoSuchPoint, DamageFound, RepositoryError."""
    _refuse_unknown(folder)
    points = _all(folder)
    held = [
        RetentionCandidate(
            point.id,
            point.manifest.started,
            tuple(entry.name for entry in point.manifest.disks),
            point.protected,
        )
        for point in points
        if not markers.has(point.path, markers.RETIRED)
    ]
    return retention.decide(held, rules, datetime.now(UTC))


def prune(
    folder: VmFolder, rules: Rules, reporter: Reporter, stop: Cancellation, max_chain: int | None = None
) -> PruneReport:
    """Drop what no rule holds, and finish what an earlier prune began.

    What can't be done now (a point is being read, a layer to be merged is damaged) is left, and told in
    the report. Raises UsageError, NoSuchPoint, Locked, DamageFound if a manifest is damaged: then nobody
    can tell what stands on what. Further Interrupted, WriteFailed, ReadFailed, RepositoryError.
    """
    _refuse_unknown(folder)
    work = _Work(folder, reporter, stop, Filling(folder.path))
    try:
        with folder.lock():
            audit.reconcile(folder)
            decisions = plan(folder, rules)
            work.sweep()
            for point in retention.dropped(decisions):
                work.retire(point)
        work.clear()
    except Failed as err:
        raise err.add(
            state="every point that stays is whole; a point that was dropped stays dropped",
            hint="the same prune again goes on where it ended",
            next_command=f"backupctl prune {folder.name}",
        ) from err
    return PruneReport(
        decisions,
        tuple(work.dropped),
        tuple(work.removed),
        tuple(work.merged),
        tuple(work.left),
        long_chains(folder, max_chain),
        tuple(work.damage),
    )


def protect(folder: VmFolder, wanted: str) -> PointId:
    """Have prune never drop a point, until `unprotect`. Raises NoSuchPoint, Locked, RepositoryError."""
    point = folder.point(wanted)
    try:
        # Prune wants the folder for itself to retire the point, so it can't do that in between.
        with locks.folder(point.path, _PATIENCE_SECONDS, shared=True):
            markers.put(folder.point(point.id).path, markers.PROTECTED)
    except FileNotFoundError as err:
        raise NoSuchPoint(f"a prune has just removed {point.id} of {folder.name}") from err
    return point.id


def unprotect(folder: VmFolder, wanted: str) -> PointId:
    """Take a point's protection away. Raises NoSuchPoint, RepositoryError."""
    point = folder.point(wanted)
    markers.take_away(point.path, markers.PROTECTED)
    return point.id


def long_chains(folder: VmFolder, most: int | None) -> tuple[str, ...]:
    """Name the disks of points that stand on more than so many layers."""
    if most is None:
        return ()
    found = []
    for point in folder.points():
        for entry in point.manifest.disks:
            length = chain.length(folder, point, entry)
            if length > most:
                found.append(f"{entry.name} of {point.id}: {length} layers")
    return tuple(found)


@dataclass
class _Work:
    """Steps 2 and 3, and what they came to.

    skipped: merges that can't be done now, by the upper point and disk. read: points that can't go now.
    """

    folder: VmFolder
    reporter: Reporter
    stop: Cancellation
    filling: Filling
    dropped: list[PointId] = field(default_factory=list)
    removed: list[PointId] = field(default_factory=list)
    merged: list[MergedLayer] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    skipped: set[tuple[PointId, str]] = field(default_factory=set)
    read: set[PointId] = field(default_factory=set)

    def retire(self, point: PointId) -> None:
        """Do step 2, unless somebody reads the point or has just protected it."""
        path = self.folder.path / point
        try:
            with locks.folder(path, _PATIENCE_SECONDS):
                if markers.has(path, markers.PROTECTED):
                    return
                markers.put(path, markers.RETIRED)
                history.record(self.folder.path, Deed("dropped", point))
        except Locked:
            self._leave(f"{point} is being read, or stands below a point that is: it is not dropped now")
            return
        self.dropped.append(point)
        self.reporter.event(PointDropped(point))

    def sweep(self) -> None:
        """Remove folders in whose removal a prune died; a dead run's are for `recover` to look at first."""
        for leftover in self.folder.pending_points():
            if markers.has(leftover.path, markers.RETIRED):
                leftover.drop()

    def clear(self) -> None:
        """Do step 3, one layer after the other, until nothing is left that can be done now."""
        while True:
            self.stop.check()
            try:
                with self.folder.lock():
                    step = self._next()
                    if step is None:
                        return
                    step()
            except Locked as err:
                self._leave(f"{err.message}; the next prune goes on")
                return

    def _next(self) -> Callable[[], None] | None:
        """Return what to do next. The oldest first: each layer is then written once."""
        points = _all(self.folder)
        for point in points:
            for entry in point.manifest.disks:
                if entry.merged and (point.id, entry.name) not in self.skipped:
                    return partial(self._switch, point, entry)
        standing = _standing(points)
        retired = [point for point in points if markers.has(point.path, markers.RETIRED)]
        for point in retired:
            needed = any((point.id, entry.name) in standing for entry in point.manifest.disks)
            if not needed and point.id not in self.read:
                return partial(self._remove, points, point)
        for point in retired:
            for entry in point.manifest.disks:
                upper = standing.get((point.id, entry.name), [])
                if len(upper) != 1 or (upper[0].id, entry.name) in self.skipped:
                    continue
                above = standing.get((upper[0].id, entry.name), [])
                if not merge.unfinished(point, upper[0], above, entry.name):
                    return partial(self._merge, point, upper[0], entry.name)
        return None

    def _remove(self, points: Sequence[Point], point: Point) -> None:
        try:
            with locks.folder(point.path, _PATIENCE_SECONDS):
                merge.detach_from(points, point)
                leftover = PendingPoint(self.folder.path, self.folder.name, point.id)
                leftover.uncommit()
        except Locked as err:
            self.read.add(point.id)
            self._leave(f"{point.id} is dropped, but its folder stays for now: {err.message}")
            return
        leftover.drop()  # a death in the middle of it leaves what every run's recovery removes
        self.removed.append(point.id)

    def _merge(self, lower: Point, upper: Point, disk: DiskName) -> None:
        """Do steps 1 to 3 of a merge; the switch comes next."""
        self.reporter.event(StepStarted(f"merge {disk} of {upper.id} into {lower.id}"))
        try:
            one = Merge.of(upper, chain.layers(self.folder, upper, disk))
            with ExitStack() as held:
                with locks.folder(lower.path, _PATIENCE_SECONDS):
                    # Nobody reads it now, and it is no point any more: who comes from here on reads it
                    # through the layer on it, which masks all that is going to be written.
                    image = held.enter_context(one.mark())
                try:
                    written_bytes = self._pour(one, image)
                except BackupctlError:
                    one.abandon()  # or a want of room would last until the next prune, and keep backups out
                    raise
                one.describe(image)
        except Locked as err:
            self._skip(upper, disk, f"{disk} of {upper.id} is not merged: {err.message}")
        except DamageFound as err:
            self.damage.append(err.message)
            self._skip(upper, disk, f"{disk} of {upper.id} is not merged: {err.message}")
        else:
            self.merged.append(MergedLayer(upper.id, disk, lower.id, written_bytes))

    def _switch(self, point: Point, entry: DiskEntry) -> None:
        try:
            with ExitStack() as held:
                held.enter_context(locks.folder(point.path, _PATIENCE_SECONDS))
                with suppress(FileNotFoundError):  # gone already: a death came after the image's move
                    below = self.folder.path / str(entry.parent)
                    held.enter_context(locks.folder(below, _PATIENCE_SECONDS))
                done = merge.swap_images(point, entry)
        except Locked as err:
            self._skip(point, entry.name, f"{entry.name} of {point.id} is not exchanged: {err.message}")
            return
        after = done.manifest.disk(entry.name)
        assert after is not None
        Layer.of(done, after).check()

    def _pour(self, one: Merge, image: OpenImage) -> int:
        """Write what the merged image lacks, each cluster compared with its digest; returns how much."""
        read = one.layers[:1] if one.in_place else one.layers
        prover = VerifyFilter(
            chain.effective_content(read, one.size), partial(_refuse_damaged, one), zeroes=True
        )
        total = sum(len(part) for part in one.written()) * clusters.CLUSTER_BYTES
        with (
            moving(str(one.upper.path), str(one.image)),
            chain.opened(read) as opened,
            nbd_server.serve(opened) as served,
            closing(Source.connect([served] * _CONNECTIONS, nbd_server.EXPORT)) as source,
            nbd_server.serve((image,), writable=True, in_use=one.in_place) as address,
            open_target(
                address, nbd_server.EXPORT, check=self._look, flush_seconds=copy.DISK_SECONDS
            ) as target,
        ):
            copied = Copy(
                source,
                target,
                TokenBucket(None),
                check=self._look,
                progress=lambda done: self.reporter.progress(one.upper.entry.name, done, total),
                sieve=prover,
                unreadable=lambda extent: self._refuse_lost(read, one, extent),
            ).run(extent for part in one.written() for extent in _extents(part, one.size))
            cut = one.cut_cluster(image) if one.in_place else None
            if cut is not None:
                blank = Extent(*cut, zero=True)
                Copy(source, target, TokenBucket(None), self.stop.check, lambda _done: None).run([blank])
        return copied.copied_bytes + copied.zero_bytes

    def _look(self) -> None:
        """Raise what must end a merge. What is removed, and not merged, takes no room."""
        self.stop.check()
        self.filling.check(WriteFailed)

    def _refuse_lost(self, read: Sequence[Layer], one: Merge, extent: Extent) -> None:
        for layer in read:
            safe_open.prove_readable(layer.path, self.stop.check)
        _refuse_damaged(one, [(extent.offset, extent.length)])

    def _skip(self, upper: Point, disk: str, why: str) -> None:
        self.skipped.add((upper.id, disk))
        self._leave(why)

    def _leave(self, why: str) -> None:
        self.left.append(why)
        self.reporter.event(LeftForNextPrune(why))


def _refuse_unknown(folder: VmFolder) -> None:
    if not folder.exists():  # its lock would make it
        raise NoSuchPoint(
            f"nothing of the VM {folder.name} is in {folder.path.parent}",
            state="nothing was touched",
            next_command="backupctl list",
        )


def _all(folder: VmFolder) -> list[Point]:
    """Return all points, retired or not, oldest first. Raises DamageFound if one can't be read."""
    survey, retired = folder.survey(), folder.retired()
    for path, err in (*survey.damaged, *retired.damaged):
        raise DamageFound(
            f"{err.message}; nothing is pruned while it is unknown what {path.name} stands on",
            state="nothing was touched",
            next_command=f"backupctl verify {folder.name}",
        ) from err
    return sorted((*survey.points, *retired.points), key=lambda point: point.id)


def _standing(points: Sequence[Point]) -> dict[tuple[PointId | None, str], list[Point]]:
    """Return for each layer the points whose layers stand on it.

    Also where only the manifest still says so: readers follow it to all that they must hold.
    """
    found: dict[tuple[PointId | None, str], list[Point]] = {}
    for point in points:
        for entry in point.manifest.disks:
            for parent in {entry.parent, Layer.of(point, entry).entry.parent}:
                found.setdefault((parent, entry.name), []).append(point)
    return found


def _refuse_damaged(one: Merge, ranges: Sequence[Range]) -> None:
    damaged = ", ".join(f"{offset}-{offset + length - 1}" for offset, length in ranges[:4])
    layers = " or ".join(str(layer.path) for layer in one.layers[: 1 if one.in_place else 2])
    raise DamageFound(
        f"the layer {layers} is damaged (bytes {damaged} are not what was read from the VM), "
        "and is not merged"
    )


def _extents(records: Records, size: int) -> Iterator[Extent]:
    """Yield what records name: data to be read, and zeroes."""
    for first in range(0, len(records), _WINDOW_RECORDS):
        part = records[first : first + _WINDOW_RECORDS]
        zero = clusters.is_zero(part)
        for flag in (False, True):
            for offset, length in clusters.ranges(part["cluster"][zero == flag], size):
                yield Extent(offset, length, zero=flag)
