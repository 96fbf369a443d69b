# SPDX-License-Identifier: GPL-2.0-or-later
"""Times as people write and read them."""

import time
from datetime import UTC, datetime, timedelta

import pytest

from backupctl.cli import times
from backupctl.errors import UsageError


@pytest.fixture(autouse=True)
def _berlin(monkeypatch):
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("text", "hour", "minute", "second"),
    [
        ("2026-11-26 18:00", 17, 0, 0),
        ("2026-11-26T18:00:30", 17, 0, 30),
        ("2026-11-26 18:00 UTC", 18, 0, 0),
        ("2026-11-26 18:00Z", 18, 0, 0),
        (" 2026-11-26 18:00+05:30 ", 12, 30, 0),
        ("2026-11-26 18:00 -0100", 19, 0, 0),
    ],
)
def test_a_time_is_local_unless_it_says_otherwise(text, hour, minute, second):
    assert times.parse(text) == datetime(2026, 11, 26, hour, minute, second, tzinfo=UTC)


@pytest.mark.parametrize(
    "text",
    ["", "2026-11-26", "18:00", "yesterday", "2026-13-01 00:00", "2026-11-26 25:00", "2026-11-26 18:00 CET"],
)
def test_what_is_not_a_time_is_refused(text):
    with pytest.raises(UsageError, match="is not a date and a time"):
        times.parse(text)


def test_an_hour_that_occurs_twice_needs_an_offset():
    with pytest.raises(UsageError) as caught:
        times.parse("2026-10-25 02:30")
    assert ("+0200" in caught.value.hint, "+0100" in caught.value.hint) == (True, True)
    assert times.parse("2026-10-25 02:30+02:00") == datetime(2026, 10, 25, 0, 30, tzinfo=UTC)


def test_an_hour_that_is_skipped_is_refused():
    with pytest.raises(UsageError, match="does not exist"):
        times.parse("2026-03-29 02:30")


def test_a_time_is_shown_with_its_zone_and_can_be_typed_again():
    shown = times.local(datetime(2026, 7, 1, 10, 0, 4, tzinfo=UTC))
    assert shown == "2026-07-01 12:00:04 CEST"
    assert times.parse(shown.removesuffix(" CEST")) == datetime(2026, 7, 1, 10, 0, 4, tzinfo=UTC)
    assert times.local(datetime(2026, 7, 1, tzinfo=UTC), utc=True) == "2026-07-01 00:00:00 UTC"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s ago"),
        (59, "59 s ago"),
        (60, "1 min ago"),
        (3 * 3600 + 5, "3 h ago"),
        (86400 * 30, "30 d ago"),
        (86400 * 800, "2 y ago"),
        (-5, "in the future"),
    ],
)
def test_ages(seconds, text):
    now = datetime(2026, 11, 26, tzinfo=UTC)
    assert times.age(now - timedelta(seconds=seconds), now) == text
