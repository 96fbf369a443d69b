# SPDX-License-Identifier: GPL-2.0-or-later
import os
from pathlib import Path

import pytest

from tests.conformance import compare, differences, sequences, subjects
from tests.conformance.session import Session, Transcript

# One seed draws one sequence; the long run may be made longer still.
QUICK = range(100)
LONG = range(1000, 1000 + int(os.environ.get("BACKUPCTL_SEQUENCES", "1000")))


@pytest.mark.parametrize("pair", subjects.PAIRS, ids="~".join)
@pytest.mark.parametrize("seed", QUICK)
def test_a_random_sequence_is_answered_alike(seed: int, pair: tuple[str, str], short_folder: Path) -> None:
    """Replies, events, bitmaps and bytes of a random sequence are the same on both subjects."""
    _compare(sequences.draw(seed), seed, pair, short_folder)


@pytest.mark.slow
@pytest.mark.parametrize("pair", subjects.PAIRS, ids="~".join)
@pytest.mark.parametrize("seed", LONG)
def test_a_longer_random_sequence_is_answered_alike(
    seed: int, pair: tuple[str, str], short_folder: Path
) -> None:
    """The same for many sequences more, of twice the length."""
    _compare(sequences.draw(seed, 50), seed, pair, short_folder)


def _compare(steps: list[sequences.Step], seed: int, pair: tuple[str, str], folder: Path) -> None:
    found = _differences(steps, pair, folder / "whole")
    if not found:
        return
    fewest = _cut_down(steps, pair, folder)
    story = "\n".join(f"  {step}" for step in fewest)
    pytest.fail(f"seed {seed}:\n" + "\n".join(found[:20]) + f"\nwhat is enough to see a difference:\n{story}")


def _cut_down(steps: list[sequences.Step], pair: tuple[str, str], folder: Path) -> list[sequences.Step]:
    """Leave out, one at a time from the last, the steps without which the subjects still differ."""
    for number in reversed(range(len(steps))):
        fewer = steps[:number] + steps[number + 1 :]
        if _differences(fewer, pair, folder / f"without-{number}"):
            steps = fewer
    return steps


def _differences(steps: list[sequences.Step], pair: tuple[str, str], folder: Path) -> list[str]:
    left, right = (_played(steps, subject, folder / subject) for subject in pair)
    found = compare.transcripts(left, right)
    return [str(each) for each in found if not differences.allowed("random", pair, each)]


def _played(steps: list[sequences.Step], name: str, folder: Path) -> Transcript:
    subjects.required(name)
    folder.mkdir(parents=True)
    with subjects.started(name, folder) as subject:
        session = Session(subject)
        sequences.Player(session).play(steps)
        return session.finish()


def test_a_seed_always_draws_the_same_sequence() -> None:
    """A failure can be repeated from its seed."""
    assert sequences.draw(7) == sequences.draw(7)
    assert sequences.draw(7) != sequences.draw(8)
