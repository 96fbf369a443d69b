# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks that come and go while the VM runs.

On a SCSI bus: there QEMU takes a disk away at once. From a PCI port only a guest's driver lets go of it.
"""

from typing import Any

from tests.conformance.session import Session, script


def _plug(s: Session, name: str = "sda") -> None:
    s.do("device_add", driver="scsi-hd", id=name, drive=f"drive-{name}", bus="scsi0.0")


def _unplug(s: Session, name: str = "sda") -> None:
    s.monitor.events.clear()
    s.do("device_del", id=name)
    s.await_event("DEVICE_DELETED", device=name)


def _look_around(s: Session) -> None:
    s.do("query-block", lambda drives: sorted((d["qdev"], _node(d)) for d in drives))
    s.nodes()


def _node(drive: dict[str, Any]) -> str:
    return str(drive.get("inserted", {}).get("node-name", ""))


@script("scsi")
def a_disk_comes_and_goes_and_its_bitmap_stays_with_the_node(s: Session) -> None:
    s.scratch("drive-sda", None, discard="unmap")
    s.do("block-dirty-bitmap-add", node="drive-sda", name="b0")
    _plug(s)
    _look_around(s)
    s.subject.write("sda", 1, 0, 65536)
    s.bitmaps("drive-sda")
    _unplug(s)
    _look_around(s)
    s.bitmaps("drive-sda")
    _plug(s)
    s.subject.write("sda", 2, 131072, 512)
    s.bitmaps("drive-sda")
    _unplug(s)
    s.do("blockdev-del", node_name="drive-sda")
    s.nodes()


@script("scsi")
def a_plugged_disk_s_node_is_in_use(s: Session) -> None:
    s.scratch("drive-sda", None)
    _plug(s)
    s.do("blockdev-del", node_name="drive-sda")
    _plug(s)
    s.do("device_add", driver="scsi-hd", id="sdb", drive="drive-sda", bus="scsi0.0")
    s.do("device_del", id="/machine/peripheral/sda")
    s.await_event("DEVICE_DELETED", device="sda")
    s.do("device_del", id="sda")
    s.do("device_del", id="/machine/peripheral/sda")
    s.do("blockdev-del", node_name="drive-sda")


@script("scsi")
def a_disk_leaves_under_a_job_which_goes_on(s: Session) -> None:
    s.scratch("drive-sda", None)
    _plug(s)
    s.scratch("tmp0", "drive-sda")
    s.do("blockdev-backup", job_id="job0", device="drive-sda", target="tmp0", sync="none")
    s.subject.write("sda", 1, 0, 512)
    s.do("device_del", id="sda")
    s.await_event("DEVICE_DELETED", device="sda")
    s.do("query-jobs")
    s.do("blockdev-del", node_name="drive-sda")
    s.end_job()
    s.do("blockdev-del", node_name="tmp0")
    s.do("blockdev-del", node_name="drive-sda")


@script("scsi")
def a_disk_leaves_under_an_export_which_goes_on(s: Session) -> None:
    s.scratch("drive-sda", None)
    s.do("block-dirty-bitmap-add", node="drive-sda", name="b0", disabled=True)
    _plug(s)
    s.subject.write("sda", 1, 65536, 65536)
    s.serve()
    s.export("drive-sda", name="disk", bitmaps=["b0"])
    s.do("device_del", id="sda")
    s.await_event("DEVICE_DELETED", device="sda")
    s.look("disk", "b0")
    s.unexport()
    s.do("blockdev-del", node_name="drive-sda")
