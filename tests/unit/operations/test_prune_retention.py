# SPDX-License-Identifier: GPL-2.0-or-later
"""Which points stay and why, for any history."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupctl.errors import UsageError
from backupctl.names import DiskName, PointId, next_point_id, point_time
from backupctl.operations.prune.retention import (
    Decision,
    RetentionCandidate,
    Rules,
    decide,
    dropped,
    duration,
)

EARLIEST, LATEST = datetime(2020, 1, 1), datetime(2026, 1, 1)  # noqa: DTZ001 - hypothesis wants them so
NOW = LATEST.replace(tzinfo=UTC)
VDA, VDB = DiskName("vda"), DiskName("vdb")


def point_at(text: str) -> PointId:
    return next_point_id(datetime.strptime(text, "%Y-%m-%d %H:%M").replace(tzinfo=UTC), None)


def held_at(*moments: str) -> list[RetentionCandidate]:
    ids = [point_at(text) for text in moments]
    return [RetentionCandidate(point, point_time(point), (VDA,), protected=False) for point in ids]


def kept(points: list[RetentionCandidate], rules: Rules, now: datetime = NOW) -> list[PointId]:
    return [one.point for one in decide(points, rules, now) if one.keep]


HISTORY = held_at(
    "2024-12-30 12:00",  # ISO week 2025-W01
    "2025-01-02 12:00",
    "2025-11-30 23:59",
    "2025-12-01 00:01",
    "2025-12-01 10:10",
    "2025-12-01 10:50",
    "2025-12-01 11:00",
)


@pytest.mark.parametrize(
    ("rules", "numbers"),
    [
        (Rules(last=2), [5, 6]),
        (Rules(hourly=2), [5, 6]),
        (Rules(hourly=3), [3, 5, 6]),
        (Rules(daily=2), [2, 6]),
        (Rules(weekly=2), [2, 6]),
        (Rules(weekly=9), [1, 2, 6]),
        (Rules(monthly=3), [1, 2, 6]),
        (Rules(yearly=2), [0, 6]),
        (Rules(within=timedelta(minutes=30)), [5, 6]),
        (Rules(last=1, daily=2), [2, 6]),
        (Rules(last=100), list(range(7))),
    ],
)
def test_the_newest_point_of_each_period_counts(rules, numbers):
    assert kept(HISTORY, rules) == [HISTORY[number].id for number in numbers]


def test_each_point_is_told_why_it_stays_or_goes():
    found = decide(HISTORY, Rules(last=1, daily=2), NOW)
    assert found[-1].reasons == ("the newest", "last 1 of 1", "daily 1 of 2 (2025-12-01)")
    assert found[2].reasons == ("daily 2 of 2 (2025-11-30)",)
    assert found[0] == Decision(HISTORY[0].id, False, ("no rule holds it",))


def test_a_year_without_a_backup_drops_nothing_by_age():
    """Ages count from the newest point: who comes back after a long pause finds what was there."""
    assert kept(HISTORY, Rules(within=timedelta(days=2))) == [point.id for point in HISTORY[2:]]


def test_a_time_to_keep_that_is_longer_than_time_keeps_all():
    assert kept(HISTORY, Rules(within=duration("9999y"))) == [point.id for point in HISTORY]


def test_no_rule_is_an_error():
    with pytest.raises(UsageError):
        decide(HISTORY, Rules(), NOW)


@pytest.mark.parametrize(
    ("text", "found"),
    [("36h", timedelta(hours=36)), ("1w2d", timedelta(days=9)), ("1y6m", timedelta(days=366 + 186))],
)
def test_durations(text, found):
    assert duration(text) == found


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "1d 2h", "1.5d", "7days", "1d\n", 30 * "99999y"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(UsageError):
        duration(text)


RULES = st.builds(
    Rules,
    **{name: st.integers(0, 5) for name in ("last", "hourly", "daily", "weekly", "monthly", "yearly")},
    within=st.none() | st.timedeltas(timedelta(), timedelta(days=400)),
).filter(lambda rules: not rules.hold_nothing())


@st.composite
def histories(draw) -> list[RetentionCandidate]:
    """Points at any moments, in order or, as the clock was right at some only, in none."""
    moments = draw(st.lists(st.datetimes(EARLIEST, LATEST), min_size=1, max_size=40))
    found: list[RetentionCandidate] = []
    for moment in sorted(moments) if draw(st.booleans()) else moments:
        taken = moment.replace(microsecond=0, tzinfo=UTC)
        point = next_point_id(taken, found[-1].id if found else None)
        disks = draw(st.sampled_from([(VDA,), (VDB,), (VDA, VDB)]))
        found.append(RetentionCandidate(point, taken, disks, draw(st.booleans())))
    return found


def daily(days: int, ahead: int) -> list[RetentionCandidate]:
    """A point a day; on the day `ahead` the clock was a year ahead."""
    found: list[RetentionCandidate] = []
    for day in range(days):
        taken = datetime(2025, 1, 1, tzinfo=UTC) + timedelta(days=day + (365 if day == ahead else 0))
        point = next_point_id(taken, found[-1].id if found else None)
        found.append(RetentionCandidate(point, taken, (VDA,), protected=False))
    return found


@pytest.mark.parametrize("days", [30, 31, 44])
def test_one_run_with_the_clock_ahead_costs_no_other_point_its_place_but_one(days):
    points, now = daily(days, ahead=29), datetime(2025, 1, 1, tzinfo=UTC) + timedelta(days=days)
    ids = [point.id for point in points]
    assert set(kept(points, Rules(within=timedelta(days=14)), now)) >= set(ids[-14:])
    assert kept(points, Rules(daily=7), now) == ids[-7:]


def test_one_run_with_the_clock_far_behind_is_not_old_for_that():
    points = daily(5, ahead=9)
    behind = RetentionCandidate(
        next_point_id(points[-1].taken, points[-1].id), NOW - timedelta(days=9999), (VDA,), False
    )
    later = replace(points[-1], id=PointId("20250106T000000Z"), taken=points[-1].taken + timedelta(days=1))
    points = [*points, behind, later]
    assert kept(points, Rules(within=timedelta(days=2))) == [point.id for point in points[3:]]


@given(histories(), RULES)
def test_whatever_the_rules_what_is_needed_stays(points, rules):
    decisions = decide(points, rules, NOW)
    assert [one.point for one in decisions] == [point.id for point in points]
    assert all(one.reasons for one in decisions)
    gone = set(dropped(decisions))
    assert points[-1].id not in gone
    assert not gone & {point.id for point in points if point.protected}
    for disk in (VDA, VDB):
        holding = [point.id for point in points if disk in point.disks]
        assert not holding or holding[-1] not in gone
    assert not gone & {point.id for point in points[len(points) - rules.last :] if rules.last}
    if rules.within is not None:
        begin = max(point.taken for point in points) - rules.within
        assert all(point_time(point) < begin for point in gone)


@given(histories(), RULES)
def test_to_prune_again_drops_nothing_more(points, rules):
    gone = set(dropped(decide(points, rules, NOW)))
    left = [point for point in points if point.id not in gone]
    assert dropped(decide(left, rules, NOW)) == ()


@given(histories(), RULES, RULES)
def test_more_rules_never_drop_more(points, rules, more):
    both = Rules(
        **{
            name: max(getattr(rules, name), getattr(more, name))
            for name in ("last", "hourly", "daily", "weekly", "monthly", "yearly")
        },
        within=max((each.within for each in (rules, more) if each.within is not None), default=None),
    )
    assert set(dropped(decide(points, both, NOW))) <= set(dropped(decide(points, rules, NOW)))
