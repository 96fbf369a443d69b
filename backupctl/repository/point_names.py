# SPDX-License-Identifier: GPL-2.0-or-later
"""What a recovery point may be called by, and which point is meant.

::

    20261123T041500Z        its id
    20261123T04             the beginning of its id, of four characters or more, if no other id begins so
    latest                  the newest point
    latest~2                the second point before the newest
    at:20261123T041500Z     the newest point that is not later than that time, in UTC

All but an id mean other points as points come and go.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime

from backupctl.errors import UNTOUCHED, AmbiguousPoint, InvalidName, NoSuchPoint
from backupctl.names import PointId, VmName, did_you_mean, point_id, point_time

LATEST = "latest"
_LATEST = re.compile(r"latest(?:~([0-9]{1,6}))?", re.ASCII)
_PREFIX = re.compile(r"[0-9]{4,8}|[0-9]{8}T[0-9]{0,6}", re.ASCII)
_AT = re.compile(r"at:([0-9]{8}T[0-9]{6}Z)", re.ASCII)
_SHOWN = 8


def at(time: datetime) -> str:
    """Return the name of the newest point that is not later than a time."""
    return f"at:{time.astimezone(UTC):%Y%m%dT%H%M%SZ}"


def is_id(text: str) -> bool:
    """Whether a text is the id of a point, which always means the same one."""
    try:
        return bool(point_id(text))
    except InvalidName:
        return False


def is_prefix(text: str) -> bool:
    """Whether a text may be the beginning of an id, and is not all of it."""
    return _PREFIX.fullmatch(text) is not None


def check(text: str) -> str:
    """Return a text that may name a point. Raises InvalidName."""
    if _LATEST.fullmatch(text) or is_prefix(text) or is_id(text) or _time(text):
        return text
    raise InvalidName(
        f"{text!r:.120} is not the name of a recovery point; examples: 20261123T041500Z, 20261123T04 "
        "(the beginning of an id), latest, latest~1"
    )


def resolve(wanted: str, ids: Sequence[PointId], vm: VmName) -> PointId:
    """Return the point that is meant. ids: of all points that there are, oldest first.

    Raises NoSuchPoint, AmbiguousPoint, InvalidName.
    """
    check(wanted)
    if latest := _LATEST.fullmatch(wanted):
        return _latest(int(latest[1] or 0), ids, vm)
    if time := _time(wanted):
        return _before(time, ids, vm)
    found = [one for one in ids if one.startswith(wanted)]
    if len(found) > 1:
        raise _ambiguous(wanted, found, vm)
    if not found:
        text = f"{vm} has no recovery point {wanted} in this repository"
        if is_prefix(wanted):
            text = f"{vm} has no recovery point in this repository whose id begins with {wanted}"
        raise _none(text, vm, did_you_mean(wanted, ids))
    return found[0]


def _time(text: str) -> datetime | None:
    """Return the time in an `at:` name; None for any other text."""
    match = _AT.fullmatch(text)
    return point_time(point_id(match[1])) if match else None


def _latest(back: int, ids: Sequence[PointId], vm: VmName) -> PointId:
    if not ids:
        raise _none(f"{vm} has no recovery points in this repository", vm)
    if back >= len(ids):
        there = f"{len(ids)} recovery point{'' if len(ids) == 1 else 's'}"
        raise _none(f"{vm} has only {there}, so there is no {LATEST}~{back}; the oldest is {ids[0]}", vm)
    return ids[-1 - back]


def _before(time: datetime, ids: Sequence[PointId], vm: VmName) -> PointId:
    found = [one for one in ids if point_time(one) <= time]
    if not found:
        oldest = f"; the oldest is {ids[0]}" if ids else ""
        raise _none(f"{vm} has no recovery point as old as {time:%Y-%m-%d %H:%M:%S} UTC{oldest}", vm)
    return found[-1]


def _ambiguous(wanted: str, found: Sequence[PointId], vm: VmName) -> AmbiguousPoint:
    listed = ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
    return AmbiguousPoint(
        f"{wanted} is ambiguous: the ids of {len(found)} recovery points of {vm} begin so: {listed}",
        state=UNTOUCHED,
        hint="give more of the id",
        next_command=f"backupctl list {vm}",
    )


def _none(message: str, vm: VmName, hint: str = "") -> NoSuchPoint:
    return NoSuchPoint(message, state=UNTOUCHED, hint=hint, next_command=f"backupctl list {vm}")
