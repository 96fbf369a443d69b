# SPDX-License-Identifier: GPL-2.0-or-later
from pathlib import Path

import pytest

from tests.conformance import compare, differences, scripts, session, subjects

assert scripts.bitmaps  # registers the scripts


@pytest.mark.parametrize("pair", subjects.PAIRS, ids="~".join)
@pytest.mark.parametrize("name", sorted(session.SCRIPTS))
def test_both_answer_alike(name: str, pair: tuple[str, str], short_folder: Path) -> None:
    """Both subjects answer a script alike, field by field, but for what `differences` allows."""
    left, right = (_played(name, subject, short_folder) for subject in pair)
    found = compare.transcripts(left, right)
    open_ones = [str(each) for each in found if not differences.allowed(name, pair, each)]
    assert not open_ones, "\n".join(open_ones)


def _played(name: str, subject: str, folder: Path) -> session.Transcript:
    own = folder / subject
    own.mkdir()
    subjects.required(subject)
    return session.play(name, subject, own)


def test_there_are_at_least_sixty_scripts() -> None:
    """The suite has the size that was promised."""
    assert len(session.SCRIPTS) >= 60
