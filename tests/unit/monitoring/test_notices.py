# SPDX-License-Identifier: GPL-2.0-or-later
"""Which results are worth a notice, and what is remembered for that."""

import pytest

from backupctl.monitoring import memory, notices
from backupctl.monitoring.memory import Memory, Past, Record, Told
from backupctl.monitoring.result import Result

DONE = Result("web", "full", "/r", began=1000.0, seconds=5.0, outcome="success")
FAILED = Result(
    "web",
    "full",
    "/r",
    began=1000.0,
    outcome="failure",
    exit_code=1,
    error={
        "kind": "WriteFailed",
        "message": "cannot write vda: No space left on device",
        "next": "backupctl x",
    },
)
TOLD = Past(told=Told(reason="WriteFailed", at=1000))
OTHER = Past(told=Told(reason="ReadFailed", at=1000))


@pytest.mark.parametrize(
    ("before", "result", "now", "why"),
    [
        (Past(), FAILED, 1000, "failure"),
        (TOLD, FAILED, 1010, None),
        (TOLD, FAILED, 1099, None),
        (TOLD, FAILED, 1100, "failure"),
        (TOLD, FAILED, 990, "failure"),  # the clock was set back
        (OTHER, FAILED, 1010, "failure"),
        (TOLD, DONE, 1010, "recovery"),
        (Past(), DONE, 1010, None),
    ],
)
def test_a_failure_is_told_once_and_so_is_its_end(before, result, now, why):
    assert notices.due(before, result, now, 100, on_success=False) == why


def test_a_success_is_told_only_on_request():
    assert notices.due(Past(), DONE, 1010, 100, on_success=True) == "success"
    assert notices.due(TOLD, DONE, 1010, 100, on_success=True) == "recovery"


def test_a_notice_says_what_failed_and_what_to_do():
    made = notices.compose("failure", FAILED)
    assert made.subject.endswith(": full of web failed (WriteFailed)")
    assert "No space left on device" in made.text
    assert "next: backupctl x" in made.text
    assert made.document["error"]["kind"] == "WriteFailed"
    assert made.document["notice"] == "failure"


def record(reason: str = "", *, partial: bool = False) -> Record:
    return Record(command="verify", ended=1.0, seconds=1.0, exit_code=0, reason=reason, partial=partial)


def test_a_sample_without_damage_does_not_hide_the_damage_of_an_earlier_verify():
    damaged = Past(last=record("DamageFound"))
    assert damaged.after(record(partial=True)) == damaged
    assert damaged.after(record()).last == record()
    assert damaged.after(record("RepositoryUnreadable", partial=True)).last.reason == "RepositoryUnreadable"
    assert Past(last=record()).after(record(partial=True)).last == record(partial=True)


def test_what_is_remembered_is_read_again(tmp_path):
    known = Memory(repository="/r", backup=TOLD).with_past("verify", Past(last=record("DamageFound")))
    with memory.locked(tmp_path / "state", "web"):
        memory.write(tmp_path / "state", "web", known)
    assert memory.read(tmp_path / "state", "web", "/r") == known
    assert memory.read(tmp_path / "state", "web", "/other") == Memory(repository="/other")
    assert memory.read(tmp_path / "state", "db", "/r") == Memory(repository="/r")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"backup": 7}', b'{"backup":' * 5000, b"x" * 100_000]
)
def test_a_damaged_memory_is_as_none(tmp_path, content):
    (tmp_path / "web.json").write_bytes(content)
    assert memory.read(tmp_path, "web", "/r") == Memory(repository="/r")
