# SPDX-License-Identifier: GPL-2.0-or-later
"""Gathers what a report says. Changes and locks nothing, and no damage keeps the rest from being reported.

What a run or a prune changes meanwhile may be seen before or after the change.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.digests import regions
from backupctl.errors import BackupctlError, Interrupted
from backupctl.names import PointId
from backupctl.operations import check
from backupctl.operations.check import Finding, Limits
from backupctl.operations.prune import run as prune
from backupctl.operations.prune.retention import Decision, Rules
from backupctl.operations.report import progress
from backupctl.operations.report.facts import (
    BadPoint,
    DiskMap,
    LastResults,
    MapRow,
    PointFacts,
    RepositoryFacts,
    VmFacts,
)
from backupctl.repository import chain, tested
from backupctl.repository.chain import Broken, Layer
from backupctl.repository.manifest import DiskEntry
from backupctl.repository.point import Point
from backupctl.repository.tested import RestoreTests
from backupctl.repository.vm_directory import ScannedPoints, VmDirectory

MAP_COLUMNS = 256


@dataclass(frozen=True)
class VmRequest:
    """A VM to report on. findings: what else is known of it. last: None if nothing is remembered.

    maps: of how many points, the newest, the map of each disk is drawn.
    """

    directory: VmDirectory
    limits: Limits
    rules: Rules = field(default_factory=Rules)
    last: LastResults | None = None
    findings: tuple[Finding, ...] = ()
    maps: int = 30


def repository(path: Path, vms: Sequence[VmRequest], now: datetime, stop: Cancellation) -> RepositoryFacts:
    """Report on VMs of one repository. Raises Interrupted."""
    found = []
    for one in vms:
        stop.check()
        found.append(_Vm(one, now, stop).facts())
    return RepositoryFacts(str(path), tuple(found))


@dataclass
class _Vm:
    """A look at one VM."""

    asked: VmRequest
    now: datetime
    stop: Cancellation
    _broken: tuple[Broken, ...] = field(default=(), init=False)

    def facts(self) -> VmFacts:
        """Return all that is reported of the VM. Raises Interrupted."""
        directory = self.asked.directory
        verdict = check.examine(directory, self.asked.limits, self.now, self._look)
        verdict = verdict.also(*self.asked.findings)
        try:
            scanned, run = directory.scan_points(tolerant=True), progress.of(directory, self.now)
        except BackupctlError:  # the verdict says it
            return VmFacts(directory.name, verdict, rules=self.asked.rules, last=self.asked.last)
        decisions, problem = self._decisions(scanned)
        return VmFacts(
            directory.name,
            verdict,
            self._points(scanned.points, decisions),
            _bad(scanned),
            self.asked.rules,
            problem,
            self.asked.last,
            self._maps(scanned.points),
            run,
            self._tested(),
        )

    def _tested(self) -> RestoreTests | None:
        try:
            return tested.read(self.asked.directory.path)
        except BackupctlError:  # it is about the past, and is made again
            return None

    def _look(self, directory: VmDirectory) -> tuple[Broken, ...]:
        self._broken = chain.damaged(directory)
        return self._broken

    def _decisions(self, scanned: ScannedPoints) -> tuple[dict[PointId, Decision], str]:
        """Return what the next prune decides, and why it decides nothing."""
        if self.asked.rules.hold_nothing() or not scanned.points:
            return {}, ""
        try:
            found = prune.plan(self.asked.directory, self.asked.rules)
        except BackupctlError as err:
            return {}, err.message
        return {one.point: one for one in found}, ""

    def _points(self, points: Sequence[Point], decisions: dict[PointId, Decision]) -> tuple[PointFacts, ...]:
        known: chain.Lengths = {}
        broken: dict[PointId, list[str]] = {}
        for one in self._broken:
            broken.setdefault(one.point, []).append(f"{one.disk}: {one.why}")
        return tuple(
            _point(
                point,
                self._layers(point, known),
                decisions.get(point.id),
                tuple(broken.get(point.id, ())),
            )
            for point in points
        )

    def _layers(self, point: Point, known: chain.Lengths) -> int | None:
        """Count the layers of the longest chain of a point; None if one of them is missing."""
        try:
            return max(
                chain.length(self.asked.directory, point, entry, known) for entry in point.manifest.disks
            )
        except BackupctlError:
            return None

    def _maps(self, points: Sequence[Point]) -> tuple[DiskMap, ...]:
        """Return the map of each disk of the newest point."""
        if not points or not self.asked.maps:
            return ()
        return tuple(self._map(points, entry) for entry in points[-1].manifest.disks)

    def _map(self, points: Sequence[Point], newest: DiskEntry) -> DiskMap:
        columns = regions.columns_of(newest.size, MAP_COLUMNS)
        rows = []
        for point in points[-self.asked.maps :]:
            self.stop.check()
            entry = point.manifest.disk(newest.name)
            if entry is not None:
                rows.append(_row(point, entry, newest.size, columns, self.stop.check))
        return DiskMap(newest.name, newest.size, columns, tuple(rows), self._chain_bytes(points[-1], newest))

    def _chain_bytes(self, point: Point, entry: DiskEntry) -> int | None:
        try:
            layers = chain.layers(self.asked.directory, point, entry.name)
        except BackupctlError:
            return None
        return sum(layer.entry.file_bytes for layer in layers)


def _row(point: Point, entry: DiskEntry, size_bytes: int, columns: int, check: Callable[[], None]) -> MapRow:
    try:
        records = Layer.of(point, entry).digests(check).records
    except Interrupted:
        raise
    except BackupctlError as err:
        return MapRow(point.id, entry.stored_bytes, problem=err.message)
    return MapRow(point.id, entry.stored_bytes, regions.shares(records, size_bytes, columns))


def _point(
    point: Point, layers: int | None, decision: Decision | None, broken: tuple[str, ...]
) -> PointFacts:
    manifest = point.manifest
    begun = manifest.started
    kinds = {entry.after_merge().kind for entry in manifest.disks}
    return PointFacts(
        id=point.id,
        taken=begun.astimezone(UTC),
        seconds=max(0.0, (manifest.ended - begun).total_seconds()),
        kind=kinds.pop() if len(kinds) == 1 else "mixed",
        parent=manifest.parent,
        consistency=manifest.consistency,
        frozen_ms=manifest.freeze.milliseconds,
        stored_bytes=sum(entry.stored_bytes for entry in manifest.disks),
        copied_bytes=sum(entry.copied_bytes for entry in manifest.disks),
        disks=tuple(entry.name for entry in manifest.disks),
        layers=layers,
        protected=_is_protected(point),
        decision=decision,
        broken=broken,
    )


def _is_protected(point: Point) -> bool:
    try:
        return point.protected
    except BackupctlError:  # what cannot be read is in the verdict
        return False


def _bad(scanned: ScannedPoints) -> tuple[BadPoint, ...]:
    damaged = [BadPoint(path.name, err.message, unreadable=False) for path, err in scanned.damaged]
    unread = [BadPoint(path.name, err.message, unreadable=True) for path, err in scanned.unreadable]
    return tuple(sorted((*damaged, *unread), key=lambda one: one.id))
