# SPDX-License-Identifier: GPL-2.0-or-later
"""Nodes: blockdev-add and -del, names, resizing, external snapshots."""

import os

from tests.conformance import subjects
from tests.conformance.session import Session, script


@script()
def a_node_comes_and_goes(s: Session) -> None:
    s.scratch()
    s.nodes()
    s.do("blockdev-del", node_name="tmp0")
    s.nodes()
    s.do("blockdev-del", node_name="tmp0")


@script()
def node_names_are_unique(s: Session) -> None:
    s.scratch()
    s.scratch(file="other.img")
    s.scratch("drive-vda", file="third.img")


@script()
def node_names_have_31_characters_at_most(s: Session) -> None:
    s.scratch("n" * 31, file="a.img")
    s.scratch("n" * 32, file="b.img")
    s.scratch("", file="c.img")
    s.scratch("9digit", file="d.img")
    s.scratch("with/slash", file="e.img")
    s.scratch("#hash", file="f.img")
    s.nodes()


@script()
def a_file_that_is_none(s: Session) -> None:
    for path in (s.directory / "absent", s.directory, "/dev/null", "", "a\0b"):
        node = _node("qcow2", path)
        s.execute("blockdev-add", node)
        s.execute("blockdev-add", node | {"read-only": True})
    os.mkfifo(
        s.directory / "pipe"
    )  # for reading only, QEMU would wait for a writer, and serve nobody meanwhile
    s.execute("blockdev-add", _node("qcow2", s.directory / "pipe"))
    s.nodes()


@script()
def a_raw_file_is_no_qcow2(s: Session) -> None:
    s.execute("blockdev-add", _node("qcow2", subjects.image(s.directory / "f", "raw")))


@script()
def unknown_drivers_and_parents(s: Session) -> None:
    s.execute("blockdev-add", {"driver": "no-such-driver", "node-name": "n"})
    s.execute("blockdev-add", {"driver": "raw", "node-name": "n", "file": "absent"})
    s.execute("blockdev-add", {"driver": "raw", "node-name": "n"})
    s.execute("blockdev-add", {"driver": "raw", "file": "drive-vdb"})
    s.scratch(backing="absent")


@script()
def a_raw_node_of_a_file(s: Session) -> None:
    path = subjects.image(s.directory / "f", "raw")
    s.execute("blockdev-add", {"driver": "file", "node-name": "file0", "filename": str(path)})
    s.execute("blockdev-add", {"driver": "raw", "node-name": "raw0", "file": "file0"})
    s.do("blockdev-del", node_name="file0")
    s.nodes()
    s.do("blockdev-del", node_name="raw0")
    s.do("blockdev-del", node_name="file0")
    s.nodes()


@script()
def an_image_of_a_running_disk_is_locked(s: Session) -> None:
    s.execute("blockdev-add", _node("qcow2", s.directory / "vda.qcow2"))


@script()
def a_disk_in_use_cannot_be_deleted(s: Session) -> None:
    s.do("blockdev-del", node_name="drive-vda")
    s.do("blockdev-del", node_name="drive-vdb")


@script()
def a_backing_node_cannot_be_deleted(s: Session) -> None:
    s.scratch("base", None)
    s.scratch("top", "base")
    s.do("blockdev-del", node_name="base")
    s.do("blockdev-del", node_name="top")
    s.do("blockdev-del", node_name="base")


