# SPDX-License-Identifier: GPL-2.0-or-later
import errno

import pytest

from backupctl.simulator.faults import ACTIONS, BadFault, Faults, Stream, parse


def actions(faults, command, calls, where="qmp"):
    found = [faults.command(where, command) for _ in range(calls)]
    return [fault.action if fault else "" for fault in found]


@pytest.mark.parametrize(
    ("when", "met"),
    [("", [1]), ("@1", [1]), ("@3", [3]), ("@2+", [2, 3, 4]), ("@*", [1, 2, 3, 4])],
)
def test_a_fault_meets_the_calls_that_it_names(when, met):
    faults = Faults()
    faults.add(f"qmp:transaction{when}=silent")
    found = actions(faults, "transaction", 4)
    assert [number for number, action in enumerate(found, 1) if action] == met


def test_calls_are_counted_by_command():
    faults = Faults()
    faults.add("qmp:transaction@2=lost")
    assert actions(faults, "query-block", 3) == ["", "", ""]
    assert actions(faults, "transaction", 2) == ["", "lost"]


def test_a_pattern_counts_all_that_it_matches():
    faults = Faults()
    faults.add("qmp:query-*@2=hangup")
    assert actions(faults, "query-block", 1) == [""]
    assert actions(faults, "query-jobs", 1) == ["hangup"]


def test_agent_and_monitor_are_apart():
    faults = Faults()
    faults.add("agent:*@*=silent")
    assert actions(faults, "guest-ping", 1, "qmp") == [""]
    assert actions(faults, "guest-ping", 1, "agent") == ["silent"]


@pytest.mark.parametrize("action", sorted(ACTIONS))
def test_every_action_can_be_parsed(action):
    text = f"qmp:quit={action}" + (":0.5" if action in ("late", "answer") else "")
    assert parse(text).action == action


@pytest.mark.parametrize(
    "text",
    [
        "",
        "qmp",
        "qmp:quit",
        "qmp:quit=explode",
        "qmp:quit@0=silent",
        "qmp:quit@x=silent",
        "qmp:quit=late:soon",
        "qmp:quit=answer",
        "qmp:quit=answer:{",
        "nbd:sent=drop",
        "nbd:sent@many=drop",
        "nbd:write@0=error",
        "nbd:read@0=error:ENOSUCH",
        "scratch:tmp=full",
        "scratch:tmp=half:4k",
        "disk:vda=error",
    ],
)
def test_what_is_no_fault_is_refused_with_words(text):
    with pytest.raises(BadFault) as caught:
        parse(text)
    assert str(caught.value)


@pytest.mark.parametrize(
    ("offset", "length", "fails"),
    [
        (0, 4096, False),
        (4096, 1, True),
        (0, 4097, True),
        (8191, 1, True),
        (8192, 100, True),
        (8193, 1, False),
    ],
)
def test_reads_fail_that_touch_the_range(offset, length, fails):
    faults = Faults()
    faults.add("nbd:read@4k-8k=error:ENOSPC")
    if not fails:
        faults.check_nbd("read", offset, length)
        return
    with pytest.raises(OSError) as caught:
        faults.check_nbd("read", offset, length)
    assert caught.value.errno == errno.ENOSPC
    faults.check_nbd("status", offset, length)


def test_sent_bytes_are_counted_from_when_the_fault_was_made():
    faults = Faults()
    assert faults.stream(1000) is None
    faults.add("nbd:sent@1k=stall")
    assert faults.stream(1024) is None
    assert faults.stream(1) is Stream.STALL


def test_capacity_is_by_node_and_pattern():
    faults = Faults()
    faults.add("scratch:backupctl-*=full:1M")
    assert faults.capacity("backupctl-tmp0") == 1 << 20
    assert faults.capacity("drive-vda") is None
    faults.clear()
    assert faults.capacity("backupctl-tmp0") is None


def test_the_control_socket_shows_a_fault_under_the_names_that_its_clients_know():
    assert parse("qmp:quit@2+=late:0.5").document() == {
        "text": "qmp:quit@2+=late:0.5",
        "where": "qmp",
        "what": "quit",
        "first": 2,
        "last": None,
        "deed": "late",
        "argument": "0.5",
        "calls": 0,
    }
