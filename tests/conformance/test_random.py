# SPDX-License-Identifier: GPL-2.0-or-later
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conformance import sequences, subjects, together
from tests.conformance.session import Session, Transcript
from tests.conformance.together import Pair

# One seed draws one sequence; the long run may be made longer still.
QUICK = range(100)
LONG = range(1000, 1000 + int(os.environ.get("BACKUPCTL_SEQUENCES", "1000")))


@pytest.mark.parametrize("seed", QUICK)
def test_a_random_sequence_is_answered_alike(seed: int, short_directory: Path) -> None:
    """Replies, events, bitmaps and bytes of a random sequence are the same on the oldest and the newest."""
    _compare(sequences.draw(seed), seed, short_directory, subjects.ENDS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", LONG)
def test_a_longer_random_sequence_is_answered_alike(seed: int, short_directory: Path) -> None:
    """The same for many sequences more, of twice the length, on all subjects."""
    _compare(sequences.draw(seed, 50), seed, short_directory, subjects.PAIRS)


def _compare(steps: list[sequences.Step], seed: int, directory: Path, among: list[Pair]) -> None:
    for pair, found in together.check("random", _player(steps, directory / "whole"), among).items():
        story = "\n".join(f"  {step}" for step in _cut_down(steps, pair, directory))
        unlike = "\n".join(found[:20])
        pytest.fail(f"seed {seed}, {'~'.join(pair)}:\n{unlike}\nwhat is enough to see a difference:\n{story}")


def _cut_down(steps: list[sequences.Step], pair: Pair, directory: Path) -> list[sequences.Step]:
    """Leave out, one at a time from the last, the steps without which the subjects still differ."""
    for number in reversed(range(len(steps))):
        fewer = steps[:number] + steps[number + 1 :]
        if together.differing("random", _player(fewer, directory / f"without-{number}"), [pair]):
            steps = fewer
    return steps


def _player(steps: list[sequences.Step], directory: Path) -> Callable[[str], Transcript]:
    def play(name: str) -> Transcript:
        own = directory / name
        own.mkdir(parents=True)
        with subjects.started(name, own) as subject:
            session = Session(subject)
            sequences.Player(session).play(steps)
            return session.finish()

    return play


def test_a_seed_always_draws_the_same_sequence() -> None:
    """A failure can be repeated from its seed."""
    assert sequences.draw(7) == sequences.draw(7)
    assert sequences.draw(7) != sequences.draw(8)
