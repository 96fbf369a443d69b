# SPDX-License-Identifier: GPL-2.0-or-later
"""Manual pages and completions are those of the commands; linters and real shells take them."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Self

import click
import msgspec
import pytest

from backupctl.cli import settings
from backupctl.cli.main import cli
from fixtures import manual
from tests.conftest import ROOT

SHARE = ROOT / "share"
PAGES = sorted(SHARE.glob("man/man?/*"))
READY = "READY"
PATIENCE = 60.0
COMPLETED = {
    "incr": "incremental",
    "full webs": "webserver",
    "incremental x --on-br": "--on-broken-chain",
}
"""What is typed, and what the shell is to offer: a command, a VM, an option."""


def need(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed here")


def test_what_is_kept_is_what_the_commands_say():
    kept = {str(path.relative_to(SHARE)): path.read_text() for path in SHARE.rglob("*") if path.is_file()}
    made = manual.pages()
    assert sorted(kept) == sorted(made)
    assert [name for name in made if made[name] != kept[name]] == [], (
        "run `make man`, and read the difference"
    )


def test_every_option_and_every_example_of_a_command_is_on_its_page():
    context = click.Context(cli, info_name="backupctl")
    for name in cli.list_commands(context):
        page = (SHARE / f"man/man1/backupctl-{name}.1").read_text().replace("\\-", "-")
        command = cli.get_command(context, name)
        shown = [one for one in command.params if isinstance(one, click.Option) and not one.hidden]
        assert [opt for one in shown for opt in one.opts if f"\\fB{opt}\\fR" not in page] == []
        assert [one.line for one in command.examples if f"\n{one.line}\n" not in page] == []


def test_every_key_of_the_configuration_is_on_its_page():
    page = (SHARE / "man/man5/backupctl.toml.5").read_text()
    keys = {*settings.settable(), *(one.name for one in msgspec.structs.fields(settings.File))}
    assert [key for key in sorted(keys) if not re.search(rf"(?:\\fB|\b){key}\b", page)] == []


def test_a_line_is_never_a_request():
    assert manual.roff(".SH x") == "\\&.SH x"
    assert manual.roff("'tis") == "\\&'tis"
    assert manual.roff(r"a\b --c `d`") == r"a\eb \-\-c \fBd\fR"
    assert all(not line.startswith((".", "'")) for line in manual._filled("a " * 38 + ".x 'y").split("\n"))


def test_pages_of_commands_that_no_longer_exist_are_removed(tmp_path):
    (tmp_path / "man/man1").mkdir(parents=True)
    (tmp_path / "man/man1/backupctl-gone.1").write_text("")
    manual.write(tmp_path)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == set(manual.pages())


def test_man_shows_every_page_without_a_warning():
    need("man")
    for page in PAGES:
        done = subprocess.run(
            ["man", "--warnings", "--local-file", str(page)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "MANWIDTH": "80"},
        )
        assert (done.returncode, done.stderr) == (0, ""), page
        assert "NAME" in done.stdout


def test_mandoc_takes_every_page():
    need("mandoc")
    done = subprocess.run(
        ["mandoc", "-Tlint", "-Wwarning", *map(str, PAGES)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # A date would change with every `make man`.
    assert [line for line in done.stdout.splitlines() if "missing date" not in line] == []


def test_all_of_it_is_installed_with_the_package():
    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    found = {
        f"{directory}/{path.name}"
        for directory, globs in files.items()
        for pattern in globs
        for path in ROOT.glob(pattern)
    }
    assert {f"share/{name}" for name in manual.pages()} <= found


@pytest.fixture
def environment(tmp_path):
    """The environment of a shell that knows this backupctl, and a configuration with a VM."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/backupctl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m backupctl "$@"\n')
    program.chmod(0o755)
    (tmp_path / "c.toml").write_text('[vm.webserver]\nqmp = "/q"\n')
    return {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TERM": "xterm",
        "HOME": str(tmp_path),
        "BACKUPCTL_CONFIG": str(tmp_path / "c.toml"),
    }


class Shell:
    """An interactive shell on a terminal of its own."""

    def __init__(self, words: list[str], environment: dict[str, str]) -> None:
        self._terminal, theirs = pty.openpty()
        self._child = subprocess.Popen(
            words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()
        os.close(self._terminal)

    def types(self, text: str, until: str) -> str:
        """Type a text; return what is shown up to another one."""
        os.write(self._terminal, text.encode())
        seen, end = "", time.monotonic() + PATIENCE
        while until not in seen:
            assert time.monotonic() < end, seen
            if select.select([self._terminal], [], [], 0.2)[0]:
                seen += os.read(self._terminal, 65536).decode(errors="replace")
        return seen


@pytest.mark.parametrize(
    ("words", "load"),
    [
        (["bash", "--norc", "--noprofile", "-i"], f". {SHARE}/bash-completion/completions/backupctl"),
        (
            ["zsh", "-f", "-i"],
            f"fpath=({SHARE}/zsh/site-functions $fpath); autoload -U compinit; compinit -u -D",
        ),
    ],
    ids=["bash", "zsh"],
)
def test_tab_completes_commands_options_and_vms(environment, words, load):
    need(words[0])
    for typed, wanted in COMPLETED.items():
        with Shell(words, environment) as shell:
            shell.types(f"{load}; echo {READY[:3]}''{READY[3:]}\n", READY)
            shell.types(f"backupctl {typed}\t", wanted)


def test_fish_completes_commands_options_and_vms(environment):
    need("fish")
    for typed, wanted in COMPLETED.items():
        load = f"source {SHARE}/fish/vendor_completions.d/backupctl.fish"
        done = subprocess.run(
            ["fish", "--no-config", "-c", f"{load}; complete -C 'backupctl {typed}'"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
            env=environment,
        )
        assert wanted in [line.split("\t")[0] for line in done.stdout.splitlines()]


def test_completions_are_where_the_shells_look():
    assert {path.parent.name for path in SHARE.glob("*/*/*") if path.parent.parent.name != "man"} == {
        "completions",
        "site-functions",
        "vendor_completions.d",
    }
    assert (SHARE / "zsh/site-functions/_backupctl").read_text().startswith("#compdef backupctl\n")
    assert Path(SHARE / "bash-completion/completions/backupctl").exists()
