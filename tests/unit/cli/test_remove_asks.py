# SPDX-License-Identifier: GPL-2.0-or-later
"""`remove` asks on a terminal, and needs --yes where it cannot."""

import sys

import click
import pytest

from backupctl.repository.repository import Repository
from tests.screens.terminal import Look, look_at
from tests.unit.points import P1, Builder, disk_entry

TERMINAL, PIPE = Look(80, "utf-8", False), Look(0, "utf-8", False)


class Keyboard:
    def isatty(self) -> bool:
        return True


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Call `remove vm1`; returns what is seen, and whether vm1 is still there."""
    builder = Builder(Repository.create(tmp_path / "r"))
    builder.point(P1, (disk_entry(), [(0, b"x")]))
    (tmp_path / "c.toml").write_text("[vm.vm1]\n")
    where = ("--repository", str(tmp_path / "r"), "--config", str(tmp_path / "c.toml"))

    def call(*words: str, look: Look = TERMINAL) -> tuple[str, bool]:
        monkeypatch.setattr(sys, "stdin", Keyboard())
        seen = look_at(["remove", "vm1", *words, *where], look, monkeypatch)
        return seen, builder.directory.exists()

    return call


@pytest.mark.parametrize("answer", [True, False])
def test_the_answer_counts(call, monkeypatch, answer):
    asked: list[str] = []
    monkeypatch.setattr(click, "confirm", lambda text, **_options: asked.append(text) or answer)
    seen, there = call()
    assert asked[0].startswith("Remove all 1 point of vm1, ")
    assert there is not answer
    assert ("exit code 0" if answer else "not confirmed") in seen
    assert ("`backupctl recover vm1`" in " ".join(seen.split())) is answer


def test_without_a_terminal_or_for_a_program_it_needs_a_word(call, monkeypatch):
    monkeypatch.setattr(click, "confirm", None)
    for seen, there in (call(look=PIPE), call("--json")):
        assert "remove needs --yes where it cannot ask" in " ".join(seen.split())
        assert there
    assert call("--yes", look=PIPE)[1] is False
