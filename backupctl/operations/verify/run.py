# SPDX-License-Identifier: GPL-2.0-or-later
"""Verification of what is stored: each layer is read back once and compared with its digest map.

::

    for every VM     manifests, history, leftovers
    for every layer  its links, its size, its digest map, its own tables          ─┐ `fast` ends here
                     what it stores and what its digest map names: the same         ─┘
                     every cluster that it stores: the bytes that were read from the VM

Damage is content that is wrong, and a file that is missing. What the operating system cannot read (no
permission, an I/O error of the disk or the network) is reported as not checked.

A layer is read without those below it, so each byte is read once however many points depend on it. What is
found damaged is then reported as the user sees it: which bytes of which disks at which points.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from backupctl.cancel import Cancellation
from backupctl.digests import clusters
from backupctl.errors import UNTOUCHED, DamageFound, Locked, NoSuchPoint, RepositoryUnreadable
from backupctl.events import StepStarted
from backupctl.events.repository import DamageDetected, NoBackup, NotChecked, NothingToVerify
from backupctl.names import PointId, VmName
from backupctl.operations import chain_reader
from backupctl.operations.verify.contents import Contents, DigestMaps, layer_of, with_valid_entries
from backupctl.operations.verify.impact import Affected, Impact
from backupctl.operations.verify.layer import Kind, LayerCheck, Problem, VerifyScope
from backupctl.progress import Reporter
from backupctl.repository import audit, history, markers, stored_files
from backupctl.repository.manifest import DiskEntry
from backupctl.repository.point import Point
from backupctl.repository.repository import Repository
from backupctl.repository.vm_directory import VmDirectory
from backupctl.sizes import Range
from backupctl.system import locks, safe_open
from backupctl.system.threads import Workers

_LOCK_SECONDS = 30.0


@dataclass(frozen=True)
class Damage:
    """One thing found wrong.

    kind: what it is in (data: the stored bytes). path: the file or directory. disk: "" if it is not of one.
    ranges: of the disk, damaged in this layer. touches: the parts of points that read it.
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
    """Something that cannot be read, so that it may be damaged or not. disk: "" if it is not of one."""

    vm: VmName
    path: Path
    disk: str
    message: str


@dataclass(frozen=True)
class VerifyReport:
    """The result of a verification. read_bytes: of data, compared. notes: worth knowing, but no damage."""

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
    scope: VerifyScope,
    reporter: Reporter,
    stop: Cancellation,
) -> VerifyReport:
    """Check the whole repository, one VM (`vm`), or what one point of it needs. Changes nothing.

    Damage is in the report, and so is what cannot be read. Raises NoSuchPoint, DamageFound or
    RepositoryUnreadable if the point asked for has no manifest to start from, RepositoryError, Interrupted.
    """
    started = time.monotonic()
    directories = [repository.vm(name) for name in (repository.vms() if vm is None else [vm])]
    if vm is not None:
        directories[0].refuse_unknown()
    found = _Findings(reporter)
    with Workers(chain_reader.WORKERS) as workers:
        for directory in directories:
            rng = np.random.default_rng(scope.seed)
            before = found.points, len(found.damage), len(found.unchecked)
            try:
                _VmCheck(directory, scope, rng, reporter, stop, found, workers).run(point)
            except RepositoryUnreadable as err:
                if vm is not None:
                    raise
                found.add_unchecked(directory, directory.path, "", err)
            if vm is None and before == (found.points, len(found.damage), len(found.unchecked)):
                reporter.event(NoBackup(directory.name, repository.path))
    if not found.points and not found.damage:
        _refuse_empty(repository, vm)
        reporter.event(NothingToVerify(repository.path))
    return VerifyReport(
        vms=tuple(directory.name for directory in directories),
        points=found.points,
        layers=found.layers,
        read_bytes=found.read_bytes,
        damage=tuple(found.damage),
        notes=tuple(found.notes),
        seconds=time.monotonic() - started,
        unchecked=tuple(found.unchecked),
    )


