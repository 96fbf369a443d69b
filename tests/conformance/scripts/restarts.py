# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU ends, cleanly or by SIGKILL, and starts again: what becomes of bitmaps."""

from tests.conformance.session import Session, script

CLUSTER = 65536


def _add(s: Session, *names: str, **more: object) -> None:
    for name in names:
        s.do("block-dirty-bitmap-add", node="drive-vda", name=name, **more)


def _two_loaded(s: Session) -> None:
    """Leave `kept` (records, two clusters dirty) and `still` (disabled, one) loaded from the file."""
    _add(s, "kept", "still", persistent=True)
    s.subject.write("vda", 1, 0, 512)
    s.do("block-dirty-bitmap-disable", node="drive-vda", name="still")
    s.subject.write("vda", 1, 5 * CLUSTER, 512)
    s.restart()


@script()
def a_clean_end_keeps_what_is_persistent(s: Session) -> None:
    _add(s, "transient")
    _add(s, "fine", persistent=True, granularity=4096)
    _two_loaded(s)
    s.bitmaps()
    s.subject.write("vda", 2, 9 * CLUSTER, 512)
    s.bitmaps()
    s.restart()
    s.bitmaps()
    s.do("block-dirty-bitmap-disable", node="drive-vda", name="kept")
    s.serve()
    s.export("drive-vda", name="disk", bitmaps=["kept", "still"])
    # Of an image that it opens QEMU guesses whether its clusters were preallocated, and may tell of holes
    # inside of them then.
    s.look("disk", "kept", "still", without=("base:allocation",))


@script()
def a_crash_forgets_what_was_never_stored(s: Session) -> None:
    _add(s, "young", persistent=True)
    _add(s, "transient")
    s.restart(kill=True)
    s.bitmaps()
    _add(s, "young", persistent=True)
    s.bitmaps()


@script()
def a_crash_makes_what_was_loaded_inconsistent(s: Session) -> None:
    _two_loaded(s)
    _add(s, "young", persistent=True)
    s.restart(kill=True)
    s.bitmaps()
    s.do(
        "query-block", lambda drives: [d["inserted"].get("dirty-bitmaps") for d in drives if "inserted" in d]
    )


@script()
def an_inconsistent_bitmap_can_only_be_removed(s: Session) -> None:
    _two_loaded(s)
    s.restart(kill=True)
    _add(s, "good")
    s.do("block_resize", node_name="drive-vda", size=8 << 20)
    for command in ("enable", "disable", "clear"):
        s.do(f"block-dirty-bitmap-{command}", node="drive-vda", name="kept")
    s.do("block-dirty-bitmap-merge", node="drive-vda", target="good", bitmaps=["kept"])
    s.do("block-dirty-bitmap-merge", node="drive-vda", target="kept", bitmaps=["good"])
    s.transaction(
        ("block-dirty-bitmap-clear", {"node": "drive-vda", "name": "good"}),
        ("block-dirty-bitmap-disable", {"node": "drive-vda", "name": "kept"}),
    )
    _add(s, "kept", persistent=True)
    s.serve()
    s.export("drive-vda", bitmaps=["kept"])
    s.subject.write("vda", 1, 0, 512)
    s.bitmaps()
    s.do("block-dirty-bitmap-remove", node="drive-vda", name="kept")
    s.transaction(("block-dirty-bitmap-remove", {"node": "drive-vda", "name": "still"}))
    s.bitmaps()
    s.restart()
    s.bitmaps()


@script()
def what_is_inconsistent_stays_so_over_a_clean_end(s: Session) -> None:
    _two_loaded(s)
    s.restart(kill=True)
    s.restart()
    s.bitmaps()
    s.restart(kill=True)
    s.bitmaps()


@script()
def a_removed_bitmap_does_not_come_back_after_a_crash(s: Session) -> None:
    _two_loaded(s)
    s.do("block-dirty-bitmap-remove", node="drive-vda", name="kept")
    s.restart(kill=True)
    s.bitmaps()


