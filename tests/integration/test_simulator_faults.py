# SPDX-License-Identifier: GPL-2.0-or-later
"""Each action of the fault language, as the client of the socket sees it."""

import json
import signal
import socket
import time

import pytest

from fixtures.machine import Monitor
from fixtures.simulated import Simulated

GONE = {"class": "Gone", "desc": "the monitor hung up"}
ADD = {"node": "drive-vda", "name": "b0"}


@pytest.fixture
def vm():
    with Simulated("--disk", "vda=1M") as made:
        yield made


def other(vm):
    """Return a client of the first monitor, the one that faults are tried on."""
    return Monitor(vm.qmp_path)


def fault(vm, action, when=""):
    vm.control("fault", spec=f"qmp:block-dirty-bitmap-add{when}={action}")


@pytest.mark.parametrize(
    ("action", "reply", "done"),
    [
        ("error:no luck", {"class": "GenericError", "desc": "no luck"}, False),
        ("error-after:no luck", {"class": "GenericError", "desc": "no luck"}, True),
        ('answer:[5, "x"]', [5, "x"], False),
        ("hangup", GONE, False),
        ("lost", GONE, True),
        ("late:0.3", {}, True),
    ],
)
def test_what_is_answered_and_what_is_done(vm, action, reply, done):
    fault(vm, action)
    client = other(vm)
    begun = time.monotonic()
    assert client.execute("block-dirty-bitmap-add", ADD) == reply
    assert not action.startswith("late") or time.monotonic() - begun >= 0.3
    client.close()
    assert ("b0" in vm.bitmap_states()) == done


@pytest.mark.parametrize(("action", "done"), [("silent", False), ("unanswered", True)])
def test_no_answer_comes_but_the_monitor_goes_on(vm, action, done):
    fault(vm, action)
    client = other(vm)
    with socket.socket(socket.AF_UNIX) as raw:
        client.close()
        raw.settimeout(60)
        raw.connect(str(vm.qmp_path))
        stream = raw.makefile("rb")
        stream.readline()
        for number, message in enumerate(
            (
                {"execute": "qmp_capabilities"},
                {"execute": "block-dirty-bitmap-add", "arguments": ADD},
                {"execute": "query-status"},
            )
        ):
            raw.sendall(json.dumps(message | {"id": number}).encode())
        answered = [json.loads(stream.readline())["id"] for _ in range(2)]
    assert answered == [0, 2]
    assert ("b0" in vm.bitmap_states()) == done


@pytest.mark.parametrize("when", ["", "-after"])
def test_a_kill_is_a_sigkill(vm, when):
    fault(vm, f"kill{when}")
    assert other(vm).execute("block-dirty-bitmap-add", ADD) == GONE
    assert vm.wait() == -signal.SIGKILL


def test_a_clean_end_is_clean(vm):
    vm.qmp("block-dirty-bitmap-add", **ADD, persistent=True)
    vm.control("fault", spec="qmp:query-jobs=quit")
    assert other(vm).execute("query-jobs", {}) == GONE
    assert vm.wait() == 0
    vm.start()
    assert not vm.bitmap_states()["b0"].get("inconsistent")


@pytest.mark.parametrize(("action", "inconsistent"), [("crash", True), ("restart", False)])
def test_it_comes_back_with_bitmaps_as_qemu_leaves_them(vm, action, inconsistent):
    vm.qmp("block-dirty-bitmap-add", **ADD, persistent=True)
    vm.control("end", how="restart")
    reborn(vm)
    vm.qmp("block-dirty-bitmap-add", node="drive-vda", name="young")
    vm.control("fault", spec=f"qmp:query-jobs={action}")
    assert other(vm).execute("query-jobs", {}) == GONE
    reborn(vm)
    assert {name: bool(each.get("inconsistent")) for name, each in vm.bitmap_states().items()} == {
        "b0": inconsistent
    }


@pytest.mark.parametrize(("end", "reason"), [("quit", "host-qmp-quit"), ("SIGTERM", "host-signal")])
def test_a_clean_end_says_who_wanted_it(vm, end, reason):
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(60)
        raw.connect(str(vm.qmp_path))
        stream = raw.makefile("rb")
        stream.readline()
        raw.sendall(b'{"execute": "qmp_capabilities"}\n')
        stream.readline()
        if end == "quit":
            raw.sendall(b'{"execute": "quit"}\n')
        else:
            vm.process.terminate()
        said = [json.loads(line) for line in stream]
    assert [each["data"]["reason"] for each in said if each.get("event") == "SHUTDOWN"] == [reason]


def reborn(vm):
    """Wait until the machine that hung up on everybody serves again."""
    vm._hang_up()
    assert vm.qmp("query-status")["running"]


def test_a_killed_simulator_finds_its_disks_again(vm):
    vm.control("write", disk="vda", offset=65536, length=1000, pattern=7)
    before = vm.content("vda")
    vm.process.kill()
    vm.wait()
    vm.start()
    assert vm.content("vda") == before
    assert before[65536:66536] == b"\x07" * 1000


def test_an_agent_can_fail_too(vm):
    vm.control("fault", spec="agent:guest-fsfreeze-freeze=unanswered")
    with socket.socket(socket.AF_UNIX) as agent:
        agent.settimeout(0.3)
        agent.connect(str(vm.agent_path))
        agent.sendall(b'{"execute": "guest-fsfreeze-freeze"}\n')
        with pytest.raises(TimeoutError):
            agent.recv(1)
    assert vm.control("status")["frozen"]


def test_a_fault_that_makes_no_sense_is_refused(vm):
    with pytest.raises(RuntimeError, match="is not one of"):
        vm.control("fault", spec="qmp:quit=explode")
