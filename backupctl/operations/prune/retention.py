# SPDX-License-Identifier: GPL-2.0-or-later
"""Which points stay and which go: pure, so that a dry run and the deed can't disagree.

Each rule looks from the newest point back. `last` holds so many points; `hourly`, `daily`, ... hold the
newest point of each of the last so many periods in which there is one; `within` holds all that are not
older than the newest by more than that. Periods are those of UTC, weeks are ISO's. A point stays if any
rule holds it. Whatever the rules say, a protected point stays, and the newest, and the newest that holds
each disk: the next incremental builds on it.

Ids only ever grow, so after one run with the clock ahead those that follow lie in the future too. So what
counts is what the clock showed at each run, and from a point in the future no age is counted.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from backupctl.errors import UsageError
from backupctl.names import DiskName, PointId, point_time

_CLOCKS_DIFFER = timedelta(hours=1)  # by so much, where backups and prunes run on two machines
_PART = re.compile(r"([0-9]{1,5})([hdwmy])", re.ASCII)
_UNITS = {
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
    "w": timedelta(weeks=1),
    "m": timedelta(days=31),
    "y": timedelta(days=366),
}
_PERIODS: tuple[tuple[str, Callable[[datetime], str]], ...] = (
    ("hourly", lambda moment: moment.strftime("%Y-%m-%d %Hh")),
    ("daily", lambda moment: moment.strftime("%Y-%m-%d")),
    ("weekly", lambda moment: moment.strftime("%G-W%V")),
    ("monthly", lambda moment: moment.strftime("%Y-%m")),
    ("yearly", lambda moment: moment.strftime("%Y")),
)


@dataclass(frozen=True)
class Rules:
    """What is to be kept: numbers of points, or of periods. within: None for no such rule."""

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
    """What the rules need to know of a point. taken: what the clock showed when it was."""

    id: PointId
    taken: datetime
    disks: tuple[DiskName, ...]
    protected: bool


@dataclass(frozen=True)
class Decision:
    """Whether a point stays, and why: never without a reason."""

    point: PointId
    keep: bool
    reasons: tuple[str, ...]


def decide(points: Sequence[RetentionCandidate], rules: Rules, now: datetime) -> tuple[Decision, ...]:
    """Decide for each point. points: of one VM, oldest first. Raises UsageError if there is no rule."""
    if rules.hold_nothing():
        raise UsageError(
            "no rule says what to keep: give at least one of --keep-last, --keep-hourly, --keep-daily, "
            "--keep-weekly, --keep-monthly, --keep-yearly, --keep-within",
            state="nothing was touched",
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
        raise UsageError(f"{text!r:.60} is no duration: one looks like 36h, 7d, 2w, 6m, 1y or 1y6m")
    try:
        return sum((int(number) * _UNITS[unit] for number, unit in parts), timedelta())
    except OverflowError as err:
        raise UsageError(f"{text!r:.60} is longer than can be counted") from err


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
    past = (point.taken for point in points if point.taken <= now + _CLOCKS_DIFFER)
    newest = max(past, default=now)
    # By its id too: a clock that was far behind must not make a point of yesterday old.
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
