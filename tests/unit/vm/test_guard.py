# SPDX-License-Identifier: GPL-2.0-or-later
"""The guard: a guest frozen by us is thawed whatever dies, one frozen by somebody else never."""

import fcntl
import json
import logging
import os
import re
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

from backupctl.errors import (
    AgentError,
    AgentRefused,
    AgentTimeout,
    AgentUnavailable,
    FreezeOverrun,
    GuardLost,
    Refused,
)
from backupctl.system.address import Address
from backupctl.vm.guest import freeze_control, guard_process, guard_survival
from backupctl.vm.guest.agent import Agent, Thaw, thaw_if_frozen
from backupctl.vm.guest.guard import PROGRAM, GuardClient
from fixtures.agent import VSS, PlayedAgent
from fixtures.simulated import Simulated
from fixtures.simulated_guest import SimulatedAgent
from tests.conftest import ROOT

PLAYED = pytest.mark.parametrize("agent", ["played"], indirect=True)  # where the agent has no part in it
NO_MONITOR = Address(path="/nowhere")
RUN = """
import fcntl, os, sys, time
from backupctl.options import Address
from backupctl.vm.guest.guard import PROGRAM, GuardClient
lock = os.open(sys.argv[2], os.O_RDWR | os.O_CREAT)
fcntl.flock(lock, fcntl.LOCK_EX)
guard = GuardClient.start(Address(path="/nowhere"), Address(path=sys.argv[1]), 2.0, lock)
guard.stand_by()
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
        with (
            tempfile.TemporaryDirectory(prefix="bc-") as directory,
            PlayedAgent(Path(directory, "ga")) as played,
        ):
            yield played


@pytest.fixture
def start(agent, tmp_path):
    made = []

    def begin(timeout: float = 2.0) -> GuardClient:
        lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
        try:
            made.append(GuardClient.start(NO_MONITOR, Address(path=str(agent.path)), timeout, lock))
        finally:
            os.close(lock)
        made[-1].stand_by()
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


def wait_for(what, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_freeze_and_thaw_tell_how_long(agent, start):
    guard = start()
    begun = time.monotonic()
    assert guard.freeze(10) == 1
    time.sleep(0.2)
    thawed = guard.thaw()
    assert 200 <= thawed.milliseconds < (time.monotonic() - begun) * 1000 + 1
    assert not thawed.doubt
    assert not guard.may_be_frozen()
    assert (len(agent.freezes), len(agent.thaws)) == (1, 1)


def test_what_the_guard_says_to_the_agent_is_in_the_runs_log(start, caplog):
    caplog.set_level(logging.DEBUG, "backupctl.vm.guest")
    guard = start()
    guard.freeze(10)
    guard.thaw()
    said = [line.getMessage().partition(", agent: ")[2] for line in caplog.records]
    said = [line for line in said if line.startswith("-> guest-fsfreeze")]
    assert [*dict.fromkeys(said)][-2:] == ["-> guest-fsfreeze-freeze", "-> guest-fsfreeze-thaw"]


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
    assert guard.thaw().doubt
    assert not guard.may_be_frozen()
    guard.freeze(10)
    assert not guard.thaw().doubt


def test_the_budget_ends_the_freeze_and_the_run_is_told(agent, start):
    guard = start()
    guard.freeze(0.5)
    wait_for(lambda: not agent.frozen)
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
    assert time.monotonic() - begun < 20


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
        wait_for(lambda: is_free(mine))


def is_free(lock) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def test_signals_do_not_end_the_guard(agent, start):
    guard = start()
    guard.freeze(10)
    for number in guard_process.IGNORED_SIGNALS:
        os.kill(guard._process.pid, number)
    time.sleep(0.2)
    guard.check()
    guard.thaw()
    assert not agent.frozen


def test_a_guard_that_can_not_be_started_is_a_typed_error(agent, start, monkeypatch):
    """As where no more processes are allowed."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(GuardLost, match="cannot start the guard process: No such file"):
        start()


