# SPDX-License-Identifier: GPL-2.0-or-later
"""What the command line promises: exit codes, help, JSON, no escape sequences, no bare traceback."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from backupctl import errors
from backupctl.cli import common, output, reporters, units
from backupctl.cli.main import cli
from backupctl.errors import BackupctlError, UsageError
from backupctl.events import StepStarted
from backupctl.events.backup import DiskSkipped
from backupctl.events.prune import VmFailed
from backupctl.names import DiskName, PointId, vm_name
from backupctl.repository.repository import Repository
from backupctl.repository.vm_directory import AllPoints, VmDirectory
from fixtures import many_vms

COMMANDS = cli.list_commands(click.Context(cli))


def command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


def every_error(base: type[BackupctlError] = BackupctlError) -> list[type[BackupctlError]]:
    return [base, *(found for child in base.__subclasses__() for found in every_error(child))]


def backupctl(*arguments: str, cwd=None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "backupctl", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=cwd,
    )


@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
def test_every_error_has_a_documented_exit_code(kind):
    assert kind.exit_code in common.exit_codes()
    assert kind.exit_code != 0


def test_every_error_stands_in_the_tree_that_is_drawn():
    drawn = errors.__doc__ or ""
    missing = [kind.__name__ for kind in every_error() if kind.__name__ not in drawn]
    assert missing == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_tells_its_exit_codes_in_its_help(name):
    said = backupctl(name, "--help").stdout
    assert "Exit codes:" in said
    assert f"  0   {'OK: ' if name == 'check' else 'done'}" in said  # a plugin has codes of its own


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_text(name):
    options = [option for option in command(name).params if isinstance(option, click.Option)]
    assert [option.name for option in options if not option.help] == []


def test_a_missing_repository_is_a_usage_error_with_the_next_step():
    done = backupctl("full", "web", "--qmp", "unix:/nowhere")
    assert done.returncode == 2
    assert "no repository is configured" in done.stderr
    assert "--repository" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unreachable_monitor_is_told_and_nothing_is_left_in_the_repository(tmp_path):
    done = backupctl("full", "web", "--qmp", "unix:/nowhere", "--repository", str(tmp_path / "r"), "--json")
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "MonitorUnreachable"
    assert error["exit_code"] == 1
    assert error["step"] == "prepare"
    assert error["next"] == f"backupctl doctor web --qmp unix:/nowhere --repository {tmp_path / 'r'}"
    assert list(tmp_path.iterdir()) == []


def test_a_recover_that_can_not_reach_the_vm_says_whether_there_was_something_to_do(tmp_path):
    command = ("recover", "web", "--qmp", "unix:/nowhere", "--repository", str(tmp_path / "r"))
    directory = Repository.create(tmp_path / "r").vm(vm_name("web"))
    with directory.lock():
        pass  # which makes the VM's directory
    assert backupctl(*command).returncode == 1
    (directory.path / "20260101T000000Z.partial").mkdir()
    done = backupctl(*command)
    assert done.returncode == 3
    assert "backupctl recover web" in done.stderr
    assert [path.name for path in directory.path.glob("*.partial")] == ["20260101T000000Z.partial"]


@pytest.mark.parametrize("name", ["../web", "a/b", ".web", "web\n", "w" * 101, "web.partial", ""])
def test_a_name_that_could_leave_the_repository_is_refused(tmp_path, name):
    repository = tmp_path / "repository"
    done = backupctl("full", name, "--qmp", "unix:/nowhere", "--repository", str(repository))
    assert done.returncode == 2
    assert {path.name for path in tmp_path.iterdir()} <= {"repository"}


def test_wrong_options_leave_with_2_and_json_stays_json(tmp_path):
    done = backupctl("list", "--nonsense", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["kind"] == "UsageError"


def test_an_empty_repository_lists_as_an_empty_json_list(tmp_path):
    Repository.create(tmp_path / "r")
    done = backupctl("list", "--repository", str(tmp_path / "r"), "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, [])


def test_quiet_says_nothing_but_warnings(capsys):
    with reporters.reporter(quiet=True) as reporter:
        reporter.event(StepStarted("copy"))
        reporter.event(DiskSkipped("sr0", "a CD-ROM"))
        reporter.progress(DiskName("vda"), 1, 2)
        reporter.event(VmFailed("web", "no agent"))
    assert tuple(capsys.readouterr()) == ("", "backupctl: warning: web: no agent\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_closed_stream_changes_nothing_but_what_is_heard(tmp_path, closed):
    Repository.create(tmp_path / "r")
    command = [sys.executable, "-m", "backupctl", "list", "--repository", str(tmp_path / "r")]
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh"]
    for arguments, code in (([], 0), (["--repository", "/nowhere"], 2)):
        done = subprocess.run(
            [*shell, *command, *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, "Traceback" in done.stderr) == (code, False)


def test_a_name_that_the_terminal_can_not_show_is_written_in_another_way(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    Repository.create(tmp_path / "\u00e9")
    done = backupctl("list", "--repository", str(tmp_path / "\u00e9"))
    assert (done.returncode, "\\xe9" in done.stdout) == (0, True)


def test_nothing_that_is_opened_gets_the_number_of_a_closed_stdout():
    """Else an image that is restored to it would be written into that."""
    code = (
        "import os; from backupctl.cli import main; main.prepare_streams(); print('heard by nobody')\n"
        "try: os.write(1, b'x')\n"
        "except OSError: os._exit(7)"
    )
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", code], timeout=60, check=False
    )
    assert done.returncode == 7


def test_the_configuration_may_be_named_on_either_side_of_the_command(tmp_path):
    path = tmp_path / "mine.toml"
    Repository.create(tmp_path / "r")
    path.write_text(f'[defaults]\nrepository = "{tmp_path}/r"\n')
    for arguments in (["--config", str(path), "list"], ["list", "--config", str(path)]):
        assert CliRunner().invoke(cli, arguments).output.startswith("no recovery points")


def test_wrong_use_touches_nothing_and_says_so(tmp_path):
    done = backupctl(
        "full", "web", "--qmp=unix:/x", "--limit=much", "--repository", str(tmp_path / "r"), "--json"
    )
    assert (done.returncode, json.loads(done.stdout)["error"]["state"]) == (2, "nothing was touched")
    assert list(tmp_path.iterdir()) == []


def test_an_image_and_a_document_do_not_share_standard_output(tmp_path):
    Repository.create(tmp_path / "r")
    done = backupctl("restore", "web", "--to", "-", "--json", "--repository", str(tmp_path / "r"))
    assert (done.returncode, json.loads(done.stdout)["error"]["kind"]) == (2, "UsageError")


def test_a_directory_that_is_no_repository_is_refused(tmp_path):
    (tmp_path / "something").write_text("else")
    done = backupctl("list", "--repository", str(tmp_path))
    assert done.returncode == 2
    assert "repository" in done.stderr


def test_what_comes_from_outside_can_not_move_the_cursor():
    assert output.clean("a\x1b[2Jb\rc\x9b\u202e") == "a\\x1b[2Jb\\x0dc\\x9b\\x202e"
    assert output.clean("é 漢") == "é 漢"


def test_a_table_that_is_written_as_it_comes_takes_any_cell(capsys):
    rows = [(Path("/x"), number, None) for number in range(output._FIRST_ROWS + 2)]
    output.print_table(("FILE", "NUMBER>", "ELSE"), rows)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows) + 1
    assert lines[-1].split() == ["/x", str(len(rows) - 1), "None"]


@pytest.mark.parametrize("number", [1, output._FIRST_ROWS + 1, 3 * output._FIRST_ROWS])
def test_no_row_of_a_table_can_move_the_cursor_wherever_it_is(capsys, number):
    rows = [("a", "\x1b[2J\n" if at == number else "b") for at in range(3 * output._FIRST_ROWS + 1)]
    output.print_table(("FILE", "ELSE"), rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[number + 1].split() == ["a", "\\x1b[2J\\x0a"]
    assert len(lines) == len(rows) + 1


@pytest.mark.parametrize(
    "document", [[], [{}], [1], [{"a": [1, {"b": "é\n  {"}]}, []], [[{"x": None}], "\u2028", {}]]
)
def test_a_document_written_part_by_part_is_the_same(capsys, document):
    output.print_json_list(iter(document))
    assert capsys.readouterr().out == json.dumps(document, indent=2) + "\n"


def test_a_list_for_programs_is_written_vm_by_vm(tmp_path, monkeypatch):
    """Not all points of many VMs fit into memory."""
    repository = many_vms.make(tmp_path / "repository", 3, 2)
    happened = []
    write, scan = output._Output.write, VmDirectory.scan_some

    def writing(self: output._Output, text: str) -> None:
        happened.extend(line.strip() for line in text.splitlines() if '"vm"' in line)
        write(self, text)

    def scanning(self: VmDirectory, points: list[PointId]) -> AllPoints:
        happened.append(self.name)
        return scan(self, points)

    monkeypatch.setattr(output._Output, "write", writing)
    monkeypatch.setattr(VmDirectory, "scan_some", scanning)
    done = CliRunner().invoke(cli, ["list", "--repository", str(repository.path), "--json"])
    assert done.exit_code == 0
    assert happened == [one for vm in repository.vms() for one in (vm, *[f'"vm": "{vm}",'] * 2)]
    found = json.loads(done.stdout)
    assert done.stdout == json.dumps(found, indent=2) + "\n"
    assert [one["chain_bytes"] for one in found] == [65536, 131072] * 3


def test_what_comes_from_outside_can_not_begin_a_line_as_if_we_said_it(capsys):
    output.print_error(UsageError("QEMU said: no\nbackupctl: all is well"), as_json=False)
    assert capsys.readouterr().err == "backupctl: QEMU said: no\\x0abackupctl: all is well\n"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("100", 100),
        ("1K", 1024),
        ("50MiB/s", 50 << 20),
        ("1.5G", 3 << 29),
        ("2T", 2 << 40),
        ("10mb", 10 << 20),
    ],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert units.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "1X", "1e9", "fast", "1" * 30])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(UsageError):
        units.parse_size(text)
