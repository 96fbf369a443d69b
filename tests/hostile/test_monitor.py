# SPDX-License-Identifier: GPL-2.0-or-later
"""A monitor that lies, at any step of a run: a typed error, in bounds, and nothing is lost."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.hostile.lying_peer import Lie, changes, endless, hangs_up, raw, refuses, returns

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\r\nbackupctl: all is well\u202egnp"
HUGE = "9" * 5000
UNREACHABLE = {"MonitorUnreachable"}
UNKNOWN = {"OutcomeUnknown", "NeedsRecovery"}
NONSENSE = {"MonitorError", "NeedsRecovery", "Refused", "Failed"}


def nodes(change: Callable[[dict[str, Any]], Any]) -> Lie:
    """Change what is told of the disk's node."""

    def each(value: list[dict[str, Any]]) -> None:
        for node in value:
            if node["node-name"] == "drive-vda":
                change(node)

    return changes(each)


def bitmaps(**changed: Any) -> Lie:
    """Change what is told of the disk's bitmaps."""
    return nodes(lambda node: [bitmap.update(changed) for bitmap in node["dirty-bitmaps"]])


def image(**changed: Any) -> Lie:
    return nodes(lambda node: node["image"].update(changed))


def device(**changed: Any) -> Lie:
    return changes(lambda value: value[0].update(changed))


def inserted(**changed: Any) -> Lie:
    return changes(lambda value: value[0]["inserted"].update(changed))