def test_a_guard_that_was_killed_is_noticed_and_the_run_thaws_itself(agent, start):
    guard = start()
    guard.freeze(10)
    os.kill(guard._process.pid, signal.SIGKILL)
    with pytest.raises(GuardLost):
        guard.thaw()
    assert not agent.frozen
    guard._process.wait(60)  # its sockets close a moment before it has ended
    with pytest.raises(GuardLost):
        guard.check()


def stop(guard: GuardClient) -> None:
    os.kill(guard._process.pid, signal.SIGSTOP)


def test_a_guard_that_hangs_with_the_guest_frozen_is_killed_and_the_run_thaws_itself(agent, start):
    """No later than a second after the budget, however long its agent may take for anything."""
    guard = start(30.0)
    begun = time.monotonic()
    guard.freeze(1.0)
    stop(guard)
    with pytest.raises(GuardLost, match="does not answer"):
        guard.thaw()
    assert not agent.frozen
    assert time.monotonic() - begun < 15
    assert not guard.alive
    assert not guard.due


def test_a_guard_that_hangs_while_it_freezes_is_killed_and_the_run_thaws_itself(agent, start):
    agent.late_seconds = 3.0  # time to stop the guard before it has the answer
    agent.behaviour["guest-fsfreeze-freeze"] = "late"
    guard = start(30.0)
    begun = time.monotonic()
    stopped = threading.Thread(target=lambda: (wait_for(lambda: agent.frozen), stop(guard)))
    stopped.start()
    with pytest.raises(GuardLost, match="does not answer"):
        guard.freeze(1.0)
    stopped.join()
    assert not agent.frozen
    assert time.monotonic() - begun < 15


REQUESTS = {
    "ping": lambda guard, _: guard.ping_agent(),
    "hold": lambda guard, sock: guard.hold(sock, "e"),
    "watch": lambda guard, sock: guard.watch("job", sock.fileno(), None, None),
    "frozen": lambda guard, _: guard.may_be_frozen(),
}


@PLAYED
@pytest.mark.parametrize("name", REQUESTS)
def test_a_guard_that_hangs_at_any_request_is_killed_in_time(agent, start, monkeypatch, name):
    monkeypatch.setattr("backupctl.vm.guest.guard._ANSWER_SECONDS", 0.5)
    guard = start(0.2)
    stop(guard)
    ours, its = socket.socketpair()
    with ours, its, pytest.raises(GuardLost, match="does not answer"):
        REQUESTS[name](guard, ours)
    assert not guard.alive


@PLAYED
@pytest.mark.parametrize("name", ["release", "unwatch", "close"])
def test_a_guard_that_hangs_at_the_end_costs_the_run_nothing_but_a_moment(agent, start, monkeypatch, name):
    monkeypatch.setattr("backupctl.vm.guest.guard._ANSWER_SECONDS", 0.5)
    guard = start()
    stop(guard)
    getattr(guard, name)()
    assert guard._process.poll() is not None


@PLAYED
def test_a_guard_that_hangs_while_nothing_is_asked_is_noticed(agent, start, monkeypatch):
    """As in the middle of a copy of hours."""
    monkeypatch.setattr("backupctl.vm.guest.guard._PROBE_SECONDS", 0.05)
    guard = start()
    for _ in range(5):  # answers come between requests, and before them
        time.sleep(0.06)
        guard.check()
        assert not guard.may_be_frozen()
    monkeypatch.setattr("backupctl.vm.guest.guard._PROBE_PATIENCE_SECONDS", 0.3)
    stop(guard)
    with pytest.raises(GuardLost, match="does not answer"):
        wait_for(guard.check)
    assert not guard.alive


@PLAYED
def test_an_agent_that_is_slow_to_thaw_does_not_cost_the_guard_its_life(agent, start):
    """The budget ends; the guard says so at once, and goes on with the agent as long as it must."""
    guard = start(60.0)
    agent.late_seconds = 60.0
    agent.behaviour["guest-fsfreeze-thaw"] = "late"
    guard.freeze(0.2)
    time.sleep(0.4)
    begun = time.monotonic()
    with pytest.raises(FreezeOverrun):
        guard.thaw()
    assert time.monotonic() - begun < 15
    agent.late_enough.set()
    wait_for(lambda: not guard.may_be_frozen())
    assert guard.alive


