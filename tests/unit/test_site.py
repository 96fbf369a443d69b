# SPDX-License-Identifier: GPL-2.0-or-later
"""The site of the documentation: it builds, no link of it leads nowhere, and its reference is complete."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures.site import reference
from tests.conftest import ROOT
from tests.unit.test_docs_names import commands


def build(tree: Path, to: Path) -> subprocess.CompletedProcess[str]:
    config = tree / "fixtures/site/mkdocs.yml"
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(to)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(tree)}
    return subprocess.run(call, cwd=tree, env=environment, capture_output=True, check=False, text=True)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """What the site is made from, to be changed by a test."""
    copied = tmp_path_factory.mktemp("tree")
    for name in ("backupctl", "docs", "fixtures/site"):
        shutil.copytree(ROOT / name, copied / name)
    for page in ROOT.glob("*.md"):
        shutil.copy(page, copied)
    (copied / "fixtures/__init__.py").write_text("")
    return copied


def test_the_site_builds_and_loads_nothing_from_elsewhere(tree, tmp_path):
    done = build(tree, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 30
    loaded = re.compile(r"<(?:script|img|iframe)\b[^>]*\bsrc=\"?http|<link rel=\"?stylesheet\"? href=\"?http")
    assert [page.name for page in pages if loaded.search(page.read_text())] == []


def test_each_link_that_leads_nowhere_is_an_error(tree, tmp_path):
    page = tree / "docs/faq.md"
    before = page.read_text()
    page.write_text(f"{before}\n[a](page.gone.md) [b](protocol.md#heading-gone) ![c](picture-gone.svg)\n")
    try:
        done = build(tree, tmp_path)
    finally:
        page.write_text(before)
    assert done.returncode != 0
    for gone in ("page.gone.md", "heading-gone", "picture-gone.svg"):
        assert gone in done.stdout + done.stderr


def test_every_command_is_in_the_reference():
    page = reference.pages()["commands.md"]
    assert [name for name in commands() if name and f"### backupctl {name}\n" not in page] == []


def test_every_page_of_the_documentation_is_in_the_navigation():
    listed = (ROOT / "fixtures/site/mkdocs.yml").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f": {page.name}\n" not in listed] == []


def test_every_key_of_a_json_document_is_on_its_page():
    page = (ROOT / "docs/json.md").read_text()
    source = "\n".join(path.read_text() for path in (ROOT / "backupctl/outcome/documents").glob("*.py"))
    keys = set(re.findall(r'^ +"(\w+)": ', source, re.MULTILINE)) - {"backup", "prune", "verify"}
    assert sorted(key for key in keys if f"`{key}`" not in page) == []
