# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that is frozen, and a guard that hangs, or an agent whose words are not what they seem."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.hostile.lying_peer import Lie, LyingPeer

BUDGET = 1.0


def guards(victim) -> Iterator[int]:
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            told = (entry / "cmdline").read_bytes()
            if b"guard_process" in told and bytes(victim.directory) in told:
                yield int(entry.name)


def stops_the_guard(victim) -> Lie:
    """Answer honestly, when the guard has been stopped."""

    def lie(line: bytes) -> bytes:
        for guard in guards(victim):
            os.kill(guard, signal.SIGSTOP)
        return line

    return lie


def frozen_seconds(victim) -> float:
    """How long the last freeze lasted, by the guest's own account."""
    told = victim.vm.control("status")
    assert len(told["freezes"]) == len(told["thaws"])
    return float(told["thaws"][-1] - told["freezes"][-1])


@pytest.mark.parametrize("where", ["agent", "qmp"])
def test_a_guard_that_is_stopped_with_the_guest_frozen_is_killed_and_the_guest_thawed(victim, where):
    command = "guest-fsfreeze-freeze" if where == "agent" else "transaction"
    lies: dict[str, dict[str, Lie]] = {"agent": {}, "qmp": {}}
    lies[where][command] = stops_the_guard(victim)
    done = victim.attack("incremental", "--freeze", "require", "--freeze-budget", str(BUDGET), **lies)
    assert (done.code, done.error["kind"]) == (1, "GuardLost"), done
    assert frozen_seconds(victim) < BUDGET + 6
    assert list(guards(victim)) == []
    victim.recovers()


def test_a_guard_that_is_stopped_when_clients_connect_costs_the_run(victim):
    done = victim.attack(agent={}, qmp={"block-export-add": stops_the_guard(victim)})
    assert (done.code, done.error["kind"]) == (1, "GuardLost"), done
    assert list(guards(victim)) == []
    victim.recovers()


def test_a_monitor_that_hangs_at_the_transaction_is_waited_for_as_long_as_the_budget_lasts(victim):
    done = victim.attack(
        "incremental", "--freeze-budget", str(BUDGET), agent={}, qmp={"transaction": lambda _: b""}
    )
    assert done.code in (1, 3), done
    assert done.seconds < 25
    assert frozen_seconds(victim) < BUDGET + 6
    victim.recovers()


@contextmanager
def killed_while_frozen(victim, guard: int) -> Iterator[tuple[Path, Path]]:
    """A run that was killed, its guard by another signal or by none; yields the sockets that it knew."""

    def kill(line: bytes) -> bytes:
        for process in guards(victim):
            run = int((Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[1])
            os.kill(run, signal.SIGKILL)
            os.kill(process, guard)
        return line

    victim.vm.control("step", count=20)
    qmp, agent = victim.directory / "killing.qmp", victim.directory / "killing.agent"
    with (
        LyingPeer(qmp, victim.vm.qmp_path, {"transaction": kill}),
        LyingPeer(agent, victim.vm.agent_path, {}),
    ):
        words = ["incremental", "web", "--repository", str(victim.repository), "--qmp", f"unix:{qmp}"]
        words += ["--agent", f"unix:{agent}", "--scratch", str(victim.scratch)]
        run = subprocess.run(
            [sys.executable, "-m", "backupctl", *words],
            env=victim._environment(),
            capture_output=True,
            check=False,
        )
        assert run.returncode == -signal.SIGKILL
        yield qmp, agent


@pytest.mark.parametrize("guard", [signal.SIGKILL, 0], ids=["with its guard", "alone"])
def test_recover_right_after_a_run_was_killed_with_the_guest_frozen_thaws_it(victim, guard):
    """As a service manager's ExecStopPost calls it: at once. A guard that lives thaws; it is waited for."""
    with killed_while_frozen(victim, guard) as (qmp, agent):
        begun = time.monotonic()
        done = victim.run("recover", "web", qmp=qmp, agent=agent)
    assert done.code == 0, done
    assert time.monotonic() - begun < 25
    assert frozen_seconds(victim) < 25
    victim.recovers()


def test_recover_thaws_before_it_asks_for_the_monitor(victim):
    """Somebody else may have that; the guest does not wait for it."""
    with killed_while_frozen(victim, signal.SIGKILL) as (_, agent):
        done = victim.run("recover", "web", qmp=victim.directory / "nowhere", agent=agent)
    assert done.code == 3, done
    assert frozen_seconds(victim) < 25
    victim.code = done.code
    victim.recovers()


@pytest.fixture
def agent(victim) -> Iterator:
    """Has the agent do something else."""
    yield lambda spec: victim.vm.control("fault", spec=f"agent:{spec}")
    victim.vm.control("clear-faults")


@pytest.mark.parametrize(
    ("spec", "kind", "word"),
    [
        ("guest-fsfreeze-freeze@*=answer:0", "AgentRefused", "none of the guest's file systems"),
        ("guest-fsfreeze-thaw@*=error-after:VSS let go", "FreezeOverrun", "VSS let go"),
    ],
    ids=["nothing to freeze", "vss"],
)
def test_a_freeze_that_was_none_or_may_have_ended_is_not_called_one(victim, agent, spec, kind, word):
    agent(spec)
    done = victim.attack("incremental", "--freeze", "require", agent={})
    assert (done.code, done.error["kind"]) == (1, kind), done
    assert word in done.error["message"]
    done = victim.attack("incremental", agent={}, seconds=None)
    assert done.code == 0, done
    assert json.loads(done.out)["consistency"] == "crash"
    assert json.loads(done.out)["frozen_ms"] is None
    assert word in " ".join(done.err.split())
    point = json.loads(done.out)["point"]
    manifest = json.loads((victim.repository / "web" / point / "manifest.json").read_text())
    assert manifest["freeze"]["got"] == "none"
    victim.recovers()


def test_a_repository_whose_name_is_no_utf_8_is_refused_before_the_freeze(victim):
    before = victim.vm.control("status")["freezes"]
    odd = os.fsdecode(bytes(victim.directory) + b"/o\xff")
    done = victim.run("full", "web", "--json", "--repository", odd)
    assert (done.code, done.error["kind"]) == (2, "UsageError"), done
    assert victim.vm.control("status")["freezes"] == before


@pytest.mark.parametrize("name", ["x" * 110, os.fsdecode(b"t\xff")], ids=["too long", "no utf-8"])
def test_a_temporary_directory_that_no_socket_can_lie_in_costs_nothing(victim, name, monkeypatch):
    monkeypatch.setattr(victim, "temporary", victim.directory / name)
    victim.temporary.mkdir()
    victim.good("incremental")