@script()
def what_is_renewed_under_its_name_is_gone_after_a_crash(s: Session) -> None:
    _two_loaded(s)
    s.do("block-dirty-bitmap-remove", node="drive-vda", name="kept")
    _add(s, "kept", persistent=True)
    s.restart(kill=True)
    s.bitmaps()


@script()
def an_external_snapshot_stores_the_bitmaps_below_it(s: Session) -> None:
    """Its old layer is closed for writing: a crash finds them whole, and nobody changes them until then."""
    _two_loaded(s)
    _add(s, "young", persistent=True)
    _add(s, "transient")
    s.scratch("overlay", None)
    s.do("blockdev-snapshot", node="drive-vda", overlay="overlay")
    s.nodes()
    for command in ("disable", "clear", "remove"):
        for name in ("kept", "transient"):
            s.do(f"block-dirty-bitmap-{command}", node="drive-vda", name=name)
    s.do("block-dirty-bitmap-merge", node="drive-vda", target="kept", bitmaps=["still"])
    s.do("block-dirty-bitmap-add", node="overlay", name="above")
    sources = [{"node": "drive-vda", "name": "kept"}]
    s.do("block-dirty-bitmap-merge", node="overlay", target="above", bitmaps=sources)
    s.bitmaps("overlay")
    s.bitmaps()
    s.serve()
    s.export("overlay", bitmaps=["still"])
    s.look("overlay", "still", without=("base:allocation",))
    s.restart(kill=True)
    s.bitmaps()


def _in_mid_backup(s: Session) -> None:
    s.scratch()
    s.transaction(
        ("block-dirty-bitmap-add", {"node": "drive-vda", "name": "next", "persistent": True}),
        ("block-dirty-bitmap-disable", {"node": "drive-vda", "name": "kept"}),
        ("blockdev-backup", {"job-id": "job0", "device": "drive-vda", "target": "tmp0", "sync": "none"}),
    )
    s.subject.write("vda", 2, 20 * CLUSTER, 512)


@script()
def a_clean_end_in_mid_backup_keeps_both_bitmaps(s: Session) -> None:
    """The next run can give the new one back to the old one."""
    _two_loaded(s)
    _in_mid_backup(s)
    s.restart()
    s.bitmaps()
    s.nodes()
    s.do("query-jobs")
    s.transaction(
        ("block-dirty-bitmap-enable", {"node": "drive-vda", "name": "kept"}),
        ("block-dirty-bitmap-merge", {"node": "drive-vda", "target": "kept", "bitmaps": ["next"]}),
        ("block-dirty-bitmap-remove", {"node": "drive-vda", "name": "next"}),
    )
    s.bitmaps()


@script()
def a_crash_in_mid_backup_leaves_the_base_inconsistent_and_the_new_one_gone(s: Session) -> None:
    _two_loaded(s)
    _in_mid_backup(s)
    s.restart(kill=True)
    s.bitmaps()
    s.nodes()
    s.do("query-jobs")
    s.do("query-block-exports")


@script()
def a_clean_end_under_an_export_stores_its_bitmap(s: Session) -> None:
    _two_loaded(s)
    s.do("block-dirty-bitmap-disable", node="drive-vda", name="kept")
    s.serve()
    s.export("drive-vda", name="disk", bitmaps=["kept"])
    s.restart()
    s.bitmaps()
    s.do("query-block-exports")


@script()
def a_raw_disk_forgets_its_bitmaps_at_every_end(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vdb", name="b0")
    s.restart()
    s.bitmaps("drive-vdb")


@script()
def a_resized_disk_s_bitmap_is_stored_with_the_new_size(s: Session) -> None:
    _two_loaded(s)
    s.do("block_resize", node_name="drive-vda", size=6 << 20)
    s.subject.write("vda", 3, (6 << 20) - 512, 512)
    s.bitmaps()
    s.restart()
    s.bitmaps()
