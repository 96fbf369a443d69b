# SPDX-License-Identifier: GPL-2.0-or-later
"""The second view: copy-before-write filter and snapshot-access, put under a device by qom-set."""

from tests.conformance.session import Session, script

PROPERTY = {"path": "/machine/peripheral/vda", "property": "drive"}


def filtered(s: Session, **more: object) -> None:
    """Leave a copy-before-write filter between the device vda and its disk."""
    s.scratch()
    s.do(
        "blockdev-add", driver="copy-before-write", node_name="cbw0", file="drive-vda", target="tmp0", **more
    )
    s.execute("qom-set", PROPERTY | {"value": "cbw0"})


@script()
def qom_tells_of_the_device(s: Session) -> None:
    s.execute("qom-get", PROPERTY)
    s.execute("qom-get", {"path": "/machine/peripheral/vda", "property": "absent"})
    s.execute("qom-get", {"path": "/machine/peripheral/absent", "property": "drive"})
    s.execute("qom-set", PROPERTY | {"value": "absent"})
    s.execute("qom-set", PROPERTY | {"value": 5})
    s.execute("qom-list", {"path": "/machine/peripheral/absent"})
    s.do(
        "qom-list",
        lambda found: sorted(p["name"] for p in found if p["name"] in ("vda", "vdb")),
        path="/machine/peripheral",
    )


@script()
def the_filter_goes_in_and_out(s: Session) -> None:
    filtered(s)
    s.do("query-block", lambda drives: sorted(d["inserted"]["node-name"] for d in drives))
    s.do("block_resize", node_name="tmp0", size=8 << 20)
    s.do("blockdev-del", node_name="cbw0")
    s.execute("qom-set", PROPERTY | {"value": "drive-vda"})
    s.do("blockdev-del", node_name="cbw0")
    s.do("blockdev-del", node_name="tmp0")
    s.nodes()


@script()
def snapshot_access_keeps_the_moment(s: Session) -> None:
    s.subject.write("vda", 1, 0, 4 * 65536)
    filtered(s)
    s.do("blockdev-add", driver="snapshot-access", node_name="snap0", file="cbw0")
    s.serve()
    s.export("snap0", name="moment")
    s.subject.write("vda", 2, 65536, 65536)
    s.subject.zero("vda", 0, 4096)
    s.subject.write("vda", 3, 20 * 65536, 65536)
    s.look("moment")
    s.unexport()
    s.do("blockdev-del", node_name="snap0")
    s.execute("qom-set", PROPERTY | {"value": "drive-vda"})
    s.do("blockdev-del", node_name="cbw0")
    s.do("blockdev-del", node_name="tmp0")


@script()
def bitmaps_of_the_disk_under_the_filter(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vda", name="b0")
    filtered(s, on_cbw_error="break-snapshot", cbw_timeout=10)
    s.subject.write("vda", 2, 65536, 65536)
    s.bitmaps()
    s.do("blockdev-add", driver="snapshot-access", node_name="snap0", file="cbw0")
    s.do("block-dirty-bitmap-disable", node="drive-vda", name="b0")
    s.serve()
    s.export("snap0", name="moment", bitmaps=[{"node": "drive-vda", "name": "b0"}])
    s.look("moment", "b0")
    s.unexport()


@script()
def a_filter_limited_to_a_bitmap(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vda", name="b0")
    s.subject.write("vda", 1, 0, 65536)
    filtered(s, bitmap={"node": "drive-vda", "name": "b0"})
    s.do("block-dirty-bitmap-disable", node="drive-vda", name="b0")
    s.do("blockdev-add", driver="snapshot-access", node_name="snap0", file="cbw0")
    s.bitmaps()


@script()
def filter_errors(s: Session) -> None:
    s.scratch()
    s.do("blockdev-add", driver="copy-before-write", node_name="cbw0", file="drive-vda", target="absent")
    s.do("blockdev-add", driver="copy-before-write", node_name="cbw0", file="absent", target="tmp0")
    s.do("blockdev-add", driver="copy-before-write", node_name="cbw0", file="drive-vda")
    s.do(
        "blockdev-add",
        driver="copy-before-write",
        node_name="cbw0",
        file="drive-vda",
        target="tmp0",
        on_cbw_error="nonsense",
    )
    s.do(
        "blockdev-add",
        driver="copy-before-write",
        node_name="cbw0",
        file="drive-vda",
        target="tmp0",
        bitmap={"node": "drive-vda", "name": "absent"},
    )
    s.do("blockdev-add", driver="snapshot-access", node_name="snap0", file="drive-vda")
    s.do("blockdev-add", driver="snapshot-access", node_name="snap0", file="absent")
    s.nodes()


@script()
def nobody_writes_past_a_filter_that_is_in_use(s: Session) -> None:
    s.scratch(backing=None)
    s.scratch("tmp1", None)
    s.do("blockdev-add", driver="copy-before-write", node_name="cbw0", file="drive-vda", target="tmp0")
    s.do("blockdev-add", driver="copy-before-write", node_name="cbw1", file="drive-vda", target="tmp1")
    s.do("blockdev-add", driver="snapshot-access", node_name="snap0", file="cbw0")
    s.serve()
    s.export("cbw0")
    s.execute("qom-set", PROPERTY | {"value": "cbw0"})
    s.do("blockdev-add", driver="snapshot-access", node_name="snap0", file="cbw0")
    s.execute("qom-set", PROPERTY | {"value": "drive-vda"})
    s.execute("qom-set", PROPERTY | {"value": "cbw1"})
    s.execute("qom-get", PROPERTY)
    s.export("drive-vda", writable=True)
    s.nodes()
    s.do("blockdev-del", node_name="snap0")
    s.execute("qom-set", PROPERTY | {"value": "cbw1"})
    s.execute("qom-set", PROPERTY | {"value": "drive-vda"})


@script()
def the_filter_and_its_parts_are_in_use(s: Session) -> None:
    filtered(s)
    s.do("blockdev-add", driver="snapshot-access", node_name="snap0", file="cbw0")
    for node in ("cbw0", "tmp0", "drive-vda"):
        s.do("blockdev-del", node_name=node)
    s.fleece(target="tmp0")
