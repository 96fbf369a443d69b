# SPDX-License-Identifier: GPL-2.0-or-later
"""Run and guard die in other orders: the guest is thawed all the same, and nothing of ours stays in it."""

import os
import select
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest

from backupctl.cancel import Cancellation
from backupctl.errors import GuardLost, NeedsRecovery
from backupctl.names import vm_name
from backupctl.operations.backup import run as backup
from backupctl.operations.backup.context import RunContext
from backupctl.options import QmpAccess, RunOptions, ScratchOptions, Timeouts, VmConfig
from backupctl.progress import Silent
from backupctl.repository.repository import Repository
from backupctl.system.address import Address
from backupctl.vm.guest.guard import GuardClient
from fixtures.proxy import Proxy
from tests.integration.test_failures import SLOW, copying, wait_for


@pytest.fixture
def lab(any_build, make_lab):
    made = make_lab(any_build)
    made.writer.write(80)
    made.backup("full")
    made.writer.write(40)
    return made


def guard_of(run: int) -> int:
    """Find the guard of a run by its process id."""
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            child = f"\nPPid:\t{run}\n" in (directory / "status").read_text()
            if child and b"backupctl.vm.guest.guard_process" in (directory / "cmdline").read_bytes():
                return int(directory.name)
    raise AssertionError("there is no guard")


def test_a_guard_that_is_killed_in_mid_copy_costs_the_run_and_leaves_nothing(lab):
    with lab.cli.start("incremental", "web", *SLOW) as run:
        wait_for(copying(lab))
        os.kill(guard_of(run.pid), signal.SIGKILL)
        _, told = run.communicate(timeout=60)
    assert run.returncode == 1, told
    assert "the guard process has died" in told
    lab.assert_at_rest()
    lab.next_is_right()


def vm_of(lab) -> VmConfig:
    qmp, agent = (Address(path=str(one)) for one in (lab.machine.qmp_path, lab.machine.agent_path))
    return VmConfig(vm_name("web"), QmpAccess(qmp, agent))


def test_a_guard_that_dies_while_clients_connect_costs_the_run_and_no_guest(lab, monkeypatch):
    """The first client has said nothing: while it is there, `nbd-server-stop` hangs QEMU 7.2."""
    hold, held = GuardClient.hold, []

    def hold_one(guard: GuardClient, connection: socket.socket, export: str) -> None:
        if held:
            os.kill(guard_of(os.getpid()), signal.SIGKILL)
        held.append(export)
        hold(guard, connection, export)

    monkeypatch.setattr(GuardClient, "hold", hold_one)
    options = RunOptions(kind="incremental", scratch=ScratchOptions(lab.cli.scratch))
    repository = Repository.open(lab.cli.repository)
    with pytest.raises(GuardLost):
        backup.run(RunContext(vm_of(lab), repository, options, Silent(), Cancellation()))
    assert len(held) == 2
    lab.assert_at_rest()
    lab.next_is_right()


def test_a_guest_that_neither_run_nor_guard_could_thaw_is_thawed_by_recover(lab):
    """The run ends in time, and tells; its guard goes on, and is killed."""
    lab.agent.behaviour["guest-fsfreeze-thaw"] = "refuse"
    scratch, timeouts = ScratchOptions(lab.cli.scratch), Timeouts(agent_seconds=0.5)
    options = RunOptions(kind="incremental", scratch=scratch, timeouts=timeouts)
    repository = Repository.open(lab.cli.repository)
    with pytest.raises(NeedsRecovery):
        backup.run(RunContext(vm_of(lab), repository, options, Silent(), Cancellation()))
    guard = guard_of(os.getpid())
    os.kill(guard, signal.SIGKILL)
    os.waitpid(guard, 0)
    lab.agent.behaviour.clear()
    assert lab.agent.frozen
    assert "thawed the guest's file systems" in lab.cli.json("recover", "web")["actions"]
    assert not lab.agent.frozen
    lab.next_is_right()


def test_a_silent_agent_holds_up_nothing_but_the_thaw(lab):
    """Run and guard were killed with the guest frozen; the rest of their work is undone at once."""
    lab.agent.behaviour["guest-fsfreeze-thaw"] = "refuse"

    def kill(content: bytes) -> str:
        if b'"transaction"' not in content or not lab.agent.frozen:
            return ""
        for each in (guard_of(run.pid), run.pid):
            os.kill(each, signal.SIGKILL)
        return "after"

    path = lab.machine.directory / "proxy"
    with Proxy(path, lab.machine.qmp_path, kill):
        direct, lab.cli.vm[1] = lab.cli.vm[1], f"unix:{path}"
        with lab.cli.start("incremental", "web") as run:
            run.communicate(timeout=60)
        lab.cli.vm[1] = direct
    assert run.returncode == -signal.SIGKILL
    assert lab.machine.leftovers() != []
    assert "refused guest-fsfreeze-thaw" in lab.cli.json("recover", "web", code=3)["error"]["message"]
    assert lab.machine.leftovers() == []
    assert lab.agent.frozen
    (left,) = lab.cli.json("status", "web")["leftovers"]
    assert "may have left the guest frozen" in left
    lab.agent.behaviour.clear()
    assert "thawed the guest's file systems" in lab.cli.json("recover", "web")["actions"]
    lab.next_is_right()


def test_the_guard_of_a_dead_run_waits_for_a_monitor_that_somebody_else_took_first(lab):
    with lab.cli.start("incremental", "web", *SLOW) as run, socket.socket(socket.AF_UNIX) as other:
        wait_for(copying(lab))
        other.connect(str(lab.machine.qmp_path))  # served when the run has left
        guard = os.pidfd_open(guard_of(run.pid))
        run.kill()
        run.communicate(timeout=60)
        assert b"QMP" in other.recv(65536)
        time.sleep(1)
        assert lab.machine.qmp("query-block-exports"), "no socket may go before its export"
    assert select.select([guard], [], [], 20)[0], "the guard was to end"
    os.close(guard)
    assert lab.machine.qmp("query-block-exports") == []
    assert lab.machine.qmp("query-jobs") == []
    lab.next_is_right()