@PLAYED
@pytest.mark.parametrize("behaviour", ["silent", "refuse"])
def test_a_thaw_that_fails_is_told_in_time_and_tried_again_by_the_guard(agent, start, behaviour):
    guard = start(8.0)
    guard.freeze(0.5)
    agent.behaviour["guest-fsfreeze-thaw"] = behaviour
    begun = time.monotonic()
    with pytest.raises(AgentError):
        guard.thaw()
    assert time.monotonic() - begun < 6
    assert guard.may_be_frozen()
    agent.behaviour.clear()
    wait_for(lambda: not guard.may_be_frozen())
    assert not agent.frozen


def test_an_agent_that_freezes_nothing_is_told_and_thawed_all_the_same(agent, start):
    """Its hooks have been called, and databases wait for the thaw."""
    agent.behaviour["guest-fsfreeze-freeze"] = "nothing"
    guard = start()
    with pytest.raises(AgentRefused, match="none of the guest's file systems"):
        guard.freeze(10)
    assert not guard.may_be_frozen()
    assert guard.due is None


def test_a_thaw_that_is_refused_although_the_guest_is_thawed_is_no_error_and_no_proof(agent, start):
    """Windows: VSS lets go by itself after 10 s."""
    agent.behaviour["guest-fsfreeze-thaw"] = "let go"
    guard = start()
    guard.freeze(10)
    thawed = guard.thaw()
    assert thawed.doubt
    assert VSS in thawed.doubt
    assert not guard.may_be_frozen()


@pytest.mark.parametrize(
    ("before", "refusal", "count", "lasted"),
    [
        ("frozen", "", 3, True),
        ("frozen", "", 4, True),
        ("", "", 3, True),
        ("thawed", "", 3, False),
        ("frozen", "", 2, False),
        ("frozen", "no", 0, False),
    ],
)
def test_a_freeze_lasted_if_its_status_and_its_count_say_so(before, refusal, count, lasted):
    assert (freeze_control._doubt(before, Thaw(count, refusal), 3) == "") == lasted


@pytest.mark.parametrize("behaviour", ["silent", "refuse"])
def test_a_status_that_is_not_told_before_the_thaw_holds_it_up_for_a_second(behaviour):
    """The count alone then tells that the freeze lasted."""
    with tempfile.TemporaryDirectory(prefix="bc-") as directory, PlayedAgent(Path(directory, "ga")) as agent:
        freezer = freeze_control.FreezeControl(Address(path=str(agent.path)), 5.0)
        freezer.ping()
        freezer.freeze(10)
        agent.behaviour["guest-fsfreeze-status"] = behaviour
        agent.on_thaw = agent.behaviour.clear
        assert freezer.thaw() < 4500
        assert freezer.doubt == ""


def test_recover_is_content_with_a_refused_thaw_if_the_guest_is_thawed(agent):
    agent.frozen = True
    agent.behaviour["guest-fsfreeze-thaw"] = "let go"
    assert thaw_if_frozen(Address(path=str(agent.path)), 2.0)
    agent.behaviour.clear()
    agent.frozen = True
    agent.behaviour["guest-fsfreeze-thaw"] = "refuse"
    with pytest.raises(AgentRefused):
        thaw_if_frozen(Address(path=str(agent.path)), 2.0)


@PLAYED
@pytest.mark.parametrize(
    ("attempt", "file", "shows"),
    [
        ("pathlib.Path('/proc/self/oom_score_adj').write_text('-1000')", "oom_score_adj", r"-1000"),
        ("sys.exit(ctypes.CDLL(None).mlockall(3))", "status", r"VmLck:\s+\d{4,} kB"),
        ("", "status", r"Umask:\s+0077"),
    ],
    ids=["killed", "swapped", "umask"],
)
def test_a_guard_asks_to_be_neither_killed_for_memory_nor_swapped_out(start, attempt, file, shows):
    if subprocess.run(
        [sys.executable, "-c", f"import ctypes, pathlib, sys; {attempt}"], check=False
    ).returncode:
        pytest.skip("takes a right that this user has not")
    assert re.search(shows, Path("/proc", str(start()._process.pid), file).read_text())


