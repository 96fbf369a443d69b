# SPDX-License-Identifier: GPL-2.0-or-later
"""Around a call: unusual homes, directories and names; and what errors of ours leave."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from backupctl.cli import crash_log, main
from backupctl.errors import BackupctlError
from backupctl.repository.repository import Repository
from tests.conftest import ROOT

SOMEBODY = 12345


def call(*arguments: str, cwd=None, shell: str = 'exec "$@"', **environment: str):
    """Call it by a shell; returns the error's document."""
    around = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    around.pop("BACKUPCTL_CONFIG", None)
    done = subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, "-m", "backupctl", *arguments, "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=cwd,
        env=around,
    )
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)["error"]


@pytest.mark.parametrize("option", ["--repository", "--scratch"])
@pytest.mark.parametrize(
    ("path", "said"),
    [("~no-such-user/r", "cannot find the home directory"), (os.fsdecode(b"/tmp/\xff"), "not UTF-8")],
)
def test_a_path_that_can_not_be_is_wrong_use(tmp_path, option, path, said):
    """QEMU takes names as JSON; a path that is no UTF-8 would fail when the guest is frozen already."""
    options = {"--repository": str(tmp_path / "r"), "--scratch": str(tmp_path), option: path}
    error = call(
        "full", "web", "--qmp", "unix:/nowhere", *(word for pair in options.items() for word in pair)
    )
    assert (error["kind"], error["state"]) == ("UsageError", "nothing was touched")
    assert said in error["message"]
    assert list(tmp_path.iterdir()) == []


def test_a_relative_repository_below_a_directory_that_is_no_utf8_is_wrong_use(tmp_path):
    directory = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(directory)
    error = call("full", "web", "--qmp", "unix:/nowhere", "--repository", "r", cwd=directory)
    assert (error["kind"], "not UTF-8" in error["message"]) == ("UsageError", True)


def test_a_current_directory_that_is_gone_is_wrong_use(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    for repository in ("r", str(tmp_path / "r")):
        gone.mkdir(exist_ok=True)
        error = call("list", "--repository", repository, cwd=gone, shell='rmdir "$PWD" && exec "$@"')
        assert (error["kind"], error["next"]) == ("UsageError", "cd /")


@pytest.mark.parametrize("home", ["a file", "nothing", "a loop"])
def test_a_home_without_a_configuration_is_no_error_and_a_strange_one_is_named(tmp_path, home):
    path = tmp_path / "home"
    if home == "a file":
        path.write_text("")
    if home == "a loop":
        path.symlink_to(path)
    Repository.create(tmp_path / "r")
    error = call("list", "web", "--repository", str(tmp_path / "none"), HOME=str(path), XDG_CONFIG_HOME="")
    assert ("cannot read" in error["message"]) == (home == "a loop")
    assert error["kind"] == "UsageError"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a directory to somebody else")
def test_a_home_that_can_not_be_read_is_wrong_use(tmp_path):
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    os.chown(home, SOMEBODY, -1)
    # Root without its capabilities can read this tree, but not what belongs to somebody else.
    command = ["setpriv", "--inh-caps=-all", "--bounding-set=-all", sys.executable, "-c"]
    command += ["import os; from backupctl.cli import configuration as config; config.load(None)"]
    around = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "HOME": str(home)}
    done = subprocess.run(command, env=around, capture_output=True, text=True, timeout=60, check=False)
    assert f"cannot read the configuration {home}/.config/backupctl/backupctl.toml: Perm" in done.stderr
    assert "UsageError" in done.stderr


def test_status_and_doctor_name_the_configuration_in_use(tmp_path, monkeypatch, capsys):
    config = tmp_path / "mine.toml"
    config.write_text(
        f'[vm.web]\nqmp = "unix:/nowhere"\nrepository = "{tmp_path}/r"\nscratch = "{tmp_path}"\n'
    )
    Repository.create(tmp_path / "r")
    monkeypatch.setenv("BACKUPCTL_CONFIG", str(config))
    monkeypatch.setenv("QEMU_IMG", str(tmp_path / "theirs"))
    (tmp_path / "theirs").touch()
    (tmp_path / "theirs").chmod(0o777)

    def told(*arguments: str) -> str:
        with suppress(BackupctlError):  # no monitor answers
            main.cli.main([*arguments], standalone_mode=False)
        return capsys.readouterr().out

    assert f"config       {config}" in told("status", "web")
    assert json.loads(told("status", "web", "--json"))["configuration"] == str(config)
    found = json.loads(told("doctor", "web", "--json"))
    assert found["configuration"] == str(config)
    said = {one["said"]: one for one in found["findings"] if one["subject"] == "configuration"}
    assert f"{config} (named by BACKUPCTL_CONFIG)" in said
    (program,) = [one for text, one in said.items() if text.startswith("QEMU_IMG")]
    assert (program["verdict"], "not trusted" in program["said"]) == ("warning", True)
    monkeypatch.delenv("BACKUPCTL_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    options = ("--qmp", "unix:/nowhere", "--repository", str(tmp_path / "r"))
    if not Path("/etc/backupctl/backupctl.toml").exists():
        assert json.loads(told("status", "web", "--json", *options))["configuration"] is None


def crash() -> str:
    try:
        return str(json.loads("{}")["\udcff"])
    except KeyError:
        return crash_log.write()


def test_of_the_logs_of_our_own_errors_a_few_stay(tmp_path, monkeypatch):
    """Those of others, and what only has such a name, are left alone."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    victim = tmp_path / "victim"
    victim.write_text("")
    (tmp_path / "backupctl-error-link.log").symlink_to(victim)
    (tmp_path / "backupctl-error-directory.log").mkdir()
    others = {"victim", "backupctl-error-link.log", "backupctl-error-directory.log"}
    if os.geteuid() == 0:
        theirs = tmp_path / "backupctl-error-theirs.log"
        theirs.touch()
        os.chown(theirs, SOMEBODY, -1)
        others.add(theirs.name)
    made = [Path(crash()) for _ in range(crash_log.MOST + 3)]
    left = {path.name for path in tmp_path.iterdir()}
    assert others <= left
    assert left - others == {path.name for path in made[-crash_log.MOST :]}
    assert "KeyError" in made[-1].read_text()
    assert made[-1].stat().st_mode & 0o077 == 0


def test_a_log_that_can_not_be_written_is_no_second_error(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    assert crash() == ""
