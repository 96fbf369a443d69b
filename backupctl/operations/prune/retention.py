# SPDX-License-Identifier: GPL-2.0-or-later
"""Which points stay and which are dropped: a pure function, so that a dry run and a prune always agree.

Each rule counts back from the newest point. `last` holds that many points; `hourly`, `daily`, ... hold the
newest point of each of that many periods, counting only periods that have one; `within` holds all points that
are at most that much older than the newest. Periods are in UTC, weeks as in ISO 8601. A point stays if any
rule holds it. Whatever the rules say, a protected point stays, and the newest, and for each disk the newest
point that holds it, because the next incremental is based on it.

Ids only ever grow, so after one run with the clock ahead the ids that follow lie in the future too. Therefore
a point's age is taken from what the clock showed at its run, and no age is counted from a time in the future.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from backupctl.errors import UNTOUCHED, UsageError
from backupctl.names import DiskName, PointId, point_time

_CLOCK_SKEW = timedelta(hours=1)  # tolerated between machines that back up and that prune
_PART = re.compile(r"([0-9]{1,5})([hdwmy])", re.ASCII)
_UNITS = {
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
    "w": timedelta(weeks=1),
    "m": timedelta(days=31),
    "y": timedelta(days=366),
}
_PERIODS: tuple[tuple[str, Callable[[datetime], str]], ...] = (
    ("hourly", lambda time: time.strftime("%Y-%m-%d %Hh")),
    ("daily", lambda time: time.strftime("%Y-%m-%d")),
    ("weekly", lambda time: time.strftime("%G-W%V")),
    ("monthly", lambda time: time.strftime("%Y-%m")),
    ("yearly", lambda time: time.strftime("%Y")),
)


@dataclass(frozen=True)
class Rules:
    """What to keep: numbers of points, or of periods. within: None for no such rule."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: timedelta | None = None

    def hold_nothing(self) -> bool:
        """Whether there is no rule at all."""
        return self == Rules()


@dataclass(frozen=True)
class RetentionCandidate:
    """What the rules need to know about a point. taken: what the clock showed then."""

    id: PointId
    taken: datetime
    disks: tuple[DiskName, ...]
    protected: bool


@dataclass(frozen=True)
class Decision:
    """Whether a point stays, and why; there is always a reason."""

    point: PointId
    keep: bool
    reasons: tuple[str, ...]


def decide(points: Sequence[RetentionCandidate], rules: Rules, now: datetime) -> tuple[Decision, ...]:
    """Decide for each point. points: of one VM, oldest first. Raises UsageError if there is no rule."""
    if rules.hold_nothing():
        raise UsageError(
            "no retention rule: give at least one of --keep-last, --keep-hourly, --keep-daily, "
            "--keep-weekly, --keep-monthly, --keep-yearly, --keep-within",
            state=UNTOUCHED,
        )
    ids = [point.id for point in points]
    reasons: dict[PointId, list[str]] = {point: [] for point in ids}
    for found in (_needed(points), _by_last(ids, rules), _by_age(points, rules, now)):
        _add(reasons, found)
    for name, period in _PERIODS:
        _add(reasons, _by_period(points, name, period, getattr(rules, name)))
    return tuple(
        Decision(point, bool(why), tuple(why) or ("no rule holds it",)) for point, why in reasons.items()
    )


def duration(text: str) -> timedelta:
    """Read a duration like 36h, 7d, 2w, 6m (of 31 days), 1y (of 366), or 1y6m. Raises UsageError."""
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise UsageError(f"invalid duration {text!r:.60}; examples: 36h, 7d, 2w, 6m, 1y, 1y6m")
    try:
        return sum((int(number) * _UNITS[unit] for number, unit in parts), timedelta())
    except OverflowError as err:
        raise UsageError(f"duration {text!r:.60} is too long") from err


def _needed(points: Sequence[RetentionCandidate]) -> Mapping[PointId, str]:
    """Return what stays whatever the rules say."""
    found: dict[PointId, list[str]] = {}
    for point in points:
        if point.protected:
            found.setdefault(point.id, []).append("protected")
    newest: dict[DiskName, PointId] = {disk: point.id for point in points for disk in point.disks}
    if points:
        found.setdefault(points[-1].id, []).append("the newest")
    for disk, point_id in sorted(newest.items()):
        if point_id != points[-1].id:
            found.setdefault(point_id, []).append(f"the newest that holds {disk}")
    return {point_id: ", ".join(why) for point_id, why in found.items()}


def _by_last(ids: Sequence[PointId], rules: Rules) -> Mapping[PointId, str]:
    held = ids[-rules.last :] if rules.last else ()
    return {point: f"last {number} of {rules.last}" for number, point in enumerate(reversed(held), 1)}


def _by_age(points: Sequence[RetentionCandidate], rules: Rules, now: datetime) -> Mapping[PointId, str]:
    if rules.within is None:
        return {}
    past = (point.taken for point in points if point.taken <= now + _CLOCK_SKEW)
    newest = max(past, default=now)
    # By its id as well: a clock that was far behind at its run must not make yesterday's point old.
    return {
        point.id: "within the time to keep"
        for point in points
        if newest - max(point.taken, point_time(point.id)) <= rules.within
    }


def _by_period(
    points: Sequence[RetentionCandidate], name: str, period: Callable[[datetime], str], most: int
) -> Mapping[PointId, str]:
    """Return the newest point of each of the newest periods."""
    newest = {period(point.taken): point.id for point in points}
    chosen = sorted(newest.items(), key=lambda one: one[1], reverse=True)[:most]
    return {point: f"{name} {number} of {most} ({label})" for number, (label, point) in enumerate(chosen, 1)}


def _add(reasons: dict[PointId, list[str]], found: Mapping[PointId, str]) -> None:
    for point, why in found.items():
        reasons[point].append(why)


def dropped(decisions: Iterable[Decision]) -> tuple[PointId, ...]:
    """Return the points that go."""
    return tuple(one.point for one in decisions if not one.keep)
