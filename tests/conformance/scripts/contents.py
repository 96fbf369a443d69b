# SPDX-License-Identifier: GPL-2.0-or-later
"""What NBD clients read: bytes, allocation and dirty bitmaps, while the guest writes."""

from tests.conformance import subjects
from tests.conformance.session import Session, script

CLUSTER = 65536


@script()
def an_empty_disk_is_a_hole(s: Session) -> None:
    s.serve()
    s.export("drive-vda", "e0", name="qcow2")
    s.look("qcow2")
    s.export("drive-vdb", "e1", name="raw")
    s.look("raw")


@script()
def written_zeroed_and_discarded_clusters(s: Session) -> None:
    for disk in ("vda", "vdb"):
        s.subject.write(disk, 5, 0, 8 * CLUSTER)
        s.subject.zero(disk, CLUSTER, CLUSTER)
        s.subject.discard(disk, 3 * CLUSTER, CLUSTER)
        s.subject.write(disk, 0, 5 * CLUSTER, CLUSTER)
    s.serve()
    s.export("drive-vda", "e0", name="qcow2")
    s.look("qcow2")
    s.export("drive-vdb", "e1", name="raw")
    s.look("raw", without=("extents",))


@script()
def zeroes_to_parts_of_clusters(s: Session) -> None:
    """Each cluster goes its own way: one with data keeps its data, any other becomes a cluster of zeroes."""
    s.subject.write("vda", 5, 0, 4 * CLUSTER)
    s.subject.zero("vda", 4 * CLUSTER - 512, 1024)
    s.subject.write("vda", 6, 10 * CLUSTER + 512, 512)
    s.subject.zero("vda", 10 * CLUSTER - 1000, CLUSTER + 2000)
    s.subject.zero("vda", 20 * CLUSTER + 512, 512)
    s.subject.write("vda", 7, subjects.SIZE - CLUSTER, 512)
    s.subject.zero("vda", subjects.SIZE - 512, 512)
    s.serve()
    s.export("drive-vda", name="disk", allocation_depth=True)
    s.look("disk")


