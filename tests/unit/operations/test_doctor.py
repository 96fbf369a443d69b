# SPDX-License-Identifier: GPL-2.0-or-later
"""What the doctor finds where no VM answers; tests/integration/test_doctor_of_vms.py has the rest."""

import pytest

from backupctl.names import VmName
from backupctl.operations import status
from backupctl.operations.doctor import run as doctor
from backupctl.operations.doctor.run import Finding
from backupctl.options import QmpAccess, RunOptions, ScratchOptions, VmConfig
from backupctl.repository.repository import Repository
from backupctl.system.address import Address

WEB = VmConfig(VmName("web"), QmpAccess(Address(path="/nowhere/qmp")))


def found(path, subject, vm=WEB) -> list[Finding]:
    """Examine, and return what was found on a subject."""
    return [one for one in doctor.examine(vm, path, RunOptions("full")).findings if one.subject == subject]


def test_a_monitor_that_is_not_there_is_bad_and_how_to_start_one_is_told(tmp_path):
    (monitor,) = found(tmp_path / "r", "monitor")
    assert monitor.verdict == "bad"
    assert "-qmp unix:/nowhere/qmp,server=on,wait=off" in monitor.advice


def test_a_repository_that_is_not_there_is_not_made(tmp_path):
    """An unmounted file system looks just like that, so it is told."""
    (repository,) = found(tmp_path / "a" / "r", "repository")
    assert (repository.verdict, "is mounted" in repository.advice) == ("warning", True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a file", "somebody else's directory"])
def test_a_repository_that_can_not_be_is_bad(tmp_path, name):
    path = tmp_path / "r"
    if name == "a file":
        path.write_text("")
    else:
        path.mkdir()
        (path / "theirs").write_text("")
    (repository,) = found(path, "repository")
    assert repository.verdict == "bad"


def test_a_damaged_repository_is_bad(tmp_path):
    Repository.create(tmp_path / "r")
    (tmp_path / "r" / "repository.json").write_text("{")
    (repository,) = found(tmp_path / "r", "repository")
    assert repository.verdict == "bad"


def test_missing_tools_are_named_with_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.setenv("QEMU_IMG", "no-such-img")
    (tools,) = found(tmp_path / "r", "tools")
    assert (tools.verdict, "no-such-img" in tools.said) == ("bad", True)
    assert "qemu-utils" in tools.advice


def test_a_run_under_way_is_what_doctor_and_status_tell_of(tmp_path):
    """Its monitor serves one client, so it looks dead to others; and its point looks left over."""
    repository = Repository.create(tmp_path / "r")
    directory, options = repository.vm(WEB.name), RunOptions("incremental", scratch=ScratchOptions(tmp_path))
    with directory.lock():
        (directory.path / "20260101T000000Z.partial").mkdir()
        (monitor,) = found(tmp_path / "r", "monitor")
        told = status.look(WEB, repository, options)
    assert monitor.verdict == "warning"
    for said in (monitor.said, told.problem):
        assert "another run" in said
    assert told.leftovers == ()
    left = status.look(WEB, repository, options)
    assert ("/nowhere/qmp" in left.problem, len(left.leftovers)) == (True, 1)
