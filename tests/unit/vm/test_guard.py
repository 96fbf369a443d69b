# SPDX-License-Identifier: GPL-2.0-or-later
"""The guard: a guest frozen by us is thawed whatever dies, one frozen by somebody else never."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from backupctl.errors import AgentRefused, AgentTimeout, AgentUnavailable, FreezeOverrun, GuardLost, Refused
from backupctl.settings import Address
from backupctl.vm import guard_process
from backupctl.vm.agent import Agent
from backupctl.vm.guard import Guard
from fixtures.agent import PlayedAgent
from fixtures.simulated import Simulated
from fixtures.simulated_guest import SimulatedAgent

NO_MONITOR = Address(path="/nowhere")
RUN = """
import fcntl, os, sys, time
from backupctl.settings import Address
from backupctl.vm.guard import Guard
lock = os.open(sys.argv[2], os.O_RDWR | os.O_CREAT)
fcntl.flock(lock, fcntl.LOCK_EX)
guard = Guard.start(Address(path="/nowhere"), Address(path=sys.argv[1]), 2.0, lock)
for step in sys.argv[3:]:
    if step == "freeze":
        guard.freeze(10.0)
    elif step == "thaw":
        guard.thaw()
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture(params=["played", "simulated"])
def agent(request):
    """An agent played by the test, then the simulator's."""
    if request.param == "simulated":
        with Simulated("--disk", "vda=1M") as machine:
            yield SimulatedAgent(machine)
    else:
        with tempfile.TemporaryDirectory(prefix="bc-") as folder, PlayedAgent(Path(folder, "ga")) as played:
            yield played


@pytest.fixture
def start(agent, tmp_path):
    made = []

    def begin(timeout: float = 2.0) -> Guard:
        lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
        try:
            made.append(Guard.start(NO_MONITOR, Address(path=str(agent.path)), timeout, lock))
        finally:
            os.close(lock)
        return made[-1]

    yield begin
    for guard in made:
        guard.close()


def test_the_guard_makes_nothing_that_others_may_use(start):
    before = os.umask(0)
    try:
        guard = start()
    finally:
        os.umask(before)
    status = Path(f"/proc/{guard._process.pid}/status").read_text()
    assert "Umask:\t0077\n" in status


