# SPDX-License-Identifier: GPL-2.0-or-later
"""Every file, directory, test, make target, command and option that the pages name is there."""

import re
from functools import cache
from pathlib import Path

import click
import pytest

from backupctl.cli.main import cli
from backupctl.drills.catalog import DRILLS
from tests.conftest import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
OUTSIDE = {
    "reader.py",  # the program that docs/repository.md prints, under the name that the page proposes
    "legacy.py",  # a module of qemu.qmp
}
DIRECTORIES = ("backupctl", "docs", "fixtures", "tests", ".ci")
"""A path that begins with one of these is one in this tree."""

Code = list[str]
"""Pieces of code of a page: code spans, and the lines of its blocks."""


def current(page: Path) -> str:
    """Return a page, but of the changelog only what is not released: older entries may name what has gone."""
    return "\n## ".join(page.read_text().split("\n## ")[: 2 if page.name == "CHANGELOG.md" else None])


def code(text: str) -> Code:
    """Return the code of a page: code spans, and the lines of its blocks, but for those of Python."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language != "python":
            found += block.replace("\\\n", " ").splitlines()
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.compile(r"^(?: {4}| {6}).*$", re.MULTILINE)
    # In a list an indented line may also be prose, which is no command: see `commands`.
    found += [line.strip() for line in "\n".join(indented.findall(rest)).replace("\\\n", " ").splitlines()]
    found += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]
    return found


@cache
def files() -> frozenset[str]:
    """Return the paths of all files of the tree, from its root on, and those of its directories."""
    skipped = {".git", ".venv", ".cache", ".mypy_cache", ".ruff_cache", ".pytest_cache", "__pycache__"}
    found = set()
    directories = [ROOT]
    while directories:
        for path in directories.pop().iterdir():
            if path.name not in skipped:
                found.add(str(path.relative_to(ROOT)))
                if path.is_dir() and not path.is_symlink():
                    directories.append(path)
    return frozenset(found)


def is_there(name: str) -> bool:
    return any(path == name or path.endswith(f"/{name}") for path in files())


def unknown_files(text: str) -> list[str]:
    """Return the names of files, directories and modules that are not in the tree."""
    spans = [*code(text), *(target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target)]
    named = set()
    for span in spans:
        named |= {
            name
            for name in re.findall(r"(?<![\w/.~$*{…-])[\w./-]+\.(?:py|sh|md|txt)(?![\w/*{…])", span)
            if not name.startswith("/")
        }
        named |= set(re.findall(rf"(?<![\w/.-])(?:{'|'.join(map(re.escape, DIRECTORIES))})/[\w./-]+", span))
        for module in re.findall(r"(?<![\w/])(?:backupctl|fixtures|tests)(?:\.[a-z_]+)+\b", span):
            path = module.replace(".", "/")
            if not module.endswith((".toml", ".service", ".timer", ".md")):
                named.add(path if is_there(path) else f"{path}.py")
    return sorted(
        name for name in named - OUTSIDE if not is_there(re.sub(r"^\.{1,2}/", "", name).rstrip("/."))
    )


@cache
def all_tests() -> frozenset[str]:
    """Return the names of all test functions."""
    found = set()
    for name in files():
        if name.startswith("tests/") and name.endswith(".py"):
            found |= set(re.findall(r"^def (test_\w+)\(", (ROOT / name).read_text(), re.MULTILINE))
    return frozenset(found)


def unknown_tests(text: str) -> list[str]:
    """Return the names of tests which no test has."""
    named = {name for span in code(text) for name in re.findall(r"(?<![\w/])test_\w+(?![\w.])", span)}
    return sorted(named - all_tests())


def unknown_targets(text: str) -> list[str]:
    """Return the targets of `make` that the Makefile has not."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        target for span in code(text) for target in re.findall(r"(?:^|[;&|(] ?)make ([a-z][a-z-]*)", span)
    }
    return sorted(named - targets)


@cache
def commands() -> dict[str, frozenset[str]]:
    """Return every command, those of a group with its name before, and what options each takes."""
    found: dict[str, frozenset[str]] = {}

    def walk(command: click.Command, name: str, above: frozenset[str]) -> None:
        own = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
        found[name] = options = above | own | {"--help"}
        if isinstance(command, click.Group):
            context = click.Context(command)
            for one in command.list_commands(context):
                inner = command.get_command(context, one)
                assert inner is not None
                walk(inner, f"{name} {one}".strip(), options)

    walk(cli, "", frozenset())
    return found


def command_of(words: list[str]) -> tuple[str, str]:
    """Return the command that some words begin with, and the first word that is none of its kind."""
    name = ""
    for word in words:
        longer = f"{name} {word}".strip()
        if longer not in commands():
            groups = {one.rsplit(" ", 1)[0] if " " in one else "" for one in commands() if one}
            return name, word if name in groups and not word.startswith("-") else ""
        name = longer
    return name, ""


