# SPDX-License-Identifier: GPL-2.0-or-later
"""Compares two transcripts field by field; every difference says where it is."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.conformance.session import Transcript

ABSENT = "<absent>"


@dataclass(frozen=True)
class Difference:
    """One field that differs. where: e.g. ``replies[2 blockdev-add].error.desc``."""

    where: str
    left: Any
    right: Any

    def __str__(self) -> str:
        return f"{self.where}: {self.left!r} / {self.right!r}"


def transcripts(left: Transcript, right: Transcript) -> list[Difference]:
    """Return all differences of two transcripts of one script."""
    found: list[Difference] = []
    for number in range(max(len(left.replies), len(right.replies))):
        one, other = _at(left.replies, number), _at(right.replies, number)
        label = (other if one == ABSENT else one)[0]
        found += values(
            f"replies[{number} {label}]", *(ABSENT if side == ABSENT else side[1] for side in (one, other))
        )
    for number in range(max(len(left.events), len(right.events))):
        one, other = _at(left.events, number), _at(right.events, number)
        found += values(f"events[{number}]", one, other)
    return found


def values(where: str, left: Any, right: Any) -> Iterator[Difference]:
    """Yield the differences of two JSON values."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted(left.keys() | right.keys()):
            yield from values(f"{where}.{key}", left.get(key, ABSENT), right.get(key, ABSENT))
    elif isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        for number, (one, other) in enumerate(zip(left, right, strict=True)):
            yield from values(f"{where}[{number}]", one, other)
    elif left != right or type(left) is not type(right):
        yield Difference(where, left, right)


def _at(items: list[Any], number: int) -> Any:
    return items[number] if number < len(items) else ABSENT
