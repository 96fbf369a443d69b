# SPDX-License-Identifier: GPL-2.0-or-later
"""What the quick tier is worth: bugs planted into a copy of the product, one at a time, are caught by it.

All of them are `make planted`; `make test` plays a sample.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fixtures.debian import CACHE
from tests.conftest import ROOT
from tests.planted.bugs import BUGS, Bug

SECONDS = 600
FAILED = 1  # pytest's exit code; a test that can't be collected or is not there has others
SAMPLE = [bug.name for bug in BUGS if bug.test.startswith("unit/")][::4]
QUICK = ["-p", "no:xdist", "-p", "no:randomly", "-p", "no:cacheprovider", "-q", "-x", "-m", "not slow"]


@pytest.fixture
def copy() -> Iterator[Path]:
    """A copy of the product and its tests, in a folder of a short name: sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="bc-") as name:
        folder = Path(name)
        for part in ("backupctl", "tests", "fixtures", "docs"):
            shutil.copytree(ROOT / part, folder / part)
        shutil.copy(ROOT / "pyproject.toml", folder)
        yield folder


def play(folder: Path, *tests: str) -> "subprocess.CompletedProcess[str]":
    """Run tests on the copy."""
    names = [f"tests/{test}" for test in tests]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", *QUICK, f"--basetemp={folder / 't'}", *names],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(folder), "BACKUPCTL_CACHE": str(CACHE)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def planted(bug: Bug) -> str:
    text = (ROOT / "backupctl" / bug.module).read_text()
    assert text.count(bug.old) == 1, f"{bug.module} has changed"
    return text.replace(bug.old, bug.new)


def test_each_bug_can_be_planted_and_has_a_name_of_its_own():
    for bug in BUGS:
        compile(planted(bug), bug.module, "exec")
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 25


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
def test_without_a_bug_those_tests_pass_on_the_copy(copy):
    done = play(copy, *sorted({bug.test for bug in BUGS}))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize(
    "bug",
    [pytest.param(bug, id=bug.name, marks=() if bug.name in SAMPLE else pytest.mark.slow) for bug in BUGS],
)
def test_a_planted_bug_is_caught(bug, copy, record_property):
    (copy / "backupctl" / bug.module).write_text(planted(bug))
    done = play(copy, bug.test)
    assert done.returncode == FAILED, done.stdout[-3000:] + done.stderr
    record_property("cases", ("planted bugs, each caught", 1))
