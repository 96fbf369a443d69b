# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the backups of a VM are recent and sound, by what its repository holds: for monitoring systems.

The VM itself is not asked, and the stored data is not read, for that `verify` is there. Where the summary
of a VM fits, each point is as it was when its manifest was read and compared with the history. Then the
newest point is read: its manifest, and the header and the digest map of each of its layers; of the layers
below these, the length. Otherwise manifests, history, headers and digest maps of all points are read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import IntEnum

from backupctl.errors import BackupctlError, RepositoryUnreadable
from backupctl.names import PointId
from backupctl.progress import counted
from backupctl.repository import chain, summary, summary_chains
from backupctl.repository.summary import Listing, PointSummary
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


def broken_chains(directory: VmDirectory, listing: Listing) -> Broken:
    """Return the disks that cannot be restored, as far as it is looked at. Raises RepositoryError."""
    if listing.unreadable:
        return ()
    if not listing.fits:
        return chain.damaged(directory)
    return _of_newest(directory, listing) if listing.points else ()


def examine(
    directory: VmDirectory,
    limits: Limits,
    now: datetime,
    look: Callable[[VmDirectory, Listing], Broken] = broken_chains,
) -> Verdict:
    """Look at the points of a VM. Changes and locks nothing, and raises nothing for what it finds.

    look: how broken chains are found.
    """
    findings: list[Finding] = []
    sound: Sequence[PointSummary] = ()
    newest = "the newest point"
    try:
        listing = summary.look(directory, closely=True)
        sound = listing.points
        findings += [Finding(Level.CRITICAL, err.message) for _, err in listing.damaged]
        findings += [_refusal(err) for _, err in listing.unreadable]
        if broken := look(directory, listing):
            sound = [point for point in sound if point.id not in {one.point for one in broken}]
        if listing.points[-1:] != tuple(sound[-1:]):
            newest = "the newest sound point"
        findings += _of_chains(broken)
        findings += [Finding(Level.CRITICAL, one.message) for one in listing.problems]
        if not listing.sealed:
            findings += _of_killed_runs(directory)
    except BackupctlError as err:
        findings.append(_refusal(err))
    age = now - datetime.fromtimestamp(sound[-1].started, UTC) if sound else None
    findings.append(_of_age(age, limits, newest))
    verdict = Verdict(directory.name, (), None if age is None else max(0.0, age.total_seconds()))
    return verdict.also(*findings)


def _of_newest(directory: VmDirectory, listing: Listing) -> Broken:
    """Return the disks that cannot be restored from the newest point. Raises RepositoryError."""
    there = listing.by_id
    newest = directory.point_or_retired(listing.points[-1].id)
    found = []
    for entry in newest.manifest.disks:
        layer = chain.Layer.of(newest, entry)
        if why := chain.why_broken(layer) or _why_broken_below(directory, layer, there):
            found.append(chain.Broken(newest.id, entry.name, why))
    return tuple(found)


def _why_broken_below(
    directory: VmDirectory, newest: chain.Layer, there: Mapping[PointId, PointSummary]
) -> str | None:
    """Return what is wrong with the layers below one, by what the summary says of them; None for nothing."""
    disk = newest.entry.name
    for point, held in summary_chains.below(there, disk, newest.entry.parent):
        if held is None:
            return f"{directory.path / point} is missing or damaged"
        if why := chain.why_cut(f"{directory.path}/{point}", disk, held.file_bytes):
            return why
    return None


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


def ago(age: timedelta) -> str:
    """Return a duration for people: "5 min", "26 h", "12 d"."""
    minutes = max(0, round(age.total_seconds() / 60))
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h" if minutes < 72 * 60 else f"{minutes // (24 * 60)} d"