GREETING = {
    "silence": lambda _: b"",
    "hang up": hangs_up,
    "garbage": raw(b"220 mail ready\r\n"),
    "binary": raw(bytes(range(256)) + b"\n"),
    "no utf-8": raw(b'{"QMP": "\xff\xfe"}\n'),
    "a list": raw(b"[]\n"),
    "a number": raw(b'{"QMP": 5}\n'),
    "no version": raw(b'{"QMP": {"capabilities": []}}\n'),
    "wrong types": raw(b'{"QMP": {"version": [], "capabilities": {"a": {}}}}\n'),
    "deep": raw(b'{"QMP": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"),
    "huge number": raw(b'{"QMP": ' + HUGE.encode() + b"}\n"),
    "endless line": endless(b"x" * 65536),
    "endless blank": endless(b" " * 65536),
    "endless lines": endless(b"{}\n" * 20_000),
    "endless greetings": endless(b'{"QMP": {"version": {}, "capabilities": []}}\n' * 1000),
}


@pytest.mark.parametrize("lie", GREETING.values(), ids=GREETING)
def test_what_does_not_greet_as_a_monitor_is_unreachable_and_nothing_is_touched(victim, lie):
    done = victim.attack(qmp={"greeting": lie})
    assert done.error["kind"] == "MonitorUnreachable", done
    assert done.seconds < 25
    victim.recovers()


VERSION = {
    "a list": returns([]),
    "nothing": returns({}),
    "null": returns(None),
    "texts": returns({"qemu": {"major": ESCAPES, "minor": 0, "micro": 0}}),
    "infinite": raw(b'{"return": {"qemu": {"major": 1e999, "minor": 0, "micro": 0}}, "id": "ID"}\n'),
    "many digits": raw(b'{"return": {"qemu": {"major": ' + HUGE.encode() + b'}}, "id": "ID"}\n'),
    "negative": returns({"qemu": {"major": -7, "minor": 0, "micro": 0}}),
    "too old": returns({"qemu": {"major": 4, "minor": 2, "micro": 0}, "package": ESCAPES}),
    "a thousand years": returns({"qemu": {"major": 10**200, "minor": 0, "micro": 0}}),
}


@pytest.mark.parametrize("lie", VERSION.values(), ids=VERSION)
def test_a_version_that_is_none_is_refused(victim, lie):
    done = victim.attack(qmp={"query-version": lie})
    assert done.error["kind"] in {"MonitorUnreachable", "Refused"}, done
    victim.recovers()


ANY = {
    "silence": lambda _: b"",
    "hang up": hangs_up,
    "garbage": raw(b"{]]\n"),
    "no utf-8": raw(b'{"return": "\xff\xfe", "id": "ID"}\n'),
    "lone surrogates": raw(b'{"return": "\\ud800", "id": "ID"}\n'),
    "another id": raw(b'{"return": [], "id": "__qmp#99999"}\n'),
    "an id that is a list": raw(b'{"return": [], "id": []}\n'),
    "an id that is an object": raw(b'{"return": [], "id": {"a": 1}}\n'),
    "no id": raw(b'{"return": []}\n'),
    "an error without id": raw(b'{"error": {"class": "GenericError", "desc": "what?"}}\n'),
    "twice": lambda line: line + line,
    "a name twice": raw(b'{"return": 1, "return": 2, "id": "ID", "id": "ID"}\n'),
    "neither": raw(b'{"id": "ID"}\n'),
    "error of a number": raw(b'{"error": 5, "id": "ID"}\n'),
    "error without a text": raw(b'{"error": {"class": "GenericError"}, "id": "ID"}\n'),
    "error with a list for a text": refuses(["a"]),
    "error with escapes": refuses(ESCAPES),
    "error of five megabytes": refuses("x" * 5_000_000),
    "error of a class of five megabytes": refuses("no", "x" * 5_000_000),
    "deep": raw(b'{"return": ' + b"[" * 100_000 + b"]" * 100_000 + b', "id": "ID"}\n'),
    "deep but legal": raw(b'{"return": ' + b"[" * 900 + b"]" * 900 + b', "id": "ID"}\n'),
    "many digits": raw(b'{"return": ' + HUGE.encode() + b', "id": "ID"}\n'),
    "endless line": endless(b"x" * 65536),
    "endless text": endless(b"x" * 65536, before=b'{"return": "'),
    "endless events": endless(b'{"event": "X", "timestamp": {"seconds": 1, "microseconds": 2}}\n' * 1000),
    "endless fat events": endless(b'{"event": "X", "data": "' + b"x" * 2_000_000 + b'"}\n'),
    "endless wrong events": endless(b'{"event": {}, "timestamp": []}\n' * 1000),
    "endless answers": endless(b'{"return": {}, "id": "nobody"}\n' * 1000),
    "an empty list": returns([]),
    "an empty object": returns({}),
    "null": returns(None),
    "a number": returns(5),
    "a text": returns(ESCAPES),
    "a list of null": returns([None]),
    "a list of texts": returns([ESCAPES]),
    "a list of lists": returns([[[]]]),
    "a list of empty objects": returns([{}]),
    "a million": returns([0] * 1_000_000),
}
COMMANDS = (
    *("query-named-block-nodes", "query-block", "query-block-exports", "query-jobs", "query-fdsets"),
    *("query-commands", "query-status", "add-fd", "blockdev-add", "transaction", "getfd"),
    *("nbd-server-start", "block-export-add", "block-export-del", "nbd-server-stop", "blockdev-del"),
    *("remove-fd", "block-job-cancel", "qmp_capabilities", "qom-list", "object-add", "object-del"),
    *("block-set-write-threshold", "query-iothreads", "query-block-jobs"),
)
ALWAYS = {("transaction", "silence"), ("transaction", "hang up")}  # was the moment taken?
TOGETHER = [  # one command for each lie in the quick tier, all of them in the long one
    pytest.param(
        command,
        lie,
        id=f"{command}: {name}",
        marks=() if number == place % len(COMMANDS) or (command, name) in ALWAYS else pytest.mark.slow,
    )
    for number, command in enumerate(COMMANDS)
    for place, (name, lie) in enumerate(ANY.items())
]


@pytest.mark.parametrize(("command", "lie"), TOGETHER)
def test_an_answer_that_is_none_is_a_typed_error_and_nothing_is_lost(victim, command, lie):
    done = victim.attack(qmp={command: lie})
    assert done.code in (0, 1, 3), done
    assert done.code == 0 or done.error["message"]
    if command == "nbd-server-start":
        # A refusal means that somebody else's server runs, which a run must not stop. Here it was a lie.
        victim.vm.qmp("nbd-server-stop")
    victim.recovers()


DISKS = {
    "size below nothing": image(**{"virtual-size": -1}),
    "size of a text": image(**{"virtual-size": "4M"}),
    "size true": image(**{"virtual-size": True}),
    "size of a fraction": image(**{"virtual-size": 4194304.5}),
    "size without end": nodes(lambda node: node["image"].update({"virtual-size": float("inf")})),
    "size of no number": nodes(lambda node: node["image"].update({"virtual-size": float("nan")})),
    "size beyond all disks": image(**{"virtual-size": 1 << 62}),
    "size of 63 bits": image(**{"virtual-size": (1 << 63) - 1}),
    "size of 300 bits": image(**{"virtual-size": 1 << 300}),
    "another size": image(**{"virtual-size": 5 << 20}),
    "allocated below nothing": image(**{"actual-size": -1}),
    "allocated without end": image(**{"actual-size": float("inf")}),
    "allocated of a text": image(**{"actual-size": "1M"}),
    "no image": nodes(lambda node: node.pop("image")),
    "driver of escapes": nodes(lambda node: node.update(drv=ESCAPES)),
    "driver of a list": nodes(lambda node: node.update(drv=[])),
    "driver without end": nodes(lambda node: node.update(drv="x" * 1_000_000)),
    "format-specific of a text": image(**{"format-specific": "x"}),
    "bitmaps of a text": nodes(lambda node: node.update({"dirty-bitmaps": "none"})),
    "bitmaps of a number": nodes(lambda node: node.update({"dirty-bitmaps": 5})),
    "bitmap that records perhaps": bitmaps(recording="false"),
    "bitmap busy with a text": bitmaps(busy="no"),
    "bitmap of a size without end": bitmaps(count=float("inf")),
    "bitmap of a granularity of null": bitmaps(granularity=None),
    "bitmap named by a number": bitmaps(name=5),
    "node named by a number": nodes(lambda node: node.update({"node-name": 5})),
    "node named by a list": nodes(lambda node: node.update({"node-name": []})),
    "node named by escapes": nodes(lambda node: node.update({"node-name": ESCAPES})),
}


@pytest.mark.parametrize("lie", DISKS.values(), ids=DISKS)
def test_a_disk_that_can_not_be_is_refused(victim, lie):
    done = victim.attack(qmp={"query-named-block-nodes": lie})
    assert done.code in (1, 3), done
    assert done.error["message"]
    victim.recovers()


STRANGE = {
    "a million bitmaps without a name": nodes(lambda node: node["dirty-bitmaps"].extend([{}] * 500_000)),
    "somebody's bitmap named by escapes": nodes(
        lambda node: node["dirty-bitmaps"].append({**node["dirty-bitmaps"][0], "name": ESCAPES})
    ),
    "a file name of escapes": image(filename=ESCAPES),
    "a file name without end": image(filename="x" * 1_000_000),
}


@pytest.mark.parametrize("lie", STRANGE.values(), ids=STRANGE)
def test_what_is_strange_but_not_ours_does_not_stop_a_run(victim, lie):
    done = victim.attack(qmp={"query-named-block-nodes": lie}, seconds=None)
    assert done.code == 0, done
    victim.recovers()


DEVICES = {
    "name that leaves the directory": device(qdev="/machine/peripheral/..%2f/x", device="../../etc/passwd"),
    "name of escapes": device(qdev=ESCAPES),
    "name without end": device(qdev="x" * 1_000_000),
    "inserted is a text": device(inserted="yes"),
    "inserted is a list": device(inserted=[1]),
    "node is a list": inserted(**{"node-name": ["drive-vda"]}),
    "node is nowhere": inserted(**{"node-name": "nowhere"}),
}


@pytest.mark.parametrize("lie", DEVICES.values(), ids=DEVICES)
def test_a_device_that_can_not_be_is_refused(victim, lie):
    done = victim.attack(qmp={"query-block": lie})
    assert done.code in (1, 3), done
    victim.recovers()


TOLD_BETTER_ELSEWHERE = {
    "driver is a list": inserted(drv=[]),
    "driver is that of a job's filter": inserted(drv="copy-before-write"),
    "twice": changes(lambda value: value + value),
}
"""A node's driver is asked of the node itself; of two devices on one node the first is taken."""


@pytest.mark.parametrize("lie", TOLD_BETTER_ELSEWHERE.values(), ids=TOLD_BETTER_ELSEWHERE)
def test_a_device_whose_node_tells_the_truth_is_backed_up(victim, lie):
    done = victim.attack(qmp={"query-block": lie}, seconds=None)
    assert done.code == 0, done
    victim.recovers()


def test_a_descriptor_set_is_a_number_and_no_path(victim):
    done = victim.attack(qmp={"add-fd": returns({"fdset-id": "../../etc/passwd", "fd": 1})})
    assert done.error["kind"] == "MonitorError", done
    victim.recovers()
