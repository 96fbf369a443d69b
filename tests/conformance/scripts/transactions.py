# SPDX-License-Identifier: GPL-2.0-or-later
"""Transactions: all actions or none, whatever the position of the one that fails."""

from typing import Any

from tests.conformance.session import Session, script

Action = tuple[str, dict[str, Any]]


def bitmap(action: str, name: str = "b0", **more: Any) -> Action:
    return f"block-dirty-bitmap-{action}", {"node": "drive-vda", "name": name} | more


def merge(target: str, *sources: Any) -> Action:
    return "block-dirty-bitmap-merge", {"node": "drive-vda", "target": target, "bitmaps": list(sources)}


def backup(disk: str = "vda", job: str = "job0", target: str = "tmp0") -> Action:
    return "blockdev-backup", {"job-id": job, "device": f"drive-{disk}", "target": target, "sync": "none"}


def prepared(s: Session) -> None:
    """Leave a dirty recording b0, a dirty disabled b1 and a scratch node."""
    for name, at in (("b0", 0), ("b1", 262144)):
        s.do("block-dirty-bitmap-add", node="drive-vda", name=name)
        s.subject.write("vda", 1, at, 65536)
    s.do("block-dirty-bitmap-disable", node="drive-vda", name="b1")
    s.scratch()


@script()
def the_moment_of_a_backup(s: Session) -> None:
    prepared(s)
    s.transaction(bitmap("add", "b2", persistent=True), bitmap("disable"), backup())
    s.bitmaps()
    s.subject.write("vda", 2, 524288, 65536)
    s.bitmaps()
    s.do("query-jobs")
    s.end_job()


@script()
def two_disks_in_one_moment(s: Session) -> None:
    prepared(s)
    s.scratch("tmp1", "drive-vdb")
    s.transaction(bitmap("add", "b2"), backup(), backup("vdb", "job1", "tmp1"))
    s.do("query-jobs", lambda jobs: sorted((j["id"], j["status"]) for j in jobs))
    s.end_job("job0")
    s.end_job("job1")


@script()
def the_rollback_of_a_backup(s: Session) -> None:
    prepared(s)
    s.transaction(bitmap("add", "b2"), bitmap("disable"))
    s.subject.write("vda", 3, 1048576, 65536)
    s.transaction(bitmap("enable"), merge("b0", "b2"), bitmap("remove", "b2"))
    s.bitmaps()


@script()
def an_empty_transaction(s: Session) -> None:
    s.transaction()


@script()
def a_failure_at_each_position_undoes_all(s: Session) -> None:
    prepared(s)
    good = [
        bitmap("add", "b2"),
        bitmap("disable"),
        bitmap("clear"),
        bitmap("enable", "b1"),
        merge("b1", "b0"),
        bitmap("remove", "b1"),
    ]
    for position in range(len(good) + 1):
        s.transaction(*good[:position], bitmap("clear", "absent"), *good[position:])
        s.bitmaps()


@script()
def each_kind_of_action_can_be_the_one_that_fails(s: Session) -> None:
    prepared(s)
    bad = [bitmap("add"), merge("b0", "absent"), backup(target="absent"), ("no-such-action", {})]
    bad += [bitmap(action, "absent") for action in ("remove", "clear", "disable")]
    # Enabling an absent bitmap in a transaction is left out: it crashes QEMU (test_dangers).
    for action in bad:
        s.transaction(bitmap("add", "b2"), bitmap("disable"), action)
    s.bitmaps()


@script()
def a_failure_after_a_backup_action_takes_the_job_back(s: Session) -> None:
    prepared(s)
    s.transaction(bitmap("add", "b2"), backup(), bitmap("disable", "absent"))
    s.bitmaps()
    s.do("query-jobs")
    s.do("blockdev-del", node_name="tmp0")


@script()
def remove_and_add_of_one_name(s: Session) -> None:
    prepared(s)
    s.transaction(bitmap("remove"), bitmap("add"))
    s.bitmaps()


@script()
def add_and_remove_of_one_name(s: Session) -> None:
    prepared(s)
    s.transaction(bitmap("add", "b2"), bitmap("remove", "b2"))
    s.bitmaps()


@script()
def add_then_use_within_a_transaction(s: Session) -> None:
    prepared(s)
    s.transaction(bitmap("add", "b2", disabled=True), merge("b2", "b0", "b1"), bitmap("enable", "b2"))
    s.bitmaps()


@script()
def merge_then_clear_its_source(s: Session) -> None:
    prepared(s)
    s.transaction(merge("b1", "b0"), bitmap("clear"))
    s.bitmaps()


@script()
def one_action_twice(s: Session) -> None:
    prepared(s)
    s.transaction(bitmap("disable"), bitmap("disable"), bitmap("clear"), bitmap("clear"))
    s.transaction(bitmap("remove", "b1"), bitmap("remove", "b1"))
    s.bitmaps()


@script()
def grouped_completion(s: Session) -> None:
    prepared(s)
    s.scratch("tmp1", "drive-vdb")
    s.transaction(backup(), backup("vdb", "job1", "tmp1"), properties={"completion-mode": "grouped"})
    s.do("block-job-cancel", device="job0")
    for job in ("job0", "job1"):
        s.await_event("JOB_STATUS_CHANGE", id=job, status="null")
    s.transaction(bitmap("disable"), properties={"completion-mode": "grouped"})
    s.transaction(bitmap("disable"), properties={"completion-mode": "sometimes"})


@script()
def a_busy_bitmap_in_a_transaction(s: Session) -> None:
    prepared(s)
    s.serve()
    s.export("drive-vda", bitmaps=["b1"])
    s.transaction(bitmap("enable"), merge("b0", "b1"), bitmap("remove", "b1"))
    s.bitmaps()
    s.unexport()
