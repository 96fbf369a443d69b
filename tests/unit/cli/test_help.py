# SPDX-License-Identifier: GPL-2.0-or-later
"""The help: every command in its section, the same short options everywhere, examples that parse."""

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from backupctl.cli import main
from backupctl.cli.help import Documented, Group
from backupctl.cli.main import cli
from backupctl.repository.repository import Repository
from tests.unit.parsing import parse
from tests.unit.points import P1, P2, Builder, disk_entry

SHORT = {
    "--help": "-h",
    "--version": "-V",
    "--config": "-c",
    "--dry-run": "-n",
    "--quiet": "-q",
    "--verbose": "-v",
}
"""Short options that people know, each with one meaning in every command."""


def every_command(
    command: click.Command = cli, name: str = "backupctl"
) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=name)
        for one in command.list_commands(context):
            found = command.get_command(context, one)
            assert found is not None
            yield from every_command(found, f"{name} {one}")


COMMANDS = dict(every_command())


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """A configuration with the VMs `web` and `vm1`, and a repository with two points of `vm1`."""
    builder = Builder(Repository.create(tmp_path / "r"))
    for point, content in ((P1, b"x"), (P2, b"y")):
        builder.point(point, (disk_entry(), [(0, content)]))
    path = tmp_path / "backupctl.toml"
    path.write_text(
        f'[defaults]\nrepository = "{tmp_path}/r"\n[vm.web]\nqmp = "unix:/q"\n[vm.vm1]\nqmp = "unix:/p"\n'
    )
    monkeypatch.setenv("BACKUPCTL_CONFIG", str(path))


def failed(*words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Call the command line, which must refuse; return its error."""
    monkeypatch.setattr("sys.argv", ["backupctl", *words])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_every_command_is_in_one_section():
    named = [name for names in main.SECTIONS.values() for name in names]
    assert sorted(named) == cli.list_commands(click.Context(cli))
    assert isinstance(cli, Group)
    text = cli.get_help(click.Context(cli))
    assert [text.index(f"\n{heading}:\n") for heading in cli.sections] == sorted(
        text.index(f"\n{heading}:\n") for heading in main.SECTIONS
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_a_short_option_means_the_same_everywhere(name):
    command = COMMANDS[name]
    options = [one for one in command.params if isinstance(one, click.Option)]
    for opts in (one.opts for one in options):
        long = max(opts, key=len)
        wanted = SHORT.get(long) if (name, long) != ("backupctl simulate", "--version") else None
        assert [opt for opt in opts if not opt.startswith("--")] == ([wanted] if wanted else [])


@pytest.mark.parametrize("name", COMMANDS)
def test_h_is_help(name):
    done = CliRunner().invoke(cli, [*name.split()[1:], "-h"], prog_name="backupctl")
    assert (done.exit_code, done.output.split(" [")[0]) == (0, f"Usage: {name}")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_of_itself_that_fit_a_terminal(name):
    command = COMMANDS[name]
    assert isinstance(command, Documented)
    assert command.examples
    for example in command.examples:
        assert example.line.startswith(name)
        assert len(example.line) <= 80 - len("    ")


def test_every_example_is_taken_by_the_parser(configured, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "backupctl.toml").chmod(0o600)
    for command in COMMANDS.values():
        assert isinstance(command, Documented)
        for example in command.examples:
            parse(shlex.split(example.line)[1:])


def test_an_example_with_a_mistake_is_not_taken(configured):
    for line in ("full web --qpm x", "full", "incremental web --limit fast", "lst", "config shw"):
        with pytest.raises(click.UsageError):
            parse(line.split())


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("ful web", "Did you mean 'full'?"),
        ("config chck", "Did you mean 'check'?"),
        ("prune --dry-rn", "Did you mean '--dry-run'?"),
        ("status wbe", "did you mean 'web'?"),
        ("status vm1 wbe", "did you mean 'web'?"),
        ("show vm2 latest", "did you mean 'vm1'?"),
        ("verify vm2", "did you mean 'vm1'?"),
        ("show vm1 latst", "did you mean 'latest'?"),
        (f"show vm1 {P1[:-2]}9Z", f"did you mean '{P1}'?"),
        ("drill sigtrem", "did you mean 'sigterm'?"),
    ],
)
def test_what_was_misspelt_is_named(configured, monkeypatch, capsys, words, meant):
    assert meant in failed(*words.split(), monkeypatch=monkeypatch, capsys=capsys)


def test_what_is_like_nothing_is_not_guessed(configured, monkeypatch, capsys):
    for words in ("xyzzy", "status xyzzy", "show xyzzy latest", "show vm1 xyzzy", "drill xyzzy"):
        assert "ou mean" not in failed(*words.split(), monkeypatch=monkeypatch, capsys=capsys)


def on_a_terminal(columns: int, *words: str, **environment: str) -> str:
    """Call the program on a terminal of its own; return all that it writes there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    kept = {
        name: os.environ[name] for name in os.environ if name not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")
    }
    child = subprocess.Popen(
        [sys.executable, "-m", "backupctl", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**kept, "TERM": "xterm-256color", **environment},
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # EIO: the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(ours)
    child.wait(timeout=60)
    return seen.decode()


COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7])[;m]")


def test_colours_are_for_terminals_and_not_with_no_color(configured):
    words = ("diff", "vm1", P1, P2)
    assert COLOUR.search(on_a_terminal(80, *words))
    assert not COLOUR.search(on_a_terminal(80, *words, NO_COLOR="1"))
    assert "\x1b[" not in on_a_terminal(80, *words, TERM="dumb")
    piped = subprocess.run(
        [sys.executable, "-m", "backupctl", *words], capture_output=True, text=True, timeout=60, check=True
    )
    assert "\x1b[" not in piped.stdout


def test_help_is_as_wide_as_the_terminal_or_columns_say():
    def widest(text: str) -> int:
        return max(len(line.rstrip("\r")) for line in text.split("\n"))

    assert 40 < widest(on_a_terminal(60, "-h")) <= 60
    assert 60 < widest(on_a_terminal(100, "-h")) <= 80  # wider is harder to read
    assert 40 < widest(on_a_terminal(100, "-h", COLUMNS="60")) <= 60
