# SPDX-License-Identifier: GPL-2.0-or-later
"""Proving what is stored: each layer is read back once and compared with its digest map.

::

    for every VM     manifests, leftovers
    for every layer  its links, its size, its digest map, its own tables          ─┐ `fast` ends here
                     what it stores and what its digest map names: the same         ─┘
                     every cluster that it stores: the bytes that were read from the VM

Damage is what bytes say, and a file that is missing. What the operating system lets nobody read (no rights,
an error of the disk or the network) is told as not checked.

A layer is read without those below it, so each byte is read once however many points stand on it. What is
found damaged is then told as the user sees it: which bytes of which disks at which points.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from backupctl.cancel import Cancellation
from backupctl.digests import clusters
from backupctl.digests.clusters import Records
from backupctl.digests.digest_map import DigestMap
from backupctl.errors import DamageFound, Locked, NoSuchPoint, RepositoryUnreadable
from backupctl.events import StepStarted
from backupctl.events.repository import DamageDetected, NotChecked, NothingToVerify
from backupctl.names import DiskName, PointId, VmName
from backupctl.operations.verify.impact import Affected, Impact
from backupctl.operations.verify.layer import Kind, LayerCheck, Problem, VerifyScope
from backupctl.progress import Reporter
from backupctl.repository import audit, history, markers
from backupctl.repository.chain import Layer
from backupctl.repository.manifest import DiskEntry
from backupctl.repository.point import Point
from backupctl.repository.repository import Repository
from backupctl.repository.vm_folder import ScannedPoints, VmFolder
from backupctl.sizes import Range
from backupctl.system import locks, qemu_tools, safe_open

_PATIENCE_SECONDS = 30.0
_LOOKS = 5


@dataclass(frozen=True)
class Damage:
    """One thing found wrong.

    kind: what it is in (data: the stored bytes). path: the file or folder. disk: "" if it is not of one.
    ranges: of the disk, damaged in this layer. touches: what of which points that spoils.
    """

    vm: VmName
    kind: Kind
    path: Path
    disk: str
    message: str
    ranges: tuple[Range, ...]
    touches: tuple[Affected, ...]


@dataclass(frozen=True)
class Unchecked:
    """Something that can't be read, so that nobody knows whether it is damaged. disk: "" if not of one."""

    vm: VmName
    path: Path
    disk: str
    message: str


@dataclass(frozen=True)
class VerifyReport:
    """What a verification came to. read_bytes: of data, compared. notes: to know, but no damage."""

    vms: tuple[VmName, ...]
    points: int
    layers: int
    read_bytes: int
    damage: tuple[Damage, ...]
    notes: tuple[str, ...]
    seconds: float
    unchecked: tuple[Unchecked, ...] = ()


def verify(
    repository: Repository,
    vm: VmName | None,
    point: str | None,
    depth: VerifyScope,
    reporter: Reporter,
    stop: Cancellation,
) -> VerifyReport:
    """Check the whole repository, one VM (`vm`), or what one point of it needs. Changes nothing.

    Damage is in the report, and what can't be read. Raises NoSuchPoint, DamageFound or RepositoryUnreadable
    if the point asked for has no manifest to start from, RepositoryError, Interrupted.
    """
    begun = time.monotonic()
    qemu_tools.require_tools()
    folders = [repository.vm(name) for name in (repository.vms() if vm is None else [vm])]
    if vm is not None and not folders[0].exists():
        raise NoSuchPoint(
            f"nothing of the VM {vm} is in {repository.path}",
            state="nothing was touched",
            next_command="backupctl list",
        )
    works = [_Work(folder, depth, reporter, stop) for folder in folders]
    for work in works:
        try:
            work.run(point)
        except RepositoryUnreadable as err:
            if vm is not None:
                raise
            work.cannot_check(work.folder.path, "", err)
    if not any(work.points or work.damage for work in works):
        _refuse_empty(repository, vm)
        reporter.event(NothingToVerify(repository.path))
    return VerifyReport(
        vms=tuple(work.folder.name for work in works),
        points=sum(work.points for work in works),
        layers=sum(work.layers for work in works),
        read_bytes=sum(work.read_bytes for work in works),
        damage=tuple(found for work in works for found in work.damage),
        notes=tuple(note for work in works for note in work.notes),
        seconds=time.monotonic() - begun,
        unchecked=tuple(found for work in works for found in work.unchecked),
    )


def _refuse_empty(repository: Repository, vm: VmName | None) -> None:
    """Raise NoSuchPoint if a VM was named that has no point: it has no backup."""
    if vm is not None:
        raise NoSuchPoint(
            f"there is no recovery point of {vm} in {repository.path}",
            state="nothing was touched",
            next_command=f"backupctl full {vm}",
        )