def unknown_options(text: str) -> list[str]:
    """Return the commands and options in code of a page which click does not know."""
    names = {name.split(" ")[0] for name in commands()} - {""}
    unknown = []
    for span in code(text):
        body, _, comment = span.partition(" # ")
        calls = re.split(r"(?<![\w./-])(?=backupctl )|\s\|{1,2}\s|&&|;\s", body)
        calls[-1] += f" {comment}"  # what a comment says of options is said of the call before it
        for call in calls:
            words = [word.strip("[]().,:…'\"") for word in call.split()]
            program = Path(words[0]).name if words else ""
            if program == "backupctl" and len(words) > 1:
                name, stranger = command_of(words[1:])
                if re.fullmatch(r"[a-z-]+", stranger):
                    unknown.append(f"backupctl {name} {stranger}".replace("  ", " "))
            elif program in names and len(words) > 1:
                name, _ = command_of(words)
            elif program.startswith("--"):
                name = ""
            else:
                continue
            known = commands()[name] if name else frozenset[str]().union(*commands().values())
            options = [option[0] for word in words if (option := re.match(r"--[a-z][a-z-]*", word))]
            unknown += [f"{name} {option}".strip() for option in options if option not in known]
    return sorted(set(unknown))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page):
    assert unknown_files(current(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_is_there(page):
    assert unknown_tests(current(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_target_that_a_page_names_is_in_the_makefile(page):
    assert unknown_targets(current(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_that_a_page_names_is_known(page):
    assert unknown_options(current(page)) == []


def test_the_architecture_has_a_line_for_each_module():
    page = (ROOT / "docs/architecture.md").read_text()
    modules = {
        name.removeprefix("backupctl/") for name in files() if re.match(r"backupctl/.*[^_]\.py$", name)
    }
    apart = {name for name in modules if name.startswith("simulator/")}
    assert [name for name in sorted(modules - apart) if f"`{name}`" not in page] == []


def test_every_command_is_on_the_first_page():
    readme = (ROOT / "README.md").read_text()
    names = {name.split(" ")[0] for name in commands()} - {""}
    assert [name for name in sorted(names) if not re.search(rf"backupctl {name}\b|`{name}`", readme)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_heading_comes_twice(page):
    headings = re.findall(r"^##+ .*$", current(page), re.MULTILINE)
    assert sorted(headings) == sorted(set(headings))


def test_the_first_page_counts_the_drills():
    (number,) = re.findall(r"break a simulated VM in (\d+) ways", (ROOT / "README.md").read_text())
    assert int(number) == len(DRILLS)


def test_every_key_of_the_configuration_page_is_in_the_example_and_the_other_way_round():
    page = (ROOT / "docs/configuration.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    keys = {key for row in rows for key in re.findall(r"`([a-z_]+)`", row.split(" | ")[0])}
    example = (ROOT / "fixtures/backupctl.example.toml").read_text()
    assert {key for key in keys if not re.search(rf"\b{key}\b", example)} == set()
    assert set(re.findall(r"^(\w+) = ", example, re.MULTILINE)) - {"virtio0"} <= keys


@pytest.mark.parametrize(
    ("check", "text", "wrong"),
    [
        (unknown_files, "see `vm/qmp/no_such_module.py`", ["vm/qmp/no_such_module.py"]),
        (unknown_files, "[a page](no-such-page.md)", ["no-such-page.md"]),
        (unknown_files, "in `tests/no_such_directory/`", ["tests/no_such_directory/"]),
        (unknown_files, "`python -m fixtures.no_such_bench`", ["fixtures/no_such_bench.py"]),
        (
            unknown_files,
            "`/etc/backupctl/a.py`, `/var/log/backupctl.log`, `recorder.py`, [page](docs/protocol.md#7-copy)",
            [],
        ),
        (
            unknown_tests,
            "shown by `test_no_such_test`, in `tests/unit/test_floors.py`",
            ["test_no_such_test"],
        ),
        (unknown_targets, "run `make no-such-target`, or `make test`", ["no-such-target"]),
        (unknown_targets, "Run\n\n    make tset    # all of it\n", ["tset"]),
        (unknown_options, "call `backupctl frobnicate web`", ["backupctl frobnicate"]),
        (unknown_options, "call `full --no-such-option`", ["full --no-such-option"]),
        (unknown_options, "with `--no-such-option` and `--json`", ["--no-such-option"]),
        (unknown_options, "    backupctl list web --to /srv/x\n", ["list --to"]),
        (
            unknown_options,
            "    /opt/bin/backupctl full web --quiet || backupctl recover web --x\n",
            ["recover --x"],
        ),
        (unknown_options, "`qemu-img bitmap --remove`, `backupctl full web --qmp X`", []),
    ],
)
def test_what_is_not_there_is_found(check, text, wrong):
    assert check(text) == wrong


def test_what_the_package_names_as_a_proof_exists():
    """A test, or a section of a page, by which a docstring or a comment shows what it says."""
    tests = [path.read_text() for path in (ROOT / "tests").rglob("*.py")]
    known = {name for text in tests for name in re.findall(r"def (test_\w+)", text)}
    known |= {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    missing = []
    for path in (ROOT / "backupctl").rglob("*.py"):
        text = " ".join(path.read_text().replace("#", " ").split())
        missing += [(path.name, name) for name in re.findall(r"\btest_\w+", text) if name not in known]
        for page, section in re.findall(r'(docs/[\w-]+\.md), "([^"]+)"', text):
            if f"## {section}\n" not in (ROOT / page).read_text():
                missing.append((path.name, f"{page}, {section}"))
    assert missing == []
