# SPDX-License-Identifier: GPL-2.0-or-later
"""What docs/versions.md promises is what the program has, and one version is written everywhere."""

import re
import tomllib

from backupctl import __version__
from backupctl.cli import common
from backupctl.repository import manifest
from tests.conftest import ROOT

PAGE = (ROOT / "docs/versions.md").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def test_the_version_is_the_same_everywhere_and_is_a_semantic_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
    assert re.fullmatch(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)", __version__)
    assert (ROOT / "debian/changelog").read_text().startswith(f"backupctl ({__version__}) ")


def test_the_exit_codes_on_the_page_are_those_of_the_program():
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)} == set(common.exit_codes())


def test_the_format_on_the_page_is_the_one_that_is_written():
    assert re.findall(r"today that is format (\d+)", PAGE) == [str(manifest.FORMAT)]


def test_the_changelog_has_a_place_for_what_is_not_released_and_only_known_sections():
    versions = re.findall(r"^## (.+)$", CHANGELOG, re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", one) for one in versions[1:])
    known = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", CHANGELOG, re.MULTILINE)) <= known
