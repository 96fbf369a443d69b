# SPDX-License-Identifier: GPL-2.0-or-later
"""Throttle groups, throttle nodes under a scratch file, and its write threshold."""

from typing import Any

from tests.conformance import subjects
from tests.conformance.session import Session, script

LIMITS = {"bps-write": 16384, "bps-write-max": 64 << 20}


def group(s: Session, name: str = "lim0", **more: Any) -> None:
    s.execute("object-add", {"qom-type": "throttle-group", "id": name, "limits": LIMITS} | more)


def scratch(s: Session, group_name: str = "lim0") -> dict[str, Any]:
    """Describe a scratch node tmp0 behind a limit, over the disk vda."""
    file = {
        "driver": "file",
        "node-name": "fil0",
        "filename": str(subjects.image(s.directory / "scratch.img")),
    }
    throttle = {"driver": "throttle", "throttle-group": group_name, "file": file}
    return {"driver": "qcow2", "node-name": "tmp0", "file": throttle, "backing": "drive-vda"}


def our_groups(found: list[dict[str, str]]) -> list[dict[str, str]]:
    return sorted((entry for entry in found if entry["name"].startswith("lim")), key=lambda e: e["name"])


@script()
def a_group_comes_and_goes(s: Session) -> None:
    group(s)
    s.do("qom-list", our_groups, path="/objects")
    group(s)
    s.execute(
        "qom-set",
        {"path": "/objects/lim0", "property": "limits", "value": {"bps-write": 1 << 20, "bps-write-max": 0}},
    )
    s.execute("qom-set", {"path": "/objects/lim1", "property": "limits", "value": {"bps-write": 1 << 20}})
    s.do("object-del", id="lim0")
    s.do("object-del", id="lim0")
    s.do("qom-list", our_groups, path="/objects")


@script()
def groups_that_can_not_be(s: Session) -> None:
    s.execute("object-add", {"qom-type": "throttle-group"})
    s.execute("object-add", {"id": "lim0"})
    group(s, "0lim")
    group(s, limits={"no-such-limit": 1})
    s.do("qom-list", our_groups, path="/objects")
    group(s)
    for limits in (
        5,
        {"bps-write": -1},
        {"bps-write": 0, "bps-write-max": 1},
        {"bps-write": 2, "bps-write-max": 1},
        {"bps-total": 1},
        {"iops-read": 1},
    ):
        s.execute("qom-set", {"path": "/objects/lim0", "property": "limits", "value": limits})
    s.execute("qom-get", {"path": "/objects/lim0", "property": "limits"})


@script()
def a_job_into_a_scratch_behind_a_limit(s: Session) -> None:
    s.subject.write("vda", 1, 0, 20 * 65536)
    s.execute("blockdev-add", scratch(s))
    group(s)
    s.execute("blockdev-add", scratch(s))
    s.do("blockdev-del", node_name="fil0")
    s.do("object-del", id="lim0")
    s.do("block-set-write-threshold", node_name="fil0", write_threshold=12 * 65536)
    s.do(
        "transaction",
        actions=[
            {
                "type": "blockdev-backup",
                "data": {"job-id": "job0", "device": "drive-vda", "target": "tmp0", "sync": "none"},
            }
        ],
    )
    s.subject.write("vda", 2, 0, 2 * 65536)
    s.subject.write("vda", 2, 2 * 65536, 18 * 65536)
    s.do("qom-list", our_groups, path="/objects")
    s.execute(
        "qom-set",
        {"path": "/objects/lim0", "property": "limits", "value": {"bps-write": 0, "bps-write-max": 0}},
    )
    s.do("transaction", actions=[])
    s.do("block-job-cancel", device="job0", force=True)
    s.await_event("JOB_STATUS_CHANGE", id="job0", status="null")
    s.do("blockdev-del", node_name="tmp0")
    s.do("object-del", id="lim0")
    s.nodes()
