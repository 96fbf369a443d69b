# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run is given from outside: a clock, and a hook that is called as each step is entered."""

import os
from datetime import UTC, datetime

import pytest

from backupctl.cancel import Cancellation
from backupctl.errors import Failed
from backupctl.names import vm_name
from backupctl.operations import running
from backupctl.operations.backup import run as backup
from backupctl.operations.backup.context import RunContext
from backupctl.options import QmpAccess, RunOptions, ScratchOptions, VmConfig
from backupctl.progress import Silent
from backupctl.repository.repository import Repository
from backupctl.system.address import Address

STEPS = ["prepare", "attach", "freeze", "transaction", "export", "copy", "dismantle", "commit", "settle"]
pytestmark = pytest.mark.simulator_too


@pytest.fixture
def lab(any_build, make_lab):
    made = make_lab(any_build)
    made.writer.write(20)
    made.backup("full")
    made.writer.write(5)
    return made


def context(lab, on_step, **more) -> RunContext:
    sockets = (Address(path=str(path)) for path in (lab.machine.qmp_path, lab.machine.agent_path))
    options = RunOptions("incremental", scratch=ScratchOptions(lab.cli.scratch))
    repository = Repository.open(lab.cli.repository)
    return RunContext(
        VmConfig(vm_name("web"), QmpAccess(*sockets)),
        repository,
        options,
        Silent(),
        Cancellation(),
        on_step=on_step,
        **more,
    )


def test_each_step_is_told_as_it_is_entered_and_the_point_has_the_time_of_the_clock(lab):
    seen: list[str] = []
    report = backup.run(context(lab, seen.append, clock=lambda: datetime(2099, 1, 2, 3, 4, 5, tzinfo=UTC)))
    assert seen == STEPS
    assert report.point == "20990102T030405Z"
    lab.assert_point(report.point, lab.writer.moment)
    lab.assert_at_rest()


@pytest.mark.parametrize("step", ["transaction", "copy"])
@pytest.mark.parametrize(
    ("raised", "becomes"),
    [(SystemExit, SystemExit), (KeyboardInterrupt, KeyboardInterrupt), (ValueError, Failed)],
)
def test_whatever_is_raised_is_rolled_back_and_only_an_exception_becomes_an_error_of_ours(
    lab, step, raised, becomes
):
    seen: list[str] = []

    def on_step(entered: str) -> None:
        seen.append(entered)
        if entered == step:
            raise raised("as if")

    with pytest.raises(becomes):
        backup.run(context(lab, on_step))
    assert seen[-2:] == [step, "roll back"]
    assert not lab.agent.frozen
    lab.assert_at_rest()
    lab.next_is_right()


def test_status_tells_what_a_running_backup_does_and_nothing_is_noted_while_the_guest_is_frozen(lab):
    seen: list[str | None] = []
    told: list[dict] = []
    directory = Repository.open(lab.cli.repository).vm(vm_name("web"))

    def on_step(entered: str) -> None:
        found = running.running(directory)
        seen.append(found.step if found else None)
        if entered == "dismantle":
            told.append(lab.cli.json("status", "web"))

    report = backup.run(context(lab, on_step))
    assert seen == [None, "prepare", "attach", "freeze", "freeze", "export", "copy", "dismantle", "commit"]
    found = told[0]["running"]
    assert (found["command"], found["point"], found["pid"]) == ("incremental", report.point, os.getpid())
    assert (found["step"], found["number"], found["steps"]) == ("copy", 7, 10)
    assert lab.cli.json("status", "web")["running"] is None
    lab.assert_at_rest()
