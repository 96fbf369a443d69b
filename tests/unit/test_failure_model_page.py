# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/failure-model.md promises nothing that no test proves."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
PAGE = (TESTS.parent / "docs" / "failure-model.md").read_text()
NAME = re.compile(r"`(test_\w+)`")


def rows() -> list[list[str]]:
    """Return the cells of every row that tells what fails."""
    lines = [line.strip("|").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
    return [cells for cells in lines if len(cells) == 4 and cells[0].strip() != "what"]


def test_every_test_that_the_page_names_is_there():
    text = "\n".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    there = set(re.findall(r"^def (test_\w+)\(", text, re.MULTILINE))
    assert set(NAME.findall(PAGE)) - there == set()


def test_every_row_names_a_test_and_a_promise_that_is_made():
    promised = set(re.findall(r"\*\*(P\d)", PAGE))
    assert promised == {f"P{number}" for number in range(1, 8)}
    assert len(rows()) > 50
    for what, _then, promise, proof in rows():
        assert NAME.search(proof), what
        assert re.findall(r"P\d", promise), what
