# SPDX-License-Identifier: GPL-2.0-or-later
"""`install-timers` writes units that systemd takes; what somebody edited stays, what it wrote is removed."""

import json
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from backupctl.cli import install_timers
from backupctl.cli.main import cli
from backupctl.errors import BackupctlError, UsageError
from backupctl.names import VmName
from backupctl.operations.timers import units
from backupctl.operations.timers.units import Paths

CONFIGURED = """
[defaults]
repository = "/backup"
[vm.web]
qmp = "unix:/run/web"
[vm.mail]
qmp = "unix:/run/mail"
repository = "/srv/my backups/100%"
scratch = "/scratch"
"""


@pytest.fixture
def directory(tmp_path):
    """Where the units are written; the configuration has two VMs."""
    (tmp_path / "c.toml").write_text(CONFIGURED)
    return tmp_path / "root/etc/systemd/system"


@pytest.fixture
def call(tmp_path, directory):
    """Call the command."""

    def call(*words: str) -> Result:
        given = ["install-timers", "--config", str(tmp_path / "c.toml"), "--root", str(tmp_path / "root")]
        return CliRunner().invoke(cli, [*given, *words], catch_exceptions=True)

    return call


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


ALL = {
    "backupctl.service",
    "backupctl.timer",
    "backupctl.service.d/paths.conf",
    "backupctl-failed@.service",
}
WEB = {
    "backupctl@.service",
    "backupctl@.timer",
    "backupctl@web.service.d/paths.conf",
    "backupctl-failed@.service",
}


def test_one_timer_is_for_all_vms_and_may_write_where_they_are_stored(call, directory, tmp_path):
    done = call()
    assert done.exit_code == 0, done.output
    assert names(directory) == ALL
    text = (directory / "backupctl.service.d/paths.conf").read_text()
    assert 'RequiresMountsFor=/backup "/srv/my backups/100%%" /var/tmp /scratch\n' in text
    assert 'ReadWritePaths=-/backup "-/srv/my backups/100%%" -/var/tmp -/scratch\n' in text
    assert f"Environment=BACKUPCTL_CONFIG={tmp_path}/c.toml\n" in text
    assert "systemctl enable --now backupctl.timer" in done.output


def test_metrics_are_where_a_run_may_write(call, directory, tmp_path):
    more = '[metrics]\ntextfile = "/var/lib/node_exporter/all.prom"\nstate = "/var/state"\n'
    (tmp_path / "c.toml").write_text(CONFIGURED + more)
    call()
    text = (directory / "backupctl.service.d/paths.conf").read_text()
    assert " -/var/lib/node_exporter -/var/state\n" in text


def test_a_timer_is_for_each_vm_that_is_named(call, directory):
    assert "systemctl enable --now backupctl@web.timer" in call("web").output
    assert names(directory) == WEB
    assert "/srv/my" not in (directory / "backupctl@web.service.d/paths.conf").read_text()
    assert "backupctl@web.timer backupctl@mail.timer" in call("--each").output
    assert names(directory) == WEB | {"backupctl@mail.service.d/paths.conf"}


def test_units_can_be_read_by_all_whatever_the_umask(call, directory):
    call()
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.rglob("*.*") if path.is_file()} == {0o644}
    assert stat.S_IMODE((directory / "backupctl.service.d").stat().st_mode) == 0o755


def test_systemd_takes_what_is_written(call, directory):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed here")
    call("--program", "/bin/true")
    call("--each", "--program", "/bin/true")
    for name in ("backupctl.service", "backupctl.timer", "backupctl@mail.service", "backupctl@mail.timer"):
        if "@" in name:
            (directory / name).symlink_to(name.replace("@mail", "@"))
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(directory / name)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={"SYSTEMD_UNIT_PATH": f"{directory}:", "PATH": "/usr/bin:/bin"},
        )
        ours = [line for line in done.stderr.splitlines() if "backupctl" in line]
        assert (done.returncode, ours) == (0, [])


def test_a_dry_run_changes_nothing(call, directory):
    assert "create" in call("--dry-run").output
    assert not directory.exists()
    call()
    assert "remove" in call("--uninstall", "-n").output
    assert names(directory) == ALL


