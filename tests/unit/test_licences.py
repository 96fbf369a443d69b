# SPDX-License-Identifier: GPL-2.0-or-later
"""Every file says under which licence it is, and every dependency's is written down."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINE = "SPDX-License-Identifier: GPL-2.0-or-later"
EXEMPT = {
    "LICENSE",
    "debian/changelog",  # their formats have no comments
    "debian/source/format",
}


def files() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the project can't be told")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    return sorted(name for name in set(listed.split("\0")) - EXEMPT if name and (ROOT / name).is_file())


def first_lines(name: str) -> str:
    content = (ROOT / name).read_bytes()
    if b"\0" in content[:8000]:
        return LINE  # a picture has no lines
    return "\n".join(content.decode().splitlines()[:2])


def test_every_file_begins_with_its_licence():
    assert len(files()) > 100
    assert [name for name in files() if LINE not in first_lines(name)] == []


def test_the_licence_of_every_dependency_is_written_down():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = {
        cells[0].strip(): cells[2]
        for row in page.splitlines()
        if len(cells := row.strip("|").split("|")) == 3
    }
    for dependency in project["dependencies"]:
        name = re.split(r"[><=~ ]", dependency)[0]
        assert name in rows, name
        assert re.search(r"GPL|BSD|MIT|CC0", rows[name]), name


def test_what_pins_the_packages_is_pinned_itself():
    text = (ROOT / "requirements-lock.txt").read_text()
    assert re.search(r"^pip-tools==\S+ \\\n\s+--hash=sha256:", text, re.MULTILINE)
    rule = (ROOT / "Makefile").read_text().split("\nlock:")[1].split("\n\n")[0]
    assert "--require-hashes -r requirements-lock.txt" in rule
