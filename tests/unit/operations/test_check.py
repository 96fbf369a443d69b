# SPDX-License-Identifier: GPL-2.0-or-later
"""What `check` makes of a repository: ages, damage, missing points; one line and one of four exit codes."""

import os
import re
import shutil
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner

from backupctl.cli.main import cli
from backupctl.names import point_time
from backupctl.operations import check
from backupctl.operations.check import Level, Limits
from tests.unit.points import P1, P2, P3

LIMITS = Limits(timedelta(hours=26), timedelta(hours=20))
LINE = re.compile(r"BACKUPCTL (OK|WARNING|CRITICAL|UNKNOWN) - [^|\n]+(?: \| (?P<data>[^|\n]+))?\n")
DATUM = re.compile(r"'[^'=]+'=\d+s;\d*;\d+;0")


@pytest.fixture
def chain(two_points):
    """A repository with a full and an incremental that builds on it."""
    return two_points[0]


def at(hours: float, point: str = P2) -> datetime:
    return point_time(point).replace(tzinfo=UTC) + timedelta(hours=hours)


def call(*arguments: str) -> tuple[int, str]:
    """Call the plugin; it prints one line, and nothing else."""
    done = CliRunner().invoke(cli, ["check", *arguments])
    found = LINE.fullmatch(done.stdout)
    assert found, done.output
    assert Level[found[1]].value == done.exit_code
    assert done.stderr == ""
    for datum in (found["data"] or "").split():
        assert DATUM.fullmatch(datum)
    return done.exit_code, done.stdout


@pytest.mark.parametrize(
    ("hours", "level"),
    [
        (1, Level.OK),
        (20, Level.OK),
        (20.1, Level.WARNING),
        (26, Level.WARNING),
        (26.1, Level.CRITICAL),
        (-0.05, Level.OK),
        (-0.1, Level.WARNING),
    ],
)
def test_the_age_of_the_newest_point_decides(chain, hours, level):
    found = check.examine(chain.directory, LIMITS, at(hours))
    assert found.level is level
    assert found.age_seconds == pytest.approx(max(0, hours) * 3600)


def test_a_vm_without_points_is_critical(builder):
    assert check.examine(builder.directory, LIMITS, at(0)).level is Level.CRITICAL


def test_a_point_that_is_missing_is_critical_however_recent_the_newest_is(chain):
    shutil.rmtree(chain.directory.path / P2)
    found = check.examine(chain.directory, LIMITS, at(0, P1))
    assert found.level is Level.CRITICAL
    assert f"{P2} of vm1 is missing" in found.findings[0].text
    assert found.age_seconds == 0


def test_the_age_is_that_of_the_newest_point_that_can_be_restored(chain):
    """A damaged chain makes the points above it useless, whatever their manifests say."""
    (chain.directory.path / P2 / "vda.digests").write_bytes(b"")
    found = check.examine(chain.directory, LIMITS, at(1))
    assert found.level is Level.CRITICAL
    assert "1 point damaged" in found.findings[0].text
    assert found.age_seconds == 25 * 3600
    (chain.directory.path / P1 / "vda.digests").write_bytes(b"")
    found = check.examine(chain.directory, LIMITS, at(1))
    assert found.age_seconds is None
    assert "there is no sound recovery point" in [one.text for one in found.findings]


def test_a_damaged_manifest_is_critical(chain):
    (chain.directory.path / P1 / "manifest.json").write_text("{}")
    assert check.examine(chain.directory, LIMITS, at(0)).level is Level.CRITICAL


def test_what_can_not_be_read_is_unknown_and_not_damage(chain, monkeypatch):
    real = os.open

    def refuse(path, *arguments, **more):
        if str(path).endswith(f"{P1}/manifest.json"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "open", refuse)
    found = check.examine(chain.directory, LIMITS, at(0))
    assert found.level is Level.UNKNOWN
    assert check.examine(chain.directory, LIMITS, at(30)).level is Level.CRITICAL


def test_a_run_that_was_killed_is_a_warning_and_one_that_works_is_none(chain):
    chain.begin(P3)
    assert check.examine(chain.directory, LIMITS, at(0)).level is Level.WARNING
    with chain.directory.lock():
        assert check.examine(chain.directory, LIMITS, at(0)).level is Level.OK


