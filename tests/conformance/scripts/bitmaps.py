# SPDX-License-Identifier: GPL-2.0-or-later
"""Dirty bitmaps by single commands: states, errors, merge, granularity."""

from tests.conformance import subjects
from tests.conformance.session import Session, script


@script()
def a_bitmap_records_writes_zeroes_and_discards(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vda", name="b0")
    s.subject.write("vda", 1, 0, 1)
    s.subject.zero("vda", 262144, 65536)
    s.subject.discard("vda", 524288, 65536)
    s.subject.write("vda", 1, 65536 * 20 - 512, 1024)
    s.bitmaps()


@script()
def clear_disable_enable_remove(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vda", name="b0")
    s.subject.write("vda", 1, 0, 65536)
    s.do("block-dirty-bitmap-disable", node="drive-vda", name="b0")
    s.subject.write("vda", 1, 131072, 65536)
    s.bitmaps()
    s.do("block-dirty-bitmap-enable", node="drive-vda", name="b0")
    s.subject.write("vda", 1, 262144, 65536)
    s.bitmaps()
    s.do("block-dirty-bitmap-clear", node="drive-vda", name="b0")
    s.bitmaps()
    s.do("block-dirty-bitmap-remove", node="drive-vda", name="b0")
    s.bitmaps()


@script()
def enable_and_disable_may_be_repeated(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vda", name="b0", disabled=True)
    for command in ("disable", "enable", "enable", "disable"):
        s.do(f"block-dirty-bitmap-{command}", node="drive-vda", name="b0")
        s.bitmaps()


@script()
def bitmap_names_are_unique_on_a_node(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vda", name="b0")
    s.do("block-dirty-bitmap-add", node="drive-vda", name="b0")
    s.do("block-dirty-bitmap-add", node="drive-vdb", name="b0")
    s.bitmaps("drive-vda")
    s.bitmaps("drive-vdb")


@script()
def missing_bitmaps_and_nodes(s: Session) -> None:
    for command in ("remove", "clear", "enable", "disable"):
        s.do(f"block-dirty-bitmap-{command}", node="drive-vda", name="absent")
        s.do(f"block-dirty-bitmap-{command}", node="absent", name="b0")
    s.do("block-dirty-bitmap-add", node="absent", name="b0")
    s.do("block-dirty-bitmap-merge", node="drive-vda", target="absent", bitmaps=["b0"])


@script()
def persistent_bitmaps_need_qcow2(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vda", name="b0", persistent=True)
    s.do("block-dirty-bitmap-add", node="drive-vdb", name="b0", persistent=True)
    s.bitmaps("drive-vda")
    s.bitmaps("drive-vdb")
    s.do("block-dirty-bitmap-remove", node="drive-vda", name="b0")


@script()
def granularity_is_a_power_of_two_from_512_up(s: Session) -> None:
    for number, granularity in enumerate((512, 4096, 65536, 131072, 1 << 30, 0, 256, 3000, -1)):
        s.do("block-dirty-bitmap-add", node="drive-vda", name=f"b{number}", granularity=granularity)
    s.subject.write("vda", 1, 70000, 100)
    s.bitmaps()


@script()
def bitmap_names_have_1023_bytes_at_most(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vda", name="n" * 1023)
    s.do("block-dirty-bitmap-add", node="drive-vda", name="n" * 1024)
    s.do("block-dirty-bitmap-add", node="drive-vda", name="p" * 1023, persistent=True)
    s.do("block-dirty-bitmap-add", node="drive-vda", name="p" * 1024, persistent=True)
    s.do("block-dirty-bitmap-add", node="drive-vda", name="")
    s.do("query-block", lambda drives: sorted(len(d["inserted"].get("dirty-bitmaps", [])) for d in drives))


@script()
def merge_is_a_union(s: Session) -> None:
    for name, at in (("b0", 0), ("b1", 262144)):
        s.do("block-dirty-bitmap-add", node="drive-vda", name=name)
        s.subject.write("vda", 1, at, 65536)
        s.do("block-dirty-bitmap-disable", node="drive-vda", name=name)
    s.do("block-dirty-bitmap-merge", node="drive-vda", target="b1", bitmaps=["b0"])
    s.do(
        "block-dirty-bitmap-merge",
        node="drive-vda",
        target="b1",
        bitmaps=[{"node": "drive-vda", "name": "b0"}],
    )
    s.bitmaps()


@script()
def merge_from_itself_and_elsewhere(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vda", name="b0")
    s.do("block-dirty-bitmap-add", node="drive-vdb", name="b1")
    s.subject.write("vda", 1, 0, 65536)
    s.subject.write("vdb", 1, 131072, 65536)
    # No source at all is left out: it crashes QEMU (test_dangers).
    for sources in (
        ["b0"],
        ["absent"],
        [{"node": "drive-vdb", "name": "b1"}],
        [{"node": "absent", "name": "b1"}],
        ["b0", "absent"],
    ):
        s.do("block-dirty-bitmap-merge", node="drive-vda", target="b0", bitmaps=sources)
        s.bitmaps()


@script()
def merge_of_another_size_fails(s: Session) -> None:
    path = subjects.image(s.directory / "small", "qcow2", subjects.SIZE // 2)
    s.execute(
        "blockdev-add",
        {"driver": "qcow2", "node-name": "small", "file": {"driver": "file", "filename": str(path)}},
    )
    s.do("block-dirty-bitmap-add", node="small", name="b0")
    s.do("block-dirty-bitmap-add", node="drive-vda", name="b0")
    s.do("block-dirty-bitmap-merge", node="drive-vda", target="b0", bitmaps=[{"node": "small", "name": "b0"}])


@script()
def merge_of_another_granularity(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vda", name="fine", granularity=32768)
    s.do("block-dirty-bitmap-add", node="drive-vda", name="coarse", granularity=131072)
    s.subject.write("vda", 1, 32768, 100)
    s.do("block-dirty-bitmap-clear", node="drive-vda", name="coarse")
    s.do("block-dirty-bitmap-merge", node="drive-vda", target="coarse", bitmaps=["fine"])
    s.bitmaps()


@script()
def an_exported_bitmap_is_busy(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vda", name="b0", disabled=True)
    s.do("block-dirty-bitmap-add", node="drive-vda", name="b1")
    s.serve()
    s.export("drive-vda", bitmaps=["b0"])
    s.bitmaps()
    for command in ("remove", "clear", "enable", "disable"):
        s.do(f"block-dirty-bitmap-{command}", node="drive-vda", name="b0")
    s.do("block-dirty-bitmap-merge", node="drive-vda", target="b0", bitmaps=["b1"])
    s.do("block-dirty-bitmap-merge", node="drive-vda", target="b1", bitmaps=["b0"])
    s.unexport()
    s.do("block-dirty-bitmap-remove", node="drive-vda", name="b0")


@script("readonly")
def bitmaps_of_a_read_only_disk(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vdc", name="b0")
    s.do("block-dirty-bitmap-add", node="drive-vdc", name="b1", persistent=True)
    s.bitmaps("drive-vdc")


@script()
def bitmaps_survive_under_a_backing_link(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vda", name="b0")
    s.scratch()
    s.do("block-dirty-bitmap-add", node="tmp0", name="own")
    s.subject.write("vda", 1, 0, 65536)
    s.bitmaps("drive-vda")
    s.bitmaps("tmp0")
