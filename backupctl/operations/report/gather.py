# SPDX-License-Identifier: GPL-2.0-or-later
"""Gathers what a report says. Changes and locks nothing, and no damage keeps the rest from being reported.

What a run or a prune changes meanwhile may be seen before or after the change.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.digests import regions
from backupctl.errors import BackupctlError, Interrupted
from backupctl.names import PointId
from backupctl.operations import check
from backupctl.operations.check import Finding, Limits
from backupctl.operations.prune import retention
from backupctl.operations.prune.retention import Decision, RetentionCandidate, Rules
from backupctl.operations.report import progress
from backupctl.operations.report.facts import (
    BadPoint,
    DiskMap,
    LastResults,
    MapRow,
    OlderPoints,
    PointFacts,
    RepositoryFacts,
    VmFacts,
)
from backupctl.repository import tested
from backupctl.repository.chain import Broken, Layer
from backupctl.repository.manifest import DiskEntry
from backupctl.repository.point import Point
from backupctl.repository.summary import Listing, PointSummary
from backupctl.repository.summary_chains import Chains
from backupctl.repository.tested import RestoreTests
from backupctl.repository.vm_directory import VmDirectory

MAP_COLUMNS = 256


@dataclass(frozen=True)
class VmRequest:
    """A VM to report on. findings: what else is known of it. last: None if nothing is remembered.

    maps: of how many points, the newest, the map of each disk is drawn. points: how many, the newest, are
    reported one by one; None for all.
    """

    directory: VmDirectory
    limits: Limits
    rules: Rules = field(default_factory=Rules)
    last: LastResults | None = None
    findings: tuple[Finding, ...] = ()
    maps: int = 30
    points: int | None = None


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
    _listing: Listing | None = field(default=None, init=False)

    def facts(self) -> VmFacts:
        """Return all that is reported of the VM. Raises Interrupted."""
        directory = self.asked.directory
        verdict = check.examine(directory, self.asked.limits, self.now, self._look)
        verdict = verdict.also(*self.asked.findings)
        run, listing = progress.of(directory, self.now), self._listing
        if listing is None:  # the verdict says why
            return VmFacts(directory.name, verdict, rules=self.asked.rules, last=self.asked.last)
        decisions, problem = self._decisions(listing)
        shown = self._shown(listing.points)
        older = self._older(listing.points)
        return VmFacts(
            directory.name,
            verdict,
            self._points(shown, listing, decisions),
            _bad(listing),
            self.asked.rules,
            problem,
            self.asked.last,
            self._maps(listing),
            run,
            self._tested(),
            _older(older, decisions) if older else None,
        )

    def _tested(self) -> RestoreTests | None:
        try:
            return tested.read(self.asked.directory.path)
        except BackupctlError:  # it is about the past, and is made again
            return None

    def _look(self, directory: VmDirectory, listing: Listing) -> tuple[Broken, ...]:
        self._listing = listing
        self._broken = check.broken_chains(directory, listing)
        return self._broken

    def _shown(self, points: Sequence[PointSummary]) -> Sequence[PointSummary]:
        """Return the points that are reported one by one: the newest, and all that are broken."""
        cut = self._cut(points)
        broken = {one.point for one in self._broken}
        return [*(one for one in points[:cut] if one.id in broken), *points[cut:]] if broken else points[cut:]

    def _older(self, points: Sequence[PointSummary]) -> Sequence[PointSummary]:
        """Return the others."""
        broken = {one.point for one in self._broken}
        older = points[: self._cut(points)]
        return [one for one in older if one.id not in broken] if broken else older

    def _cut(self, points: Sequence[PointSummary]) -> int:
        most = self.asked.points
        return 0 if most is None else max(0, len(points) - most)

    def _decisions(self, listing: Listing) -> tuple[dict[PointId, Decision], str]:
        """Return what the next prune decides, and why it decides nothing."""
        rules = self.asked.rules
        if rules.hold_nothing() or not listing.points:
            return {}, ""
        try:
            if listing.fits:
                found = retention.decide(list(map(_candidate, listing.points)), rules, datetime.now(UTC))
            else:
                from backupctl.operations.prune import run as prune  # noqa: PLC0415 - only without a summary

                found = prune.plan(self.asked.directory, rules)
        except BackupctlError as err:
            return {}, err.message
        return {one.point: one for one in found}, ""

    def _points(
        self, points: Sequence[PointSummary], listing: Listing, decisions: dict[PointId, Decision]
    ) -> tuple[PointFacts, ...]:
        chains = Chains(listing.by_id)
        broken: dict[PointId, list[str]] = {}
        for one in self._broken:
            broken.setdefault(one.point, []).append(f"{one.disk}: {one.why}")
        return tuple(
            _point(
                point,
                chains.most_layers(point),
                decisions.get(point.id),
                tuple(broken.get(point.id, ())),
            )
            for point in points
        )

    def _maps(self, listing: Listing) -> tuple[DiskMap, ...]:
        """Return the map of each disk of the newest point."""
        if not listing.points or not self.asked.maps:
            return ()
        chains, points = Chains(listing.by_id), []
        for one in listing.points[-self.asked.maps :]:
            with suppress(BackupctlError):  # it was removed, or damaged, just now
                points.append(self.asked.directory.point_or_retired(one.id))
        if not points:
            return ()
        return tuple(
            self._map(points, entry, chains.bytes_of(points[-1].id, entry.name)) for entry in points[-1].disks
        )

    def _map(self, points: Sequence[Point], newest: DiskEntry, chain_bytes: int | None) -> DiskMap:
        columns = regions.columns_of(newest.size, MAP_COLUMNS)
        rows = []
        for point in points:
            self.stop.check()
            entry = point.manifest.disk(newest.name)
            if entry is not None:
                rows.append(_row(point, entry, newest.size, columns, self.stop.check))
        return DiskMap(newest.name, newest.size, columns, tuple(rows), chain_bytes)


def _candidate(point: PointSummary) -> RetentionCandidate:
    started = datetime.fromtimestamp(point.started, UTC)
    return RetentionCandidate(point.id, started, tuple(one.name for one in point.disks), point.protected)


def _older(points: Sequence[PointSummary], decisions: dict[PointId, Decision]) -> OlderPoints:
    return OlderPoints(
        len(points),
        sum([disk.stored_bytes for one in points for disk in one.disks]),
        datetime.fromtimestamp(points[0].started, UTC),
        tuple(one.id for one in points if one.id in decisions and not decisions[one.id].keep)
        if decisions
        else (),
    )


def _row(point: Point, entry: DiskEntry, size_bytes: int, columns: int, check: Callable[[], None]) -> MapRow:
    try:
        records = Layer.of(point, entry).digests(check).records
    except Interrupted:
        raise
    except BackupctlError as err:
        return MapRow(point.id, entry.stored_bytes, problem=err.message)
    return MapRow(point.id, entry.stored_bytes, regions.shares(records, size_bytes, columns))


def _point(
    point: PointSummary, layers: int | None, decision: Decision | None, broken: tuple[str, ...]
) -> PointFacts:
    kinds = {disk.kind for disk in point.disks}
    return PointFacts(
        id=point.id,
        taken=datetime.fromtimestamp(point.started, UTC),
        seconds=max(0.0, point.ended - point.started),
        kind=kinds.pop() if len(kinds) == 1 else "mixed",
        parent=point.parent,
        consistency=point.consistency,
        frozen_ms=point.frozen_ms,
        stored_bytes=point.stored_bytes,
        copied_bytes=sum(disk.copied_bytes for disk in point.disks),
        disks=tuple(disk.name for disk in point.disks),
        layers=layers,
        protected=point.protected,
        decision=decision,
        broken=broken,
    )


def _bad(scanned: Listing) -> tuple[BadPoint, ...]:
    damaged = [BadPoint(path.name, err.message, unreadable=False) for path, err in scanned.damaged]
    unread = [BadPoint(path.name, err.message, unreadable=True) for path, err in scanned.unreadable]
    return tuple(sorted((*damaged, *unread), key=lambda one: one.id))
