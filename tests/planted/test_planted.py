# SPDX-License-Identifier: GPL-2.0-or-later
"""The quick tests catch bugs that are planted into a copy of the product, one at a time.

`make planted` plants all of them, `make test` a sample.
"""

import ast
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
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
    """A copy of the product and its tests, in a directory of a short name: sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="bc-") as name:
        directory = Path(name)
        for part in ("backupctl", "tests", "fixtures", "docs"):
            shutil.copytree(ROOT / part, directory / part)
        shutil.copy(ROOT / "pyproject.toml", directory)
        yield directory


def play(directory: Path, *tests: str, options: Sequence[str] = ()) -> "subprocess.CompletedProcess[str]":
    """Run tests on the copy, with these options of pytest."""
    names = [f"tests/{test}" for test in tests]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    # In CI pytest tells whole differences, which takes minutes where the bytes of two images differ.
    for name in ("CI", "BUILD_NUMBER"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, "-m", "pytest", *QUICK, *options, f"--basetemp={directory / 't'}", *names],
        cwd=directory,
        env={**environment, "PYTHONPATH": str(directory), "BACKUPCTL_CACHE": str(CACHE)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@dataclass(frozen=True)
class Function:
    """A function or method of the product. start, end: where it stands in the module's text."""

    module: Path
    start: int
    end: int


@cache
def functions() -> dict[str, list[Function]]:
    """Return the functions of the product by their qualified names, each with its modules."""
    found: dict[str, list[Function]] = defaultdict(list)
    for path in sorted((ROOT / "backupctl").rglob("*.py")):
        text = path.read_text()
        starts = [0, *itertools.accumulate(map(len, text.splitlines(keepends=True)))]
        for name, node in named(ast.parse(text)):
            module = path.relative_to(ROOT)
            found[name].append(Function(module, starts[node.lineno - 1], starts[node.end_lineno]))
    return found


def named(parent: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, ast.stmt]]:
    for node in parent.body:
        if isinstance(node, ast.ClassDef):
            yield from named(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node


def planted(bug: Bug) -> tuple[Path, str]:
    """Return the module that the bug goes into, relative to ROOT, and its text with the bug."""
    found = []
    for function in functions()[bug.function]:
        text = (ROOT / function.module).read_text()
        body = text[function.start : function.end]
        found += [(function, text)] * body.count(bug.old)
    modules = [str(function.module) for function, _ in found]
    assert len(found) == 1, f"{bug.name}: {bug.function} holds the old text {len(found)} times: {modules}"
    ((function, text),) = found
    body = text[function.start : function.end].replace(bug.old, bug.new)
    return function.module, text[: function.start] + body + text[function.end :]


def test_each_bug_can_be_planted_and_has_a_name_of_its_own():
    for bug in BUGS:
        module, text = planted(bug)
        compile(text, str(module), "exec")
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 25


def test_each_bug_names_a_test_that_is_there(copy):
    done = play(copy, *sorted({bug.test for bug in BUGS}), options=["--collect-only"])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


@pytest.mark.parametrize(
    ("function", "old"),
    [
        pytest.param("PendingPoint.commit", "no such text", id="text that is not there"),
        pytest.param("PendingPoint.comit", "manifest", id="function that is not there"),
        pytest.param("PendingPoint.commit", "durable", id="text that is there twice"),
        pytest.param("_run", "def _run(", id="text in several functions of that name"),
    ],
)
def test_a_bug_without_just_one_place_is_refused(function, old):
    with pytest.raises(AssertionError, match="holds the old text"):
        planted(Bug("", function, old, "", ""))


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
    module, text = planted(bug)
    (copy / module).write_text(text)
    done = play(copy, bug.test)
    assert done.returncode == FAILED, done.stdout[-3000:] + done.stderr
    record_property("cases", ("planted bugs, each caught", 1))