def wait_for(what, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_freeze_and_thaw_tell_how_long(agent, start):
    guard = start()
    assert guard.freeze(10) == 1
    time.sleep(0.2)
    thawed = guard.thaw()
    assert 200 <= thawed.milliseconds < 2000
    assert not thawed.ended_early
    assert not guard.may_be_frozen()
    assert (len(agent.freezes), len(agent.thaws)) == (1, 1)


@pytest.mark.parametrize("freeze", ["done", "refuse"])
def test_the_agent_is_left_to_others_once_the_guest_is_thawed(agent, start, freeze):
    """It serves one client at a time, and a copy may take hours."""
    guard = start()
    guard.ping_agent()
    if freeze == "refuse":
        agent.behaviour["guest-fsfreeze-freeze"] = "refuse"
        with pytest.raises(AgentRefused):
            guard.freeze(10)
    else:
        guard.freeze(10)
        guard.thaw()
    with Agent.connect(Address(path=str(agent.path)), 2.0) as other:
        assert other.freeze_status() == "thawed"


def test_a_freeze_that_somebody_in_the_guest_ended_is_told(agent, start):
    guard = start()
    guard.freeze(10)
    agent.frozen = False
    assert guard.thaw().ended_early
    assert not guard.may_be_frozen()
    guard.freeze(10)
    assert not guard.thaw().ended_early


def test_the_budget_ends_the_freeze_and_the_run_is_told(agent, start):
    guard = start()
    guard.freeze(0.5)
    wait_for(lambda: not agent.frozen, 5)
    with pytest.raises(FreezeOverrun):
        guard.thaw()


def test_a_guest_frozen_by_somebody_else_is_refused_and_never_thawed(agent, start):
    agent.frozen = True
    guard = start()
    with pytest.raises(Refused):
        guard.ping_agent()
    with pytest.raises(Refused):
        guard.freeze(1)
    guard.close()
    time.sleep(0.5)
    assert agent.frozen
    assert agent.thaws == []


def test_an_agent_that_refuses_is_told_and_nothing_is_thawed(agent, start):
    agent.behaviour["guest-fsfreeze-freeze"] = "refuse"
    with pytest.raises(AgentRefused, match="as told"):
        start().freeze(5)
    assert not agent.frozen


def test_a_freeze_that_is_not_answered_is_thawed_by_the_guard(agent, start):
    agent.behaviour["guest-fsfreeze-freeze"] = "unanswered"
    guard = start()
    with pytest.raises(AgentTimeout):
        guard.freeze(0.5)
    wait_for(lambda: not agent.frozen)
    wait_for(lambda: not guard.may_be_frozen())
    assert len(agent.thaws) == 1


def test_an_agent_that_hangs_up_while_frozen_is_called_again(agent, start):
    guard = start()
    guard.freeze(1.0)
    agent.behaviour["guest-fsfreeze-thaw"] = "hang up"
    with pytest.raises(AgentTimeout):
        guard.thaw()
    agent.behaviour.clear()
    wait_for(lambda: not agent.frozen)


def test_an_agent_that_is_not_there_is_unavailable(agent, start):
    agent.behaviour["*"] = "silent"
    guard = start(0.5)
    begun = time.monotonic()
    with pytest.raises(AgentUnavailable):
        guard.ping_agent()
    assert time.monotonic() - begun < 3


@pytest.mark.parametrize("behaviour", ["garbage", "hang up"])
def test_an_agent_that_sends_garbage_is_unavailable(agent, start, behaviour):
    agent.behaviour["*"] = behaviour
    with pytest.raises(AgentUnavailable):
        start(1.0).ping_agent()


@pytest.mark.parametrize(("steps", "freezes"), [([], 0), (["freeze"], 1), (["freeze", "thaw"], 1)], ids=str)
def test_sigkill_of_the_run_leaves_the_guest_thawed(agent, tmp_path, steps, freezes):
    with subprocess.Popen(
        [sys.executable, "-c", RUN, str(agent.path), str(tmp_path / "lock"), *steps],
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdout.readline() == "ready\n"
        assert agent.frozen == (steps == ["freeze"])
        run.kill()
    wait_for(lambda: not agent.frozen)
    assert len(agent.freezes) == len(agent.thaws) == freezes


def test_sigkill_of_the_run_while_the_freeze_is_in_flight_thaws(agent, tmp_path):
    agent.behaviour["guest-fsfreeze-freeze"] = "late"
    agent.late_seconds = 1.0
    with subprocess.Popen(
        [sys.executable, "-c", RUN, str(agent.path), str(tmp_path / "lock"), "freeze"]
    ) as run:
        wait_for(lambda: agent.frozen)
        run.kill()
    wait_for(lambda: not agent.frozen)


def test_the_guard_of_a_dead_run_holds_the_lock_until_the_guest_is_thawed(agent, tmp_path):
    lock = tmp_path / "lock"
    agent.behaviour["guest-fsfreeze-thaw"] = "refuse"
    with subprocess.Popen(
        [sys.executable, "-c", RUN, str(agent.path), str(lock), "freeze"], stdout=subprocess.PIPE, text=True
    ) as run:
        run.stdout.readline()
        assert agent.frozen
        run.kill()
    time.sleep(1)
    assert agent.frozen
    with lock.open("r+") as mine:
        with pytest.raises(BlockingIOError):
            fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        agent.behaviour.clear()
        wait_for(lambda: not agent.frozen)
        time.sleep(0.5)
        fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_signals_do_not_end_the_guard(agent, start):
    guard = start()
    guard.freeze(10)
    for number in guard_process.DEAF_TO:
        os.kill(guard._process.pid, number)
    time.sleep(0.2)
    guard.check()
    guard.thaw()
    assert not agent.frozen


def test_a_guard_that_can_not_be_started_is_a_typed_error(agent, start, monkeypatch):
    """As where no more processes are allowed."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(GuardLost, match="can't be started: No such file"):
        start()


def test_a_guard_that_was_killed_is_noticed_and_the_run_thaws_itself(agent, start):
    guard = start()
    guard.freeze(10)
    os.kill(guard._process.pid, signal.SIGKILL)
    with pytest.raises(GuardLost):
        guard.thaw()
    assert not agent.frozen
    guard._process.wait(10)  # its sockets close a moment before it has ended
    with pytest.raises(GuardLost):
        guard.check()


def test_a_guard_that_hangs_with_the_guest_frozen_is_killed_and_the_run_thaws_itself(
    agent, start, monkeypatch
):
    monkeypatch.setattr("backupctl.vm.guard._SLACK_SECONDS", 1.0)
    guard = start(0.5)
    guard.freeze(10)
    os.kill(guard._process.pid, signal.SIGSTOP)
    with pytest.raises(GuardLost, match="does not answer"):
        guard.thaw()
    assert not agent.frozen
    assert not guard.alive


def test_stale_answers_in_the_channel_are_passed_over():
    """The agent answers an earlier client's questions first; each is one line, the last one is ours."""
    ours, its = socket.socketpair()
    with ours, its:
        its.sendall(b'{"return": "frozen"}\n{"return": {}}\n\xff{"return": 12345}\n')

        def answer() -> None:
            with its.makefile("rb") as stream:
                mark = json.loads(stream.readline())["arguments"]["id"]
                its.sendall(b'\xff{"return": %d}\n' % mark)
                stream.readline()
                its.sendall(b'{"return": "thawed"}\n')

        thread = threading.Thread(target=answer)
        thread.start()
        assert Agent(ours, 5.0).freeze_status() == "thawed"
        thread.join(5)


def test_an_endless_line_is_given_up_in_bounded_memory_and_time():
    ours, its = socket.socketpair()
    with ours, its:
        ours.settimeout(5)

        def flood() -> None:
            with suppress(OSError):
                its.sendall(b"\xff")
                while True:
                    its.sendall(b"x" * 65536)

        thread = threading.Thread(target=flood)
        thread.start()
        with pytest.raises(AgentUnavailable, match="garbage"):
            Agent(ours, 10.0).freeze_status()
        ours.close()
        its.close()
        thread.join(5)
