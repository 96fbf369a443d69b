# SPDX-License-Identifier: GPL-2.0-or-later
"""Plays the same on every subject, once on each, and compares them pair by pair."""

from collections.abc import Callable, Iterable, Sequence

import pytest

from tests.conformance import compare, differences, subjects
from tests.conformance.session import Transcript

Pair = tuple[str, str]


def check(
    script: str, play: Callable[[str], Transcript], among: Sequence[Pair] = subjects.PAIRS
) -> dict[Pair, list[str]]:
    """Return how the pairs that can be had here differ where they must not; empty if they don't.

    play: on one subject. among: the pairs to compare. The test is skipped if all that can be had are alike
    and one can't be had.
    """
    missing = {name: why for name in _named(among) if (why := subjects.missing(name))}
    pairs = [pair for pair in among if not missing.keys() & set(pair)]
    found = differing(script, play, pairs)
    if missing and not found:
        pytest.skip("; ".join(missing.values()))
    return found


def differing(script: str, play: Callable[[str], Transcript], pairs: Iterable[Pair]) -> dict[Pair, list[str]]:
    """Return the differences that are not on the list, by pair."""
    pairs = tuple(pairs)
    played = {name: play(name) for name in _named(pairs)}
    found = {}
    for pair in pairs:
        unlike = compare.transcripts(*(played[name] for name in pair))
        if told := [str(each) for each in unlike if not differences.allowed(script, pair, each)]:
            found[pair] = told
    return found


def _named(pairs: Iterable[Pair]) -> list[str]:
    return sorted({name for pair in pairs for name in pair})
