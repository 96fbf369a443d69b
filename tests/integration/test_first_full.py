# SPDX-License-Identifier: GPL-2.0-or-later
"""A repository is made by the first full of a VM that can be backed up, and by nothing else."""

import shlex
import signal

import pytest

from backupctl.repository.repository import Repository
from fixtures import builds
from fixtures.debian import CannotBeHad
from tests import interrupted_cli
from tests.conftest import MIB


@pytest.fixture
def lab(make_lab):
    try:
        return make_lab(builds.simulator("7.2"), {"vda": 2 * MIB})
    except CannotBeHad as err:
        pytest.skip(str(err))


def test_an_incremental_makes_none_and_names_the_command_that_does(lab):
    """A file system that is not mounted looks just like that."""
    lab.cli.repository.mkdir()  # the mount point
    error = lab.backup("incremental", code=2)["error"]
    assert error["kind"] == "UsageError"
    assert "mounted?" in error["hint"]
    assert list(lab.cli.repository.iterdir()) == []
    program, *arguments = shlex.split(error["next"])
    assert (program, arguments[:2]) == ("backupctl", ["full", "web"])
    done = lab.cli.call(*arguments)
    assert done.returncode == 0
    assert f"created a new repository in {lab.cli.repository}" in done.stderr
    assert "new repository" not in lab.cli.run("full", "web").stderr
    lab.next_is_right()


@pytest.mark.parametrize("why", ["disk", "room", "monitor", "scratch"])
def test_a_full_that_can_not_be_makes_none(lab, why):
    options = {"disk": ["--disk", "nosuch"], "room": ["--scratch-size", "900T"]}.get(why, [])
    if why == "monitor":
        lab.cli.vm[1] = "unix:/nowhere"
    if why == "scratch":
        lab.cli.scratch.rmdir()
    done = lab.cli.call("full", "web", *options)
    assert done.returncode in (1, 2), done.stderr
    assert not lab.cli.repository.exists()


def test_a_first_full_that_dies_anywhere_can_be_repeated(lab):
    """Before its repository is there, and after."""
    made = set()
    for step in (0, 5, 12, 17):
        lab.cli.repository = lab.directory / f"r{step}"
        died = lab.cli.call("full", "web", entry=interrupted_cli.ENTRY, KILL_AT=str(step))
        assert died.returncode == -signal.SIGKILL, died.stderr
        made.add((lab.cli.repository / "repository.json").exists())
        lab.writer.write(1)
        report = lab.backup("full")
        lab.assert_point(report["point"], lab.writer.moment)
        lab.assert_at_rest(bitmaps_each=None)
        assert Repository.open(lab.cli.repository).vms() == ["web"]
    assert made == {False, True}