@script()
def a_bitmap_as_a_context(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vda", name="b0")
    s.subject.write("vda", 1, 0, 100)
    s.subject.write("vda", 2, 10 * CLUSTER - 1, 2)
    s.subject.zero("vda", 20 * CLUSTER, 2 * CLUSTER)
    s.subject.write("vda", 3, subjects.SIZE - 512, 512)
    s.do("block-dirty-bitmap-disable", node="drive-vda", name="b0")
    s.serve()
    s.export("drive-vda", name="disk", bitmaps=["b0"])
    s.look("disk", "b0", "absent")


@script()
def several_bitmaps_and_granularities(s: Session) -> None:
    names = []
    for granularity in (4096, 32768, 65536, 131072):
        names.append(f"g{granularity}")
        s.do("block-dirty-bitmap-add", node="drive-vdb", name=names[-1], granularity=granularity)
    s.subject.write("vdb", 1, 3 * CLUSTER + 5000, 40000)
    for name in names:
        s.do("block-dirty-bitmap-disable", node="drive-vdb", name=name)
    s.serve()
    s.export("drive-vdb", name="disk", bitmaps=names)
    s.look("disk", *names, without=("flags",))


@script()
def fleecing_keeps_the_moment(s: Session) -> None:
    s.subject.write("vda", 1, 0, 8 * CLUSTER)
    s.scratch()
    s.fleece()
    s.serve()
    s.export("tmp0", name="moment")
    s.look("moment", without=("extents",))
    s.subject.write("vda", 2, CLUSTER, CLUSTER)
    s.subject.write("vda", 3, 4 * CLUSTER + 1000, 70000)
    s.subject.zero("vda", 0, 512)
    s.subject.discard("vda", 7 * CLUSTER, CLUSTER)
    s.subject.write("vda", 4, 30 * CLUSTER, CLUSTER)
    s.look("moment", without=("extents",))
    s.unexport()
    s.end_job()


@script()
def fleecing_maps_what_the_moment_held(s: Session) -> None:
    s.subject.write("vda", 1, 0, 4 * CLUSTER)
    s.scratch()
    s.fleece()
    s.subject.write("vda", 2, CLUSTER, CLUSTER)
    s.subject.write("vda", 2, 10 * CLUSTER, CLUSTER)
    s.serve()
    s.export("tmp0", name="moment")
    s.look("moment")
    s.unexport()
    s.end_job()


@script()
def the_whole_story_of_an_incremental(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vda", name="base", persistent=True)
    s.subject.write("vda", 1, 2 * CLUSTER, 2 * CLUSTER)
    s.subject.zero("vda", 8 * CLUSTER, CLUSTER)
    s.scratch()
    s.transaction(
        ("block-dirty-bitmap-add", {"node": "drive-vda", "name": "next", "persistent": True}),
        ("block-dirty-bitmap-disable", {"node": "drive-vda", "name": "base"}),
        ("blockdev-backup", {"job-id": "job0", "device": "drive-vda", "target": "tmp0", "sync": "none"}),
    )
    s.subject.write("vda", 2, 2 * CLUSTER, CLUSTER)
    s.serve()
    s.export("tmp0", name="moment", bitmaps=["base"])
    s.look("moment", "base")
    s.unexport()
    s.do("nbd-server-stop")
    s.end_job()
    s.do("blockdev-del", node_name="tmp0")
    s.do("block-dirty-bitmap-remove", node="drive-vda", name="base")
    s.bitmaps()
    s.nodes()


@script()
def without_a_job_the_scratch_follows_the_disk(s: Session) -> None:
    s.scratch()
    s.serve()
    s.export("tmp0", name="view")
    s.subject.write("vda", 1, 0, CLUSTER)
    s.look("view")
    s.unexport()


@script()
def after_the_cancel_the_scratch_no_longer_follows(s: Session) -> None:
    s.subject.write("vda", 1, 0, 2 * CLUSTER)
    s.scratch()
    s.fleece()
    s.subject.write("vda", 2, 0, CLUSTER)
    s.end_job()
    s.subject.write("vda", 3, CLUSTER, CLUSTER)
    s.serve()
    s.export("tmp0", name="view")
    s.look("view", without=("extents",))
    s.unexport()


@script()
def a_merged_bitmap_as_a_context(s: Session) -> None:
    for number in range(3):
        s.do("block-dirty-bitmap-add", node="drive-vda", name=f"b{number}")
        s.subject.write("vda", number + 1, number * 4 * CLUSTER, CLUSTER)
        s.do("block-dirty-bitmap-disable", node="drive-vda", name=f"b{number}")
    s.do("block-dirty-bitmap-add", node="drive-vda", name="all", disabled=True)
    s.do("block-dirty-bitmap-merge", node="drive-vda", target="all", bitmaps=["b0", "b2"])
    s.serve()
    s.export("drive-vda", name="disk", bitmaps=["all", "b1"])
    s.look("disk", "all", "b1")
    s.unexport()


@script()
def a_grown_disk_is_served_whole(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vda", name="b0")
    s.do("block_resize", node_name="drive-vda", size=subjects.SIZE + 3 * CLUSTER)
    s.subject.write("vda", 6, subjects.SIZE, CLUSTER)
    s.do("block-dirty-bitmap-disable", node="drive-vda", name="b0")
    s.serve()
    s.export("drive-vda", name="disk", bitmaps=["b0"])
    s.look("disk", "b0")
    s.unexport()


@script()
def a_cluster_that_a_shrunk_disk_cut_is_whole_again_when_it_grows(s: Session) -> None:
    for disk in ("vda", "vdb"):
        s.subject.write(disk, 5, 0, 8 * CLUSTER)
        s.subject.zero(disk, 6 * CLUSTER, CLUSTER)
        s.do("block-dirty-bitmap-add", node=f"drive-{disk}", name="b0")
        for size in (4 * CLUSTER + 512, subjects.SIZE, 6 * CLUSTER + 512, subjects.SIZE):
            s.do("block_resize", node_name=f"drive-{disk}", size=size)
        s.do("block-dirty-bitmap-disable", node=f"drive-{disk}", name="b0")
    s.serve()
    s.export("drive-vda", "e0", name="qcow2", bitmaps=["b0"])
    s.look("qcow2", "b0")
    s.export("drive-vdb", "e1", name="raw", bitmaps=["b0"])
    s.look("raw", "b0", without=("base:allocation",))
