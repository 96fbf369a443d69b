# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine around the disks: running, stopping, plugging."""

from tests.conformance.session import Session, script


@script()
def stop_and_cont(s: Session) -> None:
    s.do("cont")
    s.await_event("RESUME")
    s.do("query-status")
    s.do("stop")
    s.await_event("STOP")
    s.do("query-status")
    s.do("stop")
    s.do("query-status")


@script("running")
def powerdown_is_only_a_wish(s: Session) -> None:
    s.do("system_powerdown")
    s.await_event("POWERDOWN")


@script("port")
def a_disk_is_plugged_in(s: Session) -> None:
    s.scratch("drive-vdx", None)
    s.do("device_add", driver="virtio-blk-pci", id="vdx", drive="drive-vdx", bus="rp0")
    s.do("query-block", lambda drives: sorted(d["qdev"] for d in drives))
    s.do("blockdev-del", node_name="drive-vdx")


@script("port")
def plugging_errors(s: Session) -> None:
    s.do("device_add", driver="virtio-blk-pci", id="vdx", drive="absent", bus="rp0")
    s.do("device_add", driver="no-such-device", id="vdx")
    s.scratch("drive-vdx", None)
    s.do("device_add", driver="virtio-blk-pci", id="vda", drive="drive-vdx", bus="rp0")
    s.do("device_add", driver="virtio-blk-pci", id="vdx", drive="drive-vda", bus="rp0")
    s.do("device_del", id="absent")
    s.do("query-block", lambda drives: sorted(d["qdev"] for d in drives))


@script("cd")
def an_empty_drive_has_no_medium(s: Session) -> None:
    s.do("query-block", lambda drives: [d for d in drives if "inserted" not in d])


@script()
def a_stopped_guest_keeps_its_job(s: Session) -> None:
    s.scratch()
    s.fleece()
    s.do("stop")
    s.do("query-jobs")
    s.end_job()


@script()
def what_the_machine_is(s: Session) -> None:
    for question in ("query-name", "query-uuid", "query-target", "query-kvm"):
        s.do(question)