def test_nothing_is_changed(chain):
    def tree():
        return {path: path.lstat().st_mtime_ns for path in chain.repository.path.rglob("*")}

    before = tree()
    check.examine(chain.directory, LIMITS, at(0))
    assert tree() == before


@pytest.fixture
def configured(chain, tmp_path, monkeypatch):
    """vm1 with two old points; `new` with none; `lost`, whose repository is not there."""
    config = tmp_path / "backupctl.toml"
    config.write_text(
        f'[defaults]\nrepository = "{chain.repository.path}"\nmax_age = "10y"\n'
        f'[vm.vm1]\n[vm.new]\n[vm.lost]\nrepository = "{tmp_path}/unmounted"\n[vm.strict]\nmax_age = "1h"\n'
    )
    monkeypatch.setenv("BACKUPCTL_CONFIG", str(config))
    return chain


def test_one_line_with_the_age_as_performance_data(configured):
    code, line = call("vm1")
    assert code == 0
    assert re.search(r"vm1: the newest point is \d+ d old \| 'age'=\d+s;;316224000;0\n", line)
    code, line = call("vm1", "--max-age", "2h", "--warn-age", "1h")
    assert code == 2
    assert ";3600;7200;0" in line


def test_the_worst_of_several_vms_decides_and_each_has_its_own_data(configured):
    code, line = call("--all")
    assert code == 2
    assert line.startswith("BACKUPCTL CRITICAL - 3 of 4 VMs: new: there is no sound recovery point; lost: ")
    assert "unmounted is not a backupctl repository" in line
    assert re.search(r"\| 'vm1_age'=\d+s;;\d+;0\n", line)
    again, same = call()  # perhaps in the next second
    assert (again, re.sub(r"=\d+s;", "=s;", same)) == (code, re.sub(r"=\d+s;", "=s;", line))
    assert call("vm1", "vm1")[0] == 0
    assert call("--repository", str(configured.repository.path))[0] == 0


def test_a_vm_that_can_not_be_looked_at_hides_no_other(configured):
    code, line = call("vm1", "nobody", "new")
    assert code == 2
    assert "new: there is no sound recovery point" in line
    assert "nobody: VM 'nobody' is not configured" in line
    assert call("vm1", "nobody")[0] == 3
    assert call("vm1", "nobody", "--warn-age", "1h")[0] == 1


def test_a_pattern_names_vms(configured):
    assert call("v*", "--max-age", "10y")[0] == 0
    assert call("x*")[0] == 3


def test_what_is_worse_is_named_first(configured):
    history = configured.directory.path / "history"
    history.write_bytes(b"x\n" + history.read_bytes())
    _, line = call("vm1", "--warn-age", "1h")
    assert line.index("line 1 is damaged") < line.index("d old")


@pytest.mark.parametrize(
    "wrong",
    [
        ["--max-age", "soon"],
        ["--no-such-option"],
        ["nobody"],
        ["../x"],
        ["vm1", "--all"],
        ["--config", "/nowhere.toml"],
    ],
)
def test_wrong_use_is_unknown_and_never_an_exit_code_of_another_command(configured, wrong):
    assert call(*wrong)[0] == 3


def test_a_bug_is_unknown_and_has_no_traceback(configured, monkeypatch):
    monkeypatch.setattr(check, "examine", lambda *_: 1 / 0)
    code, line = call("vm1")
    assert (code, "ZeroDivisionError" in line) == (3, True)


def test_a_message_can_not_break_the_line(configured, monkeypatch):
    nasty = check.Finding(Level.WARNING, "a|b\nc" + "x" * 5000)
    monkeypatch.setattr(check, "examine", lambda directory, *_: check.Verdict(directory.name, (nasty,), 1.0))
    code, line = call("vm1")
    assert (code, len(line) < 500) == (1, True)


def test_the_age_is_said_to_be_that_of_the_newest_sound_point_if_a_newer_one_is_damaged(chain):
    (chain.directory.path / P2 / "vda.digests").write_bytes(b"lost")
    found = check.examine(chain.directory, LIMITS, at(1))
    assert "the newest sound point is 25 h old" in [one.text for one in found.findings]