def _refuse_empty(repository: Repository, vm: VmName | None) -> None:
    """Raise NoSuchPoint if a VM was named that has no point: it has no backup."""
    if vm is not None:
        raise NoSuchPoint(
            f"there is no recovery point of {vm} in {repository.path}",
            state=UNTOUCHED,
            next_command=f"backupctl full {vm}",
        )


@dataclass
class _Findings:
    """What a verification has found so far, over all VMs. Damage is also shown at once, as a warning."""

    reporter: Reporter
    points: int = 0
    layers: int = 0
    read_bytes: int = 0
    damage: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unchecked: list[Unchecked] = field(default_factory=list)

    def add_damage(self, one: Damage) -> None:
        self.damage.append(one)
        self.reporter.event(DamageDetected(one.vm, one.kind, one.path, one.disk, one.message))

    def add_unchecked(self, directory: VmDirectory, path: Path, disk: str, err: RepositoryUnreadable) -> None:
        """Add what cannot be read, once."""
        one = Unchecked(directory.name, path, disk, err.message)
        if one not in self.unchecked:
            self.unchecked.append(one)
            self.reporter.event(NotChecked(directory.name, path, disk, err.message))


@dataclass(frozen=True)
class _VmCheck:
    """The verification of one VM; `run` does it. rng: chooses the sample. workers: read."""

    directory: VmDirectory
    scope: VerifyScope
    rng: np.random.Generator
    reporter: Reporter
    stop: Cancellation
    found: _Findings
    workers: Workers

    def run(self, wanted: str | None) -> None:
        """Check all of the VM's points, or what one needs. Raises as `verify`."""
        self.reporter.event(StepStarted(f"verify {self.directory.name}"))
        chosen = None if wanted is None else with_valid_entries(self._point(wanted))
        contents, maps = Contents.scan(self.directory), DigestMaps(self.stop)
        retired = {point.id for point in contents.retired.points}
        impact = Impact(contents.points.values(), maps.records, retired)
        layers = contents.all_layers() if chosen is None else contents.layers_of(chosen)
        self.found.points += len(contents.current.points) if chosen is None else 1
        self.found.layers += len(layers)
        if chosen is None:
            self._check_directory(contents, impact)
        self._check_definitions(contents.current.points if chosen is None else (chosen,))
        self._check_parents(contents, impact, layers)
        self._check_layers(maps, impact, layers)

    def _point(self, wanted: str) -> Point:
        try:
            return self.directory.point(wanted)
        except NoSuchPoint:
            audit.refuse_missing(self.directory, wanted)
            raise

    def _check_directory(self, contents: Contents, impact: Impact) -> None:
        """Report manifests, the history and unfinished points."""
        for path, err in (*contents.current.damaged, *contents.retired.damaged):
            affected = impact.based_on(PointId(path.name))
            self._add_damage("manifest", path, "", err.message, affected)
        for problem in audit.problems(self.directory):
            path = self.directory.path / (problem.point or history.FILE_NAME)
            self._add_damage("history", path, "", problem.message, ())
        for name, unread in contents.unreadable.items():
            self._add_unchecked(self.directory.path / name, "", unread)
        self.found.notes += [
            f"{pending.path}: an unfinished point" for pending in self.directory.pending_points()
        ]

    def _check_definitions(self, points: Iterable[Point]) -> None:
        """Compare the files that describe the VM with their digests; all of them, since they are small."""
        for point in points:
            if not point.manifest.definition:
                continue
            self.stop.check()
            with self._locked(point) as now:
                for entry in now.manifest.definition if now else ():
                    try:
                        stored_files.read(point.path, entry)
                    except DamageFound as err:
                        self._add_damage("definition", entry.path_in(point.path), "", err.message, ())
                    except RepositoryUnreadable as err:
                        self._add_unchecked(entry.path_in(point.path), "", err)

    def _check_parents(
        self, contents: Contents, impact: Impact, layers: Iterable[tuple[Point, DiskEntry]]
    ) -> None:
        for point, entry in layers:
            parent = contents.points.get(entry.parent) if entry.parent else None
            if entry.parent is None or (parent is not None and parent.manifest.disk(entry.name)):
                continue
            path = self.directory.path / entry.parent
            if unread := contents.unreadable.get(entry.parent):
                self._add_unchecked(path, "", unread)
                continue
            if parent is not None:
                why = "does not hold that disk"
            elif safe_open.there(path):
                why = "is damaged"
            else:
                why = "is missing"
            text = f"{point.path / entry.name} is based on the point {entry.parent}, which {why}"
            affected = impact.affected_by_layer(point.id, entry.name)
            self._add_damage("chain", path, entry.name, text, affected)

    def _check_layers(self, maps: DigestMaps, impact: Impact, layers: list[tuple[Point, DiskEntry]]) -> None:
        total = sum(maps.data_bytes(point, entry) for point, entry in layers)
        done = 0
        for point, entry in layers:
            self.stop.check()
            try:
                with self._locked(point) as now:
                    held = now.manifest.disk(entry.name) if now else None
                    if now and held and not self._was_merged(now, held):
                        self._check_layer(maps, impact, now, held, self._progress(done, total))
            except RepositoryUnreadable as err:
                self._add_unchecked(point.path, entry.name, err)
            done += maps.data_bytes(point, entry)

    def _progress(self, before: int, total: int) -> Callable[[int], None]:
        # One for all layers of a VM, of which there may be thousands.
        return lambda done_bytes: self.reporter.progress(self.directory.name, before + done_bytes, total)

    def _was_merged(self, point: Point, entry: DiskEntry) -> bool:
        """Whether a prune has merged a layer's image into that of its child, which is the layer now."""
        if safe_open.there(layer_of(point, entry).path) or not markers.has(point.path, markers.RETIRED):
            return False
        return (point.id, entry.name) not in Contents.scan(self.directory).parents()

    def _check_layer(
        self,
        maps: DigestMaps,
        impact: Impact,
        point: Point,
        entry: DiskEntry,
        progress: Callable[[int], None],
    ) -> None:
        layer = layer_of(point, entry)
        merging = markers.has(point.path, markers.merging(entry.name))
        check = LayerCheck(
            layer, maps.open(point, entry), self.scope, self.rng, self.stop, merging, self.workers
        )
        report = check.run(progress)
        self.found.notes += report.notes
        self.found.read_bytes += report.read_bytes
        for problem in report.problems:
            self._add_problem(impact, point, entry, problem, merging=merging)
        for why in report.unchecked:
            self._add_unchecked(layer.path, entry.name, RepositoryUnreadable(why))

    def _add_problem(
        self, impact: Impact, point: Point, entry: DiskEntry, problem: Problem, *, merging: bool
    ) -> None:
        """Add a problem of a layer, with the points that it affects."""
        ranges: tuple[Range, ...] = ()
        if problem.clusters is None:
            affected = impact.affected_by_layer(point.id, entry.name)
        else:
            affected = impact.affected_by_clusters(point.id, entry.name, problem.clusters)
            ranges = tuple(clusters.ranges(problem.clusters, entry.size))
            # A merge was overwriting this image with what its only child masks: no point reads the damage,
            # and the next prune writes those clusters again.
            if merging and problem.kind == "data" and not affected:
                return
        self._add_damage(problem.kind, problem.path, entry.name, problem.message, affected, ranges)

    @contextmanager
    def _locked(self, point: Point) -> Iterator[Point | None]:
        """Keep prune from changing a point's layers; yields the point as it is now, None if it is gone."""
        now = None
        with ExitStack() as held:
            try:
                held.enter_context(locks.directory(point.path, _LOCK_SECONDS, shared=True))
                now = with_valid_entries(self.directory.point_or_retired(point.id))
            except (FileNotFoundError, NoSuchPoint):
                self.found.notes.append(f"{point.path}: pruned meanwhile")
            except Locked:
                self.found.notes.append(f"{point.path}: not verified, because a prune is changing it")
            yield now

    def _add_unchecked(self, path: Path, disk: str, err: RepositoryUnreadable) -> None:
        self.found.add_unchecked(self.directory, path, disk, err)

    def _add_damage(
        self,
        kind: Kind,
        path: Path,
        disk: str,
        message: str,
        affected: tuple[Affected, ...],
        ranges: tuple[Range, ...] = (),
    ) -> None:
        self.found.add_damage(Damage(self.directory.name, kind, path, disk, message, ranges, affected))