class _Work:
    """The verification of one VM."""

    def __init__(self, folder: VmFolder, depth: VerifyScope, reporter: Reporter, stop: Cancellation) -> None:
        self.folder = folder
        self.damage: list[Damage] = []
        self.notes: list[str] = []
        self.unchecked: list[Unchecked] = []
        self.points = self.layers = self.read_bytes = 0
        self._depth = depth
        self._reporter = reporter
        self._stop = stop
        self._random = np.random.default_rng(depth.seed)
        self._maps: dict[tuple[PointId, str, str], DigestMap | DamageFound | RepositoryUnreadable] = {}

    def run(self, wanted: str | None) -> None:
        """Check all of the VM's points, or what one needs."""
        self._reporter.event(StepStarted(f"verify {self.folder.name}"))
        chosen = None if wanted is None else _as_it_is(self._point(wanted))
        survey, retired = self._survey()
        self._known = {point.id: _as_it_is(point) for point in (*survey.points, *retired.points)}
        self._dark = {PointId(path.name): err for path, err in (*survey.unreadable, *retired.unreadable)}
        hidden = {point.id for point in retired.points}
        standing = _standing(self._known.values())
        self._needless = {
            (point.id, entry.name)
            for point in retired.points
            for entry in point.manifest.disks
            if (point.id, entry.name) not in standing
        }
        self._reach = Impact(self._known.values(), self._records, hidden)
        layers = self._chosen(chosen)
        self.points = len(survey.points) if chosen is None else 1
        self.layers = len(layers)
        if chosen is None:
            for path, err in (*survey.damaged, *retired.damaged):
                self._found("manifest", path, "", err.message, self._reach.standing_on(PointId(path.name)))
            self._compare_with_history()
            for name, unread in self._dark.items():
                self.cannot_check(self.folder.path / name, "", unread)
            self.notes += [f"{partial.path}: an unfinished point" for partial in self.folder.pending_points()]
        self._missing_parents(layers)
        self._prove_all(layers)

    def _point(self, wanted: str) -> Point:
        try:
            return self.folder.point(wanted)
        except NoSuchPoint:
            audit.refuse_missing(self.folder, wanted)
            raise

    def _compare_with_history(self) -> None:
        for problem in audit.problems(self.folder):
            path = self.folder.path / (problem.point or history.FILE_NAME)
            self._found("history", path, "", problem.message, ())

    def _survey(self) -> tuple[ScannedPoints, ScannedPoints]:
        """Look at all points, the retired ones too, again if a prune seems to have been at work meanwhile."""
        found = self.folder.survey(bear=True), self.folder.retired(bear=True)
        for _ in range(_LOOKS):
            again = self.folder.survey(bear=True), self.folder.retired(bear=True)
            if [(each.points, [path for path, _ in each.damaged]) for each in again] == [
                (each.points, [path for path, _ in each.damaged]) for each in found
            ]:
                break
            found = again
        return found

    def _chosen(self, point: Point | None) -> list[tuple[Point, DiskEntry]]:
        if point is None:
            return [
                (one, entry)
                for one in self._known.values()
                for entry in one.manifest.disks
                if (one.id, entry.name) not in self._needless  # merged already; the next prune drops it
            ]
        return [layer for entry in point.manifest.disks for layer in self._below(point, entry)]

    def _below(self, point: Point, entry: DiskEntry) -> Iterator[tuple[Point, DiskEntry]]:
        """Yield a layer and all below it, as far as there are any."""
        at: Point | None = point
        held: DiskEntry | None = entry
        while at is not None and held is not None:
            yield at, held
            at = self._known.get(held.parent) if held.parent else None
            held = at.manifest.disk(entry.name) if at else None

    def _missing_parents(self, layers: Iterable[tuple[Point, DiskEntry]]) -> None:
        for point, entry in layers:
            below = self._known.get(entry.parent) if entry.parent else None
            if entry.parent is None or (below is not None and below.manifest.disk(entry.name)):
                continue
            path = self.folder.path / entry.parent
            if unread := self._dark.get(entry.parent):
                self.cannot_check(path, "", unread)
                continue
            if below is not None:
                why = "does not hold that disk"
            elif safe_open.there(path):
                why = "is damaged"
            else:
                why = "is missing"
            text = f"{point.path / entry.name} stands on the point {entry.parent}, which {why}"
            self._found("chain", path, entry.name, text, self._reach.whole(point.id, entry.name))

    def _prove_all(self, layers: list[tuple[Point, DiskEntry]]) -> None:
        total = sum(self._data_bytes(point, entry) for point, entry in layers)
        bar = DiskName(self.folder.name)  # one for all layers: there may be thousands
        done = 0
        for point, entry in layers:
            self._stop.check()
            before = done

            def progress(done_bytes: int, before: int = before) -> None:
                self._reporter.progress(bar, before + done_bytes, total)

            try:
                with self._held(point) as now:
                    held = now.manifest.disk(entry.name) if now else None
                    if now and held and not self._merged_meanwhile(now, held):
                        self._prove(now, held, progress)
            except RepositoryUnreadable as err:
                self.cannot_check(point.path, entry.name, err)
            done += self._data_bytes(point, entry)

    def _merged_meanwhile(self, point: Point, entry: DiskEntry) -> bool:
        """Whether a layer's image has gone into the one that stood on it: that one is the layer now."""
        if safe_open.there(_layer(point, entry).path) or not markers.has(point.path, markers.RETIRED):
            return False
        survey, retired = self._survey()
        return (point.id, entry.name) not in _standing(map(_as_it_is, (*survey.points, *retired.points)))

    def _prove(self, point: Point, entry: DiskEntry, progress: Callable[[int], None]) -> None:
        merging = markers.has(point.path, markers.merging(entry.name))
        proof = LayerCheck(
            _layer(point, entry),
            self._map(point, entry),
            self._depth,
            self._random,
            self._stop,
            merging=merging,
        )
        proof.run(progress)
        self.notes += proof.notes
        self.read_bytes += proof.read_bytes
        for flaw in proof.flaws:
            self._tell(point, entry, flaw, merging=merging)
        for why in proof.unchecked:
            self.cannot_check(_layer(point, entry).path, entry.name, RepositoryUnreadable(why))

    def _tell(self, point: Point, entry: DiskEntry, flaw: Problem, *, merging: bool) -> None:
        """Say of a layer's flaw whom it touches."""
        if flaw.clusters is None:
            whole = self._reach.whole(point.id, entry.name)
            self._found(flaw.kind, flaw.path, entry.name, flaw.message, whole)
            return
        touches = self._reach.part(point.id, entry.name, flaw.clusters)
        if merging and flaw.kind == "data" and not touches:
            return  # it is being overwritten, below the very layer that it gets this from
        ranges = tuple(clusters.ranges(flaw.clusters, entry.size))
        self._found(flaw.kind, flaw.path, entry.name, flaw.message, touches, ranges)

    @contextmanager
    def _held(self, point: Point) -> Iterator[Point | None]:
        """Keep prune off a point's layers; gives the point as it is now, None if it has been pruned."""
        now = None
        with ExitStack() as held:
            try:
                held.enter_context(locks.folder(point.path, _PATIENCE_SECONDS, shared=True))
                now = _as_it_is(self.folder.point_or_retired(point.id))
            except (FileNotFoundError, NoSuchPoint):
                self.notes.append(f"{point.path}: pruned meanwhile")
            except Locked:
                self.notes.append(f"{point.path}: not verified, since a prune is changing it")
            yield now

    def _data_bytes(self, point: Point, entry: DiskEntry) -> int:
        records = self._records(point, entry)
        data = 0 if records is None else int(np.count_nonzero(~clusters.is_zero(records)))
        return data * clusters.CLUSTER_BYTES

    def _map(self, point: Point, entry: DiskEntry) -> DigestMap | DamageFound | RepositoryUnreadable:
        """Open a digest map once: every byte of it is checked by that."""
        key = point.id, entry.name, entry.digests
        if key not in self._maps:
            try:
                self._maps[key] = _layer(point, entry).digests(self._stop.check)
            except (DamageFound, RepositoryUnreadable) as err:
                self._maps[key] = err
        return self._maps[key]

    def _records(self, point: Point, entry: DiskEntry) -> Records | None:
        found = self._map(point, entry)
        return found.records if isinstance(found, DigestMap) else None

    def cannot_check(self, path: Path, disk: str, err: RepositoryUnreadable) -> None:
        """Note once what can't be read."""
        one = Unchecked(self.folder.name, path, disk, err.message)
        if one not in self.unchecked:
            self.unchecked.append(one)
            self._reporter.event(NotChecked(self.folder.name, path, disk, err.message))

    def _found(
        self,
        kind: Kind,
        path: Path,
        disk: str,
        message: str,
        touches: tuple[Affected, ...],
        ranges: tuple[Range, ...] = (),
    ) -> None:
        self.damage.append(Damage(self.folder.name, kind, path, disk, message, ranges, touches))
        self._reporter.event(DamageDetected(self.folder.name, kind, path, disk, message))


def _as_it_is(point: Point) -> Point:
    """Return a point with, of two descriptions that a prune left of a disk, the one that holds."""
    manifest = point.manifest
    for entry in manifest.disks:
        with suppress(DamageFound, RepositoryUnreadable):  # told when the layer itself is looked at
            manifest = manifest.with_disk(Layer.of(point, entry).entry)
    return replace(point, manifest=manifest)


def _standing(points: Iterable[Point]) -> set[tuple[PointId | None, DiskName]]:
    """Return the layers, by point and disk, on which another one stands."""
    return {(entry.parent, entry.name) for point in points for entry in point.manifest.disks}


def _layer(point: Point, entry: DiskEntry) -> Layer:
    return Layer(point.path / f"{entry.name}.qcow2", entry)
