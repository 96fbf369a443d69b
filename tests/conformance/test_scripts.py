# SPDX-License-Identifier: GPL-2.0-or-later
from pathlib import Path

import pytest

from tests.conformance import scripts, session, together

assert scripts.bitmaps  # registers the scripts


@pytest.mark.parametrize("name", sorted(session.SCRIPTS))
def test_all_answer_alike(name: str, short_directory: Path) -> None:
    """All subjects answer a script alike, field by field, but for what `differences` allows."""

    def play(subject: str) -> session.Transcript:
        own = short_directory / subject
        own.mkdir()
        return session.play(name, subject, own)

    assert together.check(name, play) == {}


def test_there_are_at_least_sixty_scripts() -> None:
    """The suite has the size that was promised."""
    assert len(session.SCRIPTS) >= 60
