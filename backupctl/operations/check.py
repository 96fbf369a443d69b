# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the backups of a VM are recent and sound, by what its repository holds: for monitoring systems.

The VM itself is not asked. Manifests, history, headers and digest maps are read; the stored data is not, for
that `verify` is there.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import IntEnum

from backupctl.errors import BackupctlError, RepositoryUnreadable
from backupctl.progress import counted
from backupctl.repository import audit, chain
from backupctl.repository.point import Point
from backupctl.repository.vm_directory import VmDirectory

Broken = tuple[chain.Broken, ...]
CLOCK_SKEW = timedelta(minutes=5)
"""How far a point may lie in the future before that is worth a warning."""


class Level(IntEnum):
    """How bad it is: the exit codes of the Monitoring Plugins Development Guidelines."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


_ORDER = (Level.OK, Level.UNKNOWN, Level.WARNING, Level.CRITICAL)
"""From good to bad: a VM that cannot be looked at must not hide another one that has no backup."""


@dataclass(frozen=True)
class Limits:
    """The oldest that the newest point may be. warning: None for no such limit."""

    critical: timedelta
    warning: timedelta | None = None


@dataclass(frozen=True)
class Finding:
    """One thing found of a VM."""

    level: Level
    text: str


@dataclass(frozen=True)
class Verdict:
    """What was found of a VM, the worst first. age_seconds: of its newest sound point, None without one."""

    vm: str
    findings: tuple[Finding, ...]
    age_seconds: float | None = None

    @property
    def level(self) -> Level:
        """The worst of what was found."""
        return worst(one.level for one in self.findings)

    def also(self, *findings: Finding) -> "Verdict":
        """Return the same with more findings."""
        together = sorted((*self.findings, *findings), key=lambda one: -_ORDER.index(one.level))
        return Verdict(self.vm, tuple(together), self.age_seconds)


def worst(levels: Iterable[Level]) -> Level:
    """Return the worst of some levels, OK for none."""
    return max(levels, key=_ORDER.index, default=Level.OK)


def refused(vm: str, err: BackupctlError) -> Verdict:
    """Return the verdict for a repository that cannot be opened: critical, unless it cannot be read."""
    return Verdict(vm, (_refusal(err),))


def _refusal(err: BackupctlError) -> Finding:
    level = Level.UNKNOWN if isinstance(err, RepositoryUnreadable) else Level.CRITICAL
    return Finding(level, err.message)


def examine(
    directory: VmDirectory,
    limits: Limits,
    now: datetime,
    look: Callable[[VmDirectory], Broken] = chain.damaged,
) -> Verdict:
    """Look at the points of a VM. Changes and locks nothing, and raises nothing for what it finds.

    look: how broken chains are found.
    """
    findings: list[Finding] = []
    sound: tuple[Point, ...] = ()
    newest = "the newest point"
    try:
        scanned = directory.scan_points(tolerant=True)
        sound = scanned.points
        findings += [Finding(Level.CRITICAL, err.message) for _, err in scanned.damaged]
        findings += [_refusal(err) for _, err in scanned.unreadable]
        broken = () if scanned.unreadable else look(directory)
        sound = tuple(point for point in sound if point.id not in {one.point for one in broken})
        if scanned.points[-1:] != sound[-1:]:
            newest = "the newest sound point"
        findings += _of_chains(broken)
        findings += [Finding(Level.CRITICAL, one.message) for one in audit.problems(directory)]
        findings += _of_killed_runs(directory)
    except BackupctlError as err:
        findings.append(_refusal(err))
    age = now - _taken(sound[-1]) if sound else None
    findings.append(_of_age(age, limits, newest))
    verdict = Verdict(directory.name, (), None if age is None else max(0.0, age.total_seconds()))
    return verdict.also(*findings)


def _of_chains(broken: Broken) -> Iterator[Finding]:
    if broken:
        points = len({one.point for one in broken})
        yield Finding(Level.CRITICAL, f"{counted(points, 'point')} damaged: {broken[0]}")


def _of_killed_runs(directory: VmDirectory) -> Iterator[Finding]:
    """Yield a warning for a run that was killed: the next one recovers, if there is a next one."""
    left = directory.pending_points()
    if left and directory.lock_holder() is None and directory.pending_points() == left:
        text = f"a run did not finish ({left[-1].point}); the next one, or `backupctl recover`, cleans up"
        yield Finding(Level.WARNING, text)


def _of_age(age: timedelta | None, limits: Limits, newest: str) -> Finding:
    if age is None:
        return Finding(Level.CRITICAL, "there is no sound recovery point")
    if age < -CLOCK_SKEW:
        text = f"{newest} is {ago(-age)} in the future: a clock is or was wrong"
        return Finding(Level.WARNING, text)
    text = f"{newest} is {ago(age)} old"
    if age > limits.critical:
        return Finding(Level.CRITICAL, text)
    return Finding(Level.WARNING if limits.warning and age > limits.warning else Level.OK, text)


def _taken(point: Point) -> datetime:
    return point.manifest.started.astimezone(UTC)


def ago(age: timedelta) -> str:
    """Return a duration for people: "5 min", "26 h", "12 d"."""
    minutes = max(0, round(age.total_seconds() / 60))
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h" if minutes < 72 * 60 else f"{minutes // (24 * 60)} d"
