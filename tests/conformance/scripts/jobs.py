# SPDX-License-Identifier: GPL-2.0-or-later
"""Backup jobs of sync=none: life, events, cancelling, what they hold."""

from tests.conformance import subjects
from tests.conformance.session import Session, script


@script()
def a_job_begins_and_is_cancelled(s: Session) -> None:
    s.scratch()
    s.fleece()
    s.do("query-jobs")
    s.do("query-block-jobs")
    s.end_job()
    s.do("query-jobs")
    s.do("blockdev-del", node_name="tmp0")


@script()
def a_job_cancelled_by_job_cancel(s: Session) -> None:
    s.scratch()
    s.fleece()
    s.do("job-cancel", id="job0")
    s.await_event("JOB_STATUS_CHANGE", id="job0", status="null")
    s.do("query-jobs")


@script()
def a_job_that_is_not_dismissed_by_itself(s: Session) -> None:
    s.scratch()
    s.fleece(auto_dismiss=False)
    s.do("job-dismiss", id="job0")
    s.do("block-job-cancel", device="job0")
    s.await_event("JOB_STATUS_CHANGE", id="job0", status="concluded")
    s.do("query-jobs")
    s.do("block-job-cancel", device="job0")
    s.do("job-dismiss", id="job0")
    s.do("query-jobs")


@script()
def job_errors(s: Session) -> None:
    s.do("block-job-cancel", device="absent")
    s.do("job-cancel", id="absent")
    s.do("job-dismiss", id="absent")
    s.fleece(target="absent")
    s.scratch()
    s.do("blockdev-backup", device="absent", target="tmp0", sync="none", job_id="j")
    s.do("blockdev-backup", device="drive-vda", target="tmp0", sync="none", job_id="9 bad id")
    s.do("blockdev-backup", device="drive-vda", target="drive-vda", sync="none", job_id="j")
    s.scratch("readonly", None, read_only=True)
    s.do("blockdev-backup", device="drive-vda", target="readonly", sync="none", job_id="j")
    s.do("query-jobs")


@script()
def a_job_needs_a_name_where_the_disk_has_none(s: Session) -> None:
    s.scratch()
    s.do("blockdev-backup", device="drive-vda", target="tmp0", sync="none")


@script()
def job_names_are_unique(s: Session) -> None:
    s.scratch()
    s.scratch("tmp1", "drive-vdb")
    s.fleece()
    s.fleece("vdb", target="tmp1")
    s.end_job()


@script()
def a_second_job_on_the_same_disk(s: Session) -> None:
    s.scratch()
    s.scratch("tmp1")
    s.fleece()
    s.fleece(job="job1", target="tmp1")
    s.do("query-jobs", lambda jobs: sorted(job["id"] for job in jobs))
    s.end_job()


@script()
def of_two_jobs_on_one_disk_either_may_end_first(s: Session) -> None:
    """The one that goes on still keeps, and the disk's bitmap still marks, what the guest does."""
    for first, second in (("job0", "job1"), ("job1", "job0")):
        s.do("block-dirty-bitmap-add", node="drive-vda", name="b0")
        s.scratch("tmp0", file=f"{first}-0")
        s.scratch("tmp1", file=f"{first}-1")
        s.fleece(job="job0", target="tmp0")
        s.fleece(job="job1", target="tmp1")
        s.end_job(first)
        s.subject.write("vda", 7, 65536, 1000)
        s.subject.discard("vda", 131072, 65536)
        s.do("query-jobs")
        s.end_job(second)
        s.bitmaps()
        s.do("block-dirty-bitmap-remove", node="drive-vda", name="b0")
        for node in ("tmp0", "tmp1"):
            s.do("blockdev-del", node_name=node)


@script()
def a_target_in_use_by_a_job(s: Session) -> None:
    s.scratch()
    s.fleece()
    s.fleece("vdb", job="job1")
    s.do("blockdev-del", node_name="tmp0")
    s.do("blockdev-del", node_name="drive-vda")
    s.end_job()
    s.do("blockdev-del", node_name="tmp0")


@script()
def a_target_of_another_size(s: Session) -> None:
    path = subjects.image(s.directory / "small", "qcow2", subjects.SIZE // 2)
    s.execute(
        "blockdev-add",
        {"driver": "qcow2", "node-name": "small", "file": {"driver": "file", "filename": str(path)}},
    )
    s.fleece(target="small")
    s.do("query-jobs")


@script()
def bitmaps_on_a_disk_with_a_job(s: Session) -> None:
    s.scratch()
    s.do("block-dirty-bitmap-add", node="drive-vda", name="b0")
    s.fleece()
    s.do("block-dirty-bitmap-add", node="drive-vda", name="b1")
    s.subject.write("vda", 1, 0, 65536)
    s.bitmaps()
    s.do("block-dirty-bitmap-remove", node="drive-vda", name="b0")
    s.end_job()
    s.bitmaps()


@script()
def a_full_copy_completes(s: Session) -> None:
    s.subject.write("vda", 9, 0, 262144)
    s.scratch("target", None)
    s.do("blockdev-backup", job_id="copy", device="drive-vda", target="target", sync="full")
    s.await_event("JOB_STATUS_CHANGE", id="copy", status="null")
    s.do("query-jobs")