def test_a_second_call_changes_only_what_is_different(call, directory, tmp_path):
    call()
    old = (directory / "backupctl.service").stat().st_ino
    (tmp_path / "c.toml").write_text(CONFIGURED.replace("/scratch", "/var/scratch"))
    found = {Path(one["path"]).name: one["action"] for one in json.loads(call("--json").stdout)["units"]}
    assert found.pop("paths.conf") == "replace"
    assert set(found.values()) == {"unchanged"}
    assert (directory / "backupctl.service").stat().st_ino == old
    assert "/var/scratch" in (directory / "backupctl.service.d/paths.conf").read_text()


def edit(path: Path) -> str:
    path.write_text(path.read_text().replace("03:00", "04:00"))
    return path.read_text()


@pytest.mark.parametrize("by", ["editing", "their own", "masking"])
def test_what_somebody_changed_is_neither_replaced_nor_removed_without_force(call, directory, by):
    call()
    timer = directory / "backupctl.timer"
    if by == "editing":
        edit(timer)
    else:
        timer.unlink()
        timer.write_text("[Timer]\n") if by == "their own" else timer.symlink_to("/dev/null")
    kept = timer.read_bytes()
    (directory / "backupctl.service").unlink()  # and no other unit is written either
    done = call()
    assert isinstance(done.exception, UsageError)
    assert str(timer) in done.exception.message
    assert (timer.read_bytes(), (directory / "backupctl.service").exists()) == (kept, False)
    assert call("--force").exit_code == 0
    assert timer.is_symlink() is False
    assert "03:00" in timer.read_text()


def test_uninstall_removes_what_was_written_and_nothing_else(call, directory):
    call()
    call("web")
    (directory / "backupctl-mine.service").write_text("[Service]\n")
    (directory / "backupctl.service.d/mine.conf").write_text("[Service]\n")
    assert call("--uninstall").exit_code == 0
    assert names(directory) == {"backupctl-mine.service", "backupctl.service.d/mine.conf"}
    assert not (directory / "backupctl@web.service.d").exists()
    assert "no units" in call("--uninstall").output


def test_uninstall_keeps_what_was_edited(call, directory):
    call()
    edit(directory / "backupctl.timer")
    assert isinstance(call("--uninstall").exception, UsageError)
    assert names(directory) == ALL
    assert call("--uninstall", "--force").exit_code == 0
    assert names(directory) == set()


def test_a_timer_that_is_enabled_is_not_removed(call, directory):
    call()
    (directory / "timers.target.wants").mkdir()
    (directory / "timers.target.wants/backupctl.timer").symlink_to(directory / "backupctl.timer")
    done = call("--uninstall")
    assert isinstance(done.exception, UsageError)
    assert done.exception.next_command == "systemctl disable --now backupctl.timer"
    assert names(directory) >= ALL


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("wbe",), "not configured"),
        (("--uninstall", "web"), "takes no NAME"),
        (("--uninstall", "--each"), "takes no NAME"),
    ],
)
def test_wrong_use_writes_nothing(call, directory, words, said):
    done = call(*words)
    assert isinstance(done.exception, UsageError)
    assert said in done.exception.message
    assert not directory.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "no VM"), ('[vm.web]\nqmp = "/q"\n', "no repository"), ("[vm.'a+b']\nrepository = '/r'\n", "a+b")],
)
def test_a_configuration_that_units_cannot_be_made_of_is_refused(call, directory, tmp_path, text, said):
    (tmp_path / "c.toml").write_text(text)
    done = call("--each")
    assert isinstance(done.exception, UsageError)
    assert said in done.exception.message
    assert not directory.exists()


def test_the_program_that_root_will_run_is_one_that_nobody_else_can_write(tmp_path):
    program = tmp_path / "backupctl"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o777)
    asked = install_timers.TimerArguments((), False, False, False, None, program)
    with pytest.raises(BackupctlError, match="writable by other users"):
        install_timers._program(asked)
    program.chmod(0o755)
    assert install_timers._program(asked) == str(program)


def test_a_path_is_written_as_systemd_reads_it_back():
    found = Paths((Path('/a "b" \\c %h'),)).drop_in()
    assert r'ReadWritePaths="-/a \"b\" \\c %%h"' in found
    with pytest.raises(UsageError):
        Paths((Path("/a\nExecStart=/bin/false"),)).drop_in()


def test_the_program_is_named_where_it_is():
    (unit, *_) = units.for_each({VmName("web"): Paths((Path("/r"),))}, "/opt/back up/bin/backupctl")
    assert 'ExecStart="/opt/back up/bin/backupctl" ' in unit.content
    assert units.PROGRAM not in unit.content