@script()
def a_disk_grows(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vda", name="b0")
    s.do("block_resize", node_name="drive-vda", size=2 * subjects.SIZE)
    s.bitmaps()
    s.subject.write("vda", 3, 2 * subjects.SIZE - 65536, 65536)
    s.bitmaps()
    s.do("query-block", lambda drives: sorted(d["inserted"]["image"]["virtual-size"] for d in drives))


@script()
def a_disk_shrinks(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vdb", name="b0")
    s.subject.write("vdb", 3, subjects.SIZE - 65536, 65536)
    s.do("block_resize", node_name="drive-vdb", size=subjects.SIZE // 2)
    s.bitmaps("drive-vdb")


@script("readonly")
def resize_errors(s: Session) -> None:
    s.do("block_resize", node_name="drive-vdc", size=2 * subjects.SIZE)
    s.do("block_resize", device="drive-vda", size=2 * subjects.SIZE)
    s.do("block_resize", node_name="drive-vda", size=subjects.SIZE + 1)
    s.serve()
    s.export("drive-vda", name="disk")
    s.do("block_resize", node_name="drive-vda", size=2 * subjects.SIZE)
    s.unexport()
    s.do("block_resize", node_name="absent", size=1 << 20)
    s.do("block_resize", size=1 << 20)
    s.do("block_resize", node_name="drive-vda", size=-1)
    s.scratch()
    s.fleece()
    s.do("block_resize", node_name="drive-vda", size=2 * subjects.SIZE)
    s.end_job()


@script()
def an_external_snapshot_leaves_the_bitmap_behind(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vda", name="b0")
    s.subject.write("vda", 1, 0, 65536)
    s.scratch("overlay", None)
    s.do("blockdev-snapshot", node="drive-vda", overlay="overlay")
    s.subject.write("vda", 2, 65536 * 4, 65536)
    s.bitmaps("drive-vda")
    s.bitmaps("overlay")
    s.do("query-block", lambda drives: sorted(d["inserted"]["node-name"] for d in drives))


@script()
def what_a_snapshot_left_behind_is_read_only(s: Session) -> None:
    for name, persistent in (("stays", True), ("passes", False)):
        s.do("block-dirty-bitmap-add", node="drive-vda", name=name, persistent=persistent)
    s.scratch("overlay", None)
    s.do("blockdev-snapshot", node="drive-vda", overlay="overlay")
    s.bitmaps("drive-vda")
    s.do("block-dirty-bitmap-add", node="drive-vda", name="new", persistent=True)
    s.do("block-dirty-bitmap-add", node="drive-vda", name="new")
    for what in ("disable", "enable", "clear", "remove"):
        for name in ("stays", "passes"):
            s.do(f"block-dirty-bitmap-{what}", node="drive-vda", name=name)
    s.do("block-dirty-bitmap-merge", node="drive-vda", target="stays", bitmaps=["new"])
    s.bitmaps("drive-vda")
    s.nodes()


@script()
def snapshot_errors(s: Session) -> None:
    s.scratch("withbacking", "drive-vdb")
    s.do("blockdev-snapshot", node="drive-vda", overlay="absent")
    s.do("blockdev-snapshot", node="absent", overlay="withbacking")
    s.do("blockdev-snapshot", node="drive-vda", overlay="withbacking")
    s.do("blockdev-snapshot", node="drive-vda", overlay="drive-vdb")


@script()
def no_snapshot_makes_a_cycle(s: Session) -> None:
    s.scratch("a", None)
    s.scratch("b", None, file="b.img")
    s.do("blockdev-snapshot", node="a", overlay="a")
    s.do("blockdev-snapshot", node="a", overlay="b")
    s.do("blockdev-snapshot", node="b", overlay="a")
    s.do("blockdev-snapshot", node="a", overlay="b")
    s.nodes()
    s.do("blockdev-del", node_name="a")
    s.do("blockdev-del", node_name="b")
    s.do("blockdev-del", node_name="a")


@script()
def no_snapshot_of_a_busy_node(s: Session) -> None:
    s.scratch()
    s.fleece()
    s.scratch("overlay", None, file="overlay.img")
    s.do("blockdev-snapshot", node="drive-vda", overlay="overlay")
    s.do("blockdev-snapshot", node="drive-vda", overlay="absent")
    s.end_job()


@script()
def a_write_threshold_tells_once(s: Session) -> None:
    s.do("block-set-write-threshold", node_name="drive-vdb", write_threshold=131072)
    s.subject.write("vdb", 1, 0, 65536)
    s.subject.write("vdb", 1, 65536, 131072)
    s.await_event("BLOCK_WRITE_THRESHOLD")
    s.subject.write("vdb", 1, 262144, 131072)
    s.do("block-set-write-threshold", node_name="absent", write_threshold=1)
    s.do("block-set-write-threshold", node_name="drive-vdb", write_threshold=0)


def _node(driver: str, path: object) -> dict[str, object]:
    return {"driver": driver, "node-name": "n0", "file": {"driver": "file", "filename": str(path)}}