@pytest.mark.parametrize(("before", "after"), [("0", "-1000"), ("500", "-1000"), ("-1000", "-1000")])
def test_the_kernel_is_asked_for_the_lowest_score(monkeypatch, tmp_path, before, after):
    (tmp_path / "score").write_text(before)
    monkeypatch.setattr(guard_survival, "_SCORE", tmp_path / "score")
    monkeypatch.setattr(guard_survival, "_lock_memory", lambda: None)
    guard_survival.outlive()
    assert (tmp_path / "score").read_text() == after


def test_a_guard_that_may_not_lock_its_memory_works_all_the_same():
    """Memory locked within a limit could not grow past it."""
    code = (
        "import resource, sys; from backupctl.vm.guest import guard_survival;"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20)); import os; os.setuid(65534);"
        "guard_survival.outlive(); print(open('/proc/self/status').read(), len(bytearray(64 << 20)))"
    )
    if os.geteuid() != 0:
        code = code.replace("os.setuid(65534)", "0")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.search(r"VmLck:\s+0 kB", done.stdout)


def test_sockets_that_the_guard_could_not_reach_are_refused_before_it_starts(tmp_path, monkeypatch):
    """Named from where the run stands their names are short enough."""
    (tmp_path / ("x" * 100)).mkdir()
    monkeypatch.chdir(tmp_path / ("x" * 100))
    with pytest.raises(Refused, match="too long when it is absolute"):
        GuardClient.start(Address(path="qmp"), None, 1.0, 0)
    with pytest.raises(Refused, match="too long when it is absolute"):
        GuardClient.start(NO_MONITOR, Address(path="agent"), 1.0, 0)


def test_a_thaw_is_done_without_a_thread_where_there_can_be_none(monkeypatch):
    with tempfile.TemporaryDirectory(prefix="bc-") as directory, PlayedAgent(Path(directory, "ga")) as agent:
        freezer = freeze_control.FreezeControl(Address(path=str(agent.path)), 2.0)
        freezer.ping()
        freezer.freeze(0.5)
        time.sleep(0.5)
        monkeypatch.setattr(threading.Thread, "start", lambda _: (_ for _ in ()).throw(RuntimeError))
        freezer.thaw_when_due()
        assert not agent.frozen
        assert freezer.overrun
        with pytest.raises(FreezeOverrun, match="the guard thawed the guest"):
            freezer.thaw()


def test_a_guest_whose_thaw_goes_on_is_not_called_thawed():
    frozen = threading.Event()

    class Silent:
        """An agent that froze, and then hangs with its QEMU."""

        def freeze(self, _budget: float) -> int:
            return 1

        def freeze_status(self, *_: object) -> str:
            if not frozen.is_set():
                return "thawed"
            raise AgentTimeout("no answer")

        def thaw_for_sure(self) -> None:
            raise AgentTimeout("no answer")

        def close(self) -> None:
            pass

    freezer = freeze_control.FreezeControl(Silent, 0.1)  # type: ignore[arg-type]
    freezer.ping()
    freezer.freeze(0.0)
    frozen.set()
    freezer.thaw_when_due()
    with pytest.raises(FreezeOverrun, match="the guard is thawing the guest"):
        freezer.thaw()
    freezer._give_up = 0.0
    freezer.join()


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


def test_the_guard_loads_little():
    """It starts anew for each run, which waits for it."""
    program = f"{PROGRAM.removesuffix('main()')}print(*sys.modules)"
    command = [sys.executable, "-I", "-S", "-c", program, str(ROOT)]
    loaded = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    slow = {"asyncio", "dataclasses", "inspect", "logging", "numpy", "pathlib", "secrets", "subprocess"}
    assert "backupctl.vm.guest.guard_process" in loaded
    assert slow.isdisjoint(loaded)
