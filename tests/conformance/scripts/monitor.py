# SPDX-License-Identifier: GPL-2.0-or-later
"""Greeting, negotiation, errors of the monitor itself, one client at a time."""

import json
import time

from tests.conformance import subjects
from tests.conformance.qmp import Monitor
from tests.conformance.session import Session, script

COMMANDS = [
    "add-fd",
    "block-dirty-bitmap-add",
    "block-dirty-bitmap-clear",
    "block-dirty-bitmap-disable",
    "block-dirty-bitmap-enable",
    "block-dirty-bitmap-merge",
    "block-dirty-bitmap-remove",
    "block-export-add",
    "block-export-del",
    "block-job-cancel",
    "block-set-write-threshold",
    "block_resize",
    "blockdev-add",
    "blockdev-backup",
    "blockdev-del",
    "blockdev-snapshot",
    "closefd",
    "cont",
    "device_add",
    "device_del",
    "getfd",
    "job-cancel",
    "job-dismiss",
    "nbd-server-start",
    "nbd-server-stop",
    "qmp_capabilities",
    "qom-get",
    "qom-list",
    "qom-set",
    "query-block",
    "query-block-exports",
    "query-block-jobs",
    "query-commands",
    "query-fdsets",
    "query-jobs",
    "query-named-block-nodes",
    "query-qmp-schema",
    "query-status",
    "query-version",
    "quit",
    "remove-fd",
    "stop",
    "system_powerdown",
    "transaction",
]


@script()
def greeting_and_negotiation(s: Session) -> None:
    s.note("greeting", s.monitor.receive())
    s.do("query-version")
    s.do("qmp_capabilities", enable=["nonsense"])
    s.do("qmp_capabilities")
    s.do("qmp_capabilities")
    s.do("query-version")


@script()
def oob_negotiation(s: Session) -> None:
    s.monitor.receive()
    s.do("qmp_capabilities", enable=["oob"])
    s.monitor.send(b'{"exec-oob": "query-version", "id": 1}\n')
    s.note("exec-oob", s.monitor.reply())


@script()
def unknown_command(s: Session) -> None:
    s.do("no-such-command")
    s.do("query-version")


@script()
def malformed_input(s: Session) -> None:
    for line in (
        b"{]\n",
        b"[]\n",
        b"17\n",
        b'{"nothing": 1}\n',
        b'{"execute": 5}\n',
        b'{"execute": "query-status", "more": 1}\n',
        b'{"execute": "query-status", "id": "\\ud800"}\n',
        b'{"execute": "blockdev-del", "arguments": {"node-name": "\\u0000 \\ud83d\\ude00"}}\n',
    ):
        s.monitor.send(line)
        s.note(line.decode(), s.monitor.reply())
    s.do("query-version")


@script()
def arguments_are_checked(s: Session) -> None:
    s.do("query-version", surplus=1)
    s.do("block-dirty-bitmap-add", node="drive-vda")
    s.do("block-dirty-bitmap-add", node=5, name="b")
    s.do("block-dirty-bitmap-add", node="drive-vda", name="b", persistent="yes")
    s.do("blockdev-backup", device="drive-vda", target="drive-vdb", sync="sometimes")
    s.execute("transaction", {"actions": [{"type": "no-such-action", "data": {}}]})
    s.execute("transaction", {"actions": [{"data": {}}]})
    s.execute("transaction", {})
    s.monitor.send(b'{"execute": "query-version", "arguments": []}\n')
    s.note("arguments are a list", s.monitor.reply())


@script()
def identities_come_back(s: Session) -> None:
    for identity in (1, "text", {"an": ["object"]}, None):
        s.monitor.send(json.dumps({"execute": "query-version", "id": identity}).encode() + b"\n")
        s.note("with an id", s.monitor.reply())
    s.monitor.send(b'{"execute": "no-such-command", "id": 9}\n')
    s.note("an error with an id", s.monitor.reply())


@script()
def several_commands_in_one_packet(s: Session) -> None:
    s.monitor.send(
        b'{"execute":"query-version","id":1}{"execute":"query-jobs","id":2}\n{"execute":\n"query-block-jobs","id":3}\n'
    )
    for _ in range(3):
        s.note("reply", s.monitor.reply())


@script()
def a_command_in_two_pieces(s: Session) -> None:
    """Wherever it is cut, it is one command."""
    cuts = [
        (b'{"execute": "query-named-block-nodes", "arguments": {"flat": tr', b'ue, "surplus": 1}}\n'),
        (b'{"execute": "block_resize", "arguments": {"size": -', b"1}}\n"),
        (b'{"execute": "query-\\u00', b'41"}\n'),
        (b'{"execute": "query-\xc3', b'\xa4"}\n'),
    ]
    for first, second in cuts:
        s.monitor.send(first)
        time.sleep(0.1)
        s.monitor.send(second)
        s.note(str(first), s.monitor.reply())


@script()
def second_client_waits_for_the_first(s: Session) -> None:
    with s.another_client() as second:
        second.settimeout(0.3)
        try:
            s.note("while the first is here", second.recv(1))
        except TimeoutError:
            s.note("while the first is here", "nothing")
        s.monitor.close()
        second.settimeout(60)
        s.note("after it left", json.loads(second.makefile().readline()))


@script()
def a_new_client_negotiates_anew(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vda", name="stays")
    s.monitor.close()
    s.monitor = Monitor(s.subject.qmp)
    s.note("greeting", s.monitor.receive())
    s.do("query-block-jobs")
    s.do("qmp_capabilities")
    s.bitmaps()


@script()
def commands_and_schema_name_what_backupctl_needs(s: Session) -> None:
    s.do("query-commands", lambda found: sorted({c["name"] for c in found} & set(COMMANDS)))
    s.do("query-qmp-schema", lambda found: sorted({c["name"] for c in found} & set(COMMANDS)))


@script()
def version_is_told(s: Session) -> None:
    s.do("query-version")


@script()
def quit_says_goodbye(s: Session) -> None:
    s.do("quit")
    s.await_event("SHUTDOWN")


@script()
def quit_with_a_job_running(s: Session) -> None:
    s.scratch()
    s.fleece()
    s.do("quit")
    s.await_event("SHUTDOWN")


@script("cd", "readonly")
def query_block_shapes(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vda", name="b0", persistent=True)
    s.subject.write("vda", 1, 0, 65536)
    s.do("query-block", lambda drives: sorted(drives, key=lambda drive: drive["qdev"]))


@script("readonly")
def query_named_block_nodes_shapes(s: Session) -> None:
    s.do("query-named-block-nodes", _named, flat=True)
    s.scratch()
    s.do("query-named-block-nodes", _named, flat=True)
    s.do("query-named-block-nodes", _named)


def _named(nodes: list[dict[str, object]]) -> list[dict[str, object]]:
    """Sort by name: the order of nodes is that of their making, turned round, and nothing rests on it."""
    return sorted(
        (n for n in nodes if not str(n["node-name"]).startswith("#")), key=lambda n: str(n["node-name"])
    )


@script()
def nothing_is_there_at_first(s: Session) -> None:
    for query in ("query-jobs", "query-block-jobs", "query-block-exports", "query-fdsets"):
        s.do(query)
    assert subjects.SIZE > 0
