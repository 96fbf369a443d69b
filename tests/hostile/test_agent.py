# SPDX-License-Identifier: GPL-2.0-or-later
"""An agent that lies: the guest is not frozen when the run has ended, and the point says what it is."""

import json

import pytest

from tests.hostile.lying_peer import answer, endless, hangs_up, raw, refuses, returns

ESCAPES = "\x1b]0;owned\x07\x1b[31mred\r\nbackupctl: all is well\u202egnp"
DEEP = b'{"return": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
DIGITS = b'{"return": ' + b"9" * 5000 + b"}\n"
LIES = {
    "silence": lambda _: b"",
    "hang up": hangs_up,
    "garbage": raw(b"{]]\n"),
    "escapes": raw(ESCAPES.encode() + b"\n"),
    "no utf-8": raw(b'{"return": "\xfe\xfe"}\n'),
    "only delimiters": endless(b"\xff" * 65536),
    "endless line": endless(b"x" * 65536),
    "endless text": endless(b"x" * 65536, before=b'\xff{"return": "'),
    "endless lines": endless(b"{}\n" * 10_000),
    "deep": raw(DEEP),
    "many digits": raw(DIGITS),
    "a list": raw(b"[]\n"),
    "nothing": raw(b"{}\n"),
    "another's number": returns(4711),
    "null": returns(None),
    "true": returns(True),
    "a fraction": returns(1.5),
    "a text": returns(ESCAPES),
    "a list of texts": returns([ESCAPES]),
    "below nothing": returns(-1),
    "error": refuses("no"),
    "error of escapes": refuses(ESCAPES),
    "error of five megabytes": refuses("x" * 5_000_000),
    "error that is a list": lambda line: answer(line, {"error": [ESCAPES]}),
    "error without a text": lambda line: answer(line, {"error": {}}),
    "error that is a number": refuses(5),
    "answer and error": lambda line: answer(line, {"return": 1, "error": {"desc": "no"}}),
    "twice": lambda line: line + line,
}
COMMANDS = (
    "guest-sync-delimited",
    "guest-fsfreeze-status",
    "guest-fsfreeze-freeze",
    "guest-fsfreeze-thaw",
    "guest-fsfreeze-status@2",
    "*",
)
TOGETHER = [
    pytest.param(
        command, name, id=f"{command}: {name}", marks=() if command == "*" or quick else pytest.mark.slow
    )
    for row, command in enumerate(COMMANDS)
    for column, name in enumerate(LIES)
    for quick in [row == column % (len(COMMANDS) - 1)]
]


@pytest.mark.parametrize(("command", "name"), TOGETHER)
def test_a_lie_of_the_agent_leaves_no_frozen_guest_and_no_false_word(victim, command, name):
    done = victim.attack(agent={command: LIES[name]})
    assert done.code in (0, 1, 3), done
    if done.code == 0 and command in ("guest-fsfreeze-freeze", "*") and name != "another's number":
        assert json.loads(done.out)["consistency"] == "crash", done
    victim.recovers()


@pytest.mark.parametrize("name", LIES)
def test_an_agent_that_is_none_fails_a_run_that_needs_it_before_anything_is_touched(victim, name):
    if name == "twice":
        pytest.skip("what says everything twice answers well to the first two questions")
    done = victim.attack("incremental", "--freeze", "require", agent={"*": LIES[name]})
    assert done.code == 1
    assert done.error["kind"] in ("AgentUnavailable", "AgentRefused", "AgentTimeout"), done
    victim.recovers()
