# SPDX-License-Identifier: GPL-2.0-or-later
"""Times as people write and read them: in the time zone of this machine, unless they say another."""

import re
from datetime import UTC, datetime
from functools import lru_cache

from backupctl.errors import UsageError
from backupctl.names import PointId

_TIME = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[ T]([0-9]{2}:[0-9]{2}(?::[0-9]{2})?)\s*(Z|UTC|[+-][0-9]{2}:?[0-9]{2})?",
    re.ASCII,
)
_EXAMPLES = 'examples: "2026-11-26 18:00", "2026-11-26 18:00:30 UTC", "2026-11-26 18:00+01:00"'
_AGES = ((86400 * 365, "y"), (86400, "d"), (3600, "h"), (60, "min"))


def parse(text: str) -> datetime:
    """Read a date and a time; local time unless it names UTC or an offset. Raises UsageError.

    A local time that occurs twice, because clocks are set back, is refused: it needs an offset. So is one
    that is skipped.
    """
    match = _TIME.fullmatch(text.strip())
    if not match:
        raise UsageError(f"{text!r:.60} is not a date and a time; {_EXAMPLES}")
    date, time, zone = match.groups()
    offset = "+00:00" if zone in ("Z", "UTC") else zone or ""
    try:
        found = datetime.fromisoformat(f"{date}T{time}{offset}")
        return found.astimezone(UTC) if offset else _from_local(found, text)
    except (ValueError, OverflowError) as err:
        raise UsageError(f"{text!r:.60} is not a date and a time: {err}; {_EXAMPLES}") from err


def _from_local(found: datetime, text: str) -> datetime:
    first, second = (found.replace(fold=fold).astimezone() for fold in (0, 1))
    if first.replace(tzinfo=None) != found:
        raise UsageError(f"{text!r:.60} does not exist, because clocks were set forward")
    if first.utcoffset() != second.utcoffset():
        raise UsageError(
            f"{text!r:.60} occurs twice, because clocks were set back",
            hint=f"add an offset: {first:%z} for the first time, {second:%z} for the second",
        )
    return first.astimezone(UTC)


def now() -> datetime:
    """Return what the clock shows."""
    return datetime.now(UTC)


def local(time: datetime, *, utc: bool = False) -> str:
    """Return a time with its zone: "2026-11-26 18:00:04 CET"; such as `parse` reads, but for the zone."""
    shown = time.astimezone(UTC) if utc else time.astimezone()
    return f"{shown:%Y-%m-%d %H:%M:%S %Z}"


def stamp(text: str, *, utc: bool = False) -> str:
    """Return a time of a manifest ("2026-11-23T04:15:00Z", checked when it was read) as `local` does."""
    return local(datetime.fromisoformat(text), utc=utc)


def of_point(point: PointId, *, utc: bool = False) -> str:
    """Return the time in a point's id as `local` does."""
    begin, end, _ = _of_minute(point[:13], utc)
    return f"{begin}{point[13:15]}{end}"


def of_point_with_age(point: PointId, now_seconds: int, *, utc: bool = False) -> tuple[str, str]:
    """Return the time in a point's id as `local` does, and how long ago it was as `age` does.

    now_seconds: since 1970.
    """
    begin, end, minute = _of_minute(point[:13], utc)
    seconds = point[13:15]
    return f"{begin}{seconds}{end}", _age(now_seconds - minute - int(seconds))


@lru_cache(1 << 16)  # a list of many points; zones differ by whole minutes
def _of_minute(minute: str, utc: bool) -> tuple[str, str, int]:
    time = datetime.fromisoformat(f"{minute}00Z")
    shown = local(time, utc=utc)
    return shown[:17], shown[19:], int(time.timestamp())


def age(time: datetime, now: datetime) -> str:
    """Return how long ago a time was, rounded down: "3 h ago"; "in the future" if it has yet to come."""
    return _age(int((now - time).total_seconds()))


def _age(seconds: int) -> str:
    if seconds < 0:
        return "in the future"
    for length, unit in _AGES:
        if seconds >= length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} s ago"
