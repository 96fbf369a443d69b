# SPDX-License-Identifier: GPL-2.0-or-later
"""What must happen to bitmaps is decided from their names and states alone."""

from dataclasses import replace

from backupctl.names import BitmapName, DiskName, Namespace, NodeName, PointId
from backupctl.vm.bitmap import Bitmap
from backupctl.vm.qmp.bitmaps import applied, broken_chain_bitmaps, handover_actions, plan_bitmap_recovery

OWNER = Namespace("0123abcd")
P0, P1, P2 = PointId("20260101T000000Z"), PointId("20260102T000000Z"), PointId("20260103T000000Z")


def named(point: str) -> BitmapName:
    return OWNER.bitmap(PointId(point), DiskName("vda"))


def bitmap(point: str, **state: bool) -> Bitmap:
    made = Bitmap(named(point), NodeName("d0"), 65536, 0, True, False, True, False)
    return replace(made, **state)


def day(name: str) -> str:
    return OWNER.point_of(name)[:8]


def words(settlement) -> list[str]:
    """`disable 0101`-like words for each action."""
    found = []
    for action in settlement.actions:
        data = action["data"]
        what = action["type"].removeprefix("block-dirty-bitmap-")
        if what == "merge":
            found.append(f"merge {'+'.join(map(day, data['bitmaps']))} into {day(data['target'])}")
        else:
            found.append(f"{what} {day(data['name'])}")
    return found


def committed(*points):
    return lambda point: point in points


def test_begin_of_an_incremental_adds_the_new_bitmap_before_it_disables_the_base():
    actions = handover_actions(NodeName("d0"), named(P1), [named(P0)], persistent=True)
    assert [action["type"] for action in actions] == ["block-dirty-bitmap-add", "block-dirty-bitmap-disable"]
    assert actions[0]["data"] == {
        "node": "d0",
        "name": "backupctl-0123abcd-20260102T000000Z-vda",
        "granularity": 65536,
        "persistent": True,
    }


def test_begin_of_a_full_leaves_the_old_chain_recording():
    assert [a["type"] for a in handover_actions(NodeName("d0"), named(P1), [], persistent=False)] == [
        "block-dirty-bitmap-add"
    ]


def test_one_committed_recording_bitmap_is_at_rest():
    assert words(plan_bitmap_recovery([bitmap(P0)], OWNER, committed(P0))) == []


def test_an_uncommitted_incremental_is_given_back_and_merge_comes_first():
    """Enabling a bitmap that has vanished would crash QEMU; a merge into it is refused."""
    found = plan_bitmap_recovery([bitmap(P0, recording=False), bitmap(P1)], OWNER, committed(P0))
    assert words(found) == ["merge 20260102 into 20260101", "enable 20260101", "remove 20260102"]


def test_a_committed_incremental_retires_its_base():
    found = plan_bitmap_recovery([bitmap(P0, recording=False), bitmap(P1)], OWNER, committed(P0, P1))
    assert words(found) == ["remove 20260101"]


def test_what_an_uncommitted_run_recorded_is_given_to_a_base_that_records_too():
    """A full's, which loses nothing by it; or one that somebody has enabled, which lacks what came before."""
    found = plan_bitmap_recovery([bitmap(P0), bitmap(P1)], OWNER, committed(P0))
    assert words(found) == ["merge 20260102 into 20260101", "remove 20260102"]


def test_a_base_that_records_beside_a_record_with_a_gap_goes():
    for state in ({"inconsistent": True}, {"recording": False}):
        found = plan_bitmap_recovery([bitmap(P0), bitmap(P1, **state)], OWNER, committed(P0))
        assert words(found) == ["remove 20260102", "remove 20260101"]


def test_an_uncommitted_first_full_only_loses_its_own_bitmap():
    assert words(plan_bitmap_recovery([bitmap(P0)], OWNER, committed())) == ["remove 20260101"]


def test_a_base_whose_successor_is_inconsistent_is_never_enabled_again():
    found = plan_bitmap_recovery(
        [bitmap(P0, recording=False), bitmap(P1, inconsistent=True)], OWNER, committed(P0)
    )
    assert words(found) == ["remove 20260102"]


def test_a_base_whose_successor_does_not_record_is_never_enabled_again():
    found = plan_bitmap_recovery(
        [bitmap(P0, recording=False), bitmap(P1, recording=False)], OWNER, committed(P0)
    )
    assert words(found) == ["remove 20260102"]


def test_an_inconsistent_base_is_not_merged_into():
    found = plan_bitmap_recovery(
        [bitmap(P0, recording=False, inconsistent=True), bitmap(P1)], OWNER, committed(P0)
    )
    assert words(found) == ["remove 20260102"]


def test_a_lone_disabled_base_stays_disabled():
    assert words(plan_bitmap_recovery([bitmap(P0, recording=False)], OWNER, committed(P0))) == []


def test_a_point_that_vanished_from_the_repository_gives_its_record_back_to_the_one_before():
    found = plan_bitmap_recovery(
        [bitmap(P0, recording=False), bitmap(P1, recording=False), bitmap(P2)], OWNER, committed(P0)
    )
    assert words(found) == [
        "merge 20260102+20260103 into 20260101",
        "enable 20260101",
        "remove 20260102",
        "remove 20260103",
    ]


def test_foreign_bitmaps_and_those_of_another_repository_are_never_touched():
    foreign = [
        replace(bitmap(P0), name=BitmapName("libvirt-checkpoint")),
        replace(bitmap(P0), name=BitmapName(f"backupctl-ffffffff-{P0}")),
        replace(bitmap(P0), name=BitmapName("backupctl-0123abcd-20260101T000000Z mine")),
    ]
    assert words(plan_bitmap_recovery(foreign, OWNER, committed())) == []


def test_checkpoints_are_kept_disabled_up_to_the_number_asked_for():
    older = [bitmap(P0, recording=False), bitmap(P1, recording=False), bitmap(P2)]
    every = committed(P0, P1, P2)
    assert words(plan_bitmap_recovery(older, OWNER, every, checkpoints=2)) == []
    assert words(plan_bitmap_recovery(older, OWNER, every, checkpoints=1)) == ["remove 20260101"]
    assert words(plan_bitmap_recovery(older, OWNER, every, checkpoints=0)) == [
        "remove 20260101",
        "remove 20260102",
    ]


def test_a_checkpoint_that_a_full_left_recording_is_disabled():
    found = plan_bitmap_recovery([bitmap(P0), bitmap(P1)], OWNER, committed(P0, P1), checkpoints=1)
    assert words(found) == ["disable 20260101"]


def test_the_record_of_a_pruned_point_goes_to_the_checkpoint_before_it_which_stays_disabled():
    older = [bitmap(P0, recording=False), bitmap(P1, recording=False), bitmap(P2)]
    found = plan_bitmap_recovery(older, OWNER, committed(P0, P2), checkpoints=1)
    assert words(found) == ["merge 20260102 into 20260101", "remove 20260102"]


def test_the_bitmap_of_a_pruned_point_goes_when_no_checkpoint_is_kept():
    older = [bitmap(P0, recording=False), bitmap(P1, recording=False), bitmap(P2)]
    assert words(plan_bitmap_recovery(older, OWNER, committed(P0, P2))) == [
        "remove 20260102",
        "remove 20260101",
    ]


def test_checkpoints_before_one_that_can_not_be_read_have_a_gap_and_go():
    older = [bitmap(P0, recording=False), bitmap(P1, recording=False, inconsistent=True), bitmap(P2)]
    assert words(plan_bitmap_recovery(older, OWNER, committed(P0, P1, P2), checkpoints=5)) == [
        "remove 20260101",
        "remove 20260102",
    ]
    assert words(plan_bitmap_recovery(older, OWNER, committed(P0, P2), checkpoints=5)) == [
        "remove 20260102",
        "remove 20260101",
    ]


def test_an_undone_differential_gives_its_record_to_the_newest_checkpoint_only():
    found = plan_bitmap_recovery(
        [bitmap(P0, recording=False), bitmap(P1, recording=False), bitmap(P2)],
        OWNER,
        committed(P0, P1),
        checkpoints=3,
    )
    assert words(found) == ["merge 20260103 into 20260102", "enable 20260102", "remove 20260103"]


def test_the_union_that_a_dead_differential_left_goes():
    differential = replace(bitmap(P0), name=OWNER.differential_bitmap, recording=False)
    found = plan_bitmap_recovery([differential, bitmap(P0)], OWNER, committed(P0))
    assert [action["data"]["name"] for action in found.actions] == [OWNER.differential_bitmap]


def test_when_the_newest_does_not_record_no_older_checkpoint_is_of_use():
    older = [bitmap(P0, recording=False), bitmap(P1, recording=False)]
    assert broken_chain_bitmaps(older, OWNER) == (named(P0), named(P1))
    assert broken_chain_bitmaps([*older, bitmap(P2)], OWNER) == ()
    assert broken_chain_bitmaps([older[0], bitmap(P1, recording=False, busy=True)], OWNER) == (named(P0),)


def test_what_a_recovery_will_do_is_reported_without_its_being_done():
    there = [bitmap(P0, recording=False, busy=True, dirty_bytes=65536), bitmap(P1, dirty_bytes=131072)]
    found = plan_bitmap_recovery(there, OWNER, committed(P0))
    (left,) = applied(there, found.actions, freed=True)
    assert (left.name, left.recording, left.busy, left.dirty_bytes) == (named(P0), True, False, 196608)
    assert found.planned == (f"to clean up: unfinished bitmap {named(P1)} on d0",)
    assert applied(there, (), freed=False) == tuple(there)


def test_the_bitmap_of_another_vms_point_is_neither_merged_nor_removed():
    """A disk that moved between VMs of one repository took it along; it may move back."""
    theirs = committed(P1)
    assert words(plan_bitmap_recovery([bitmap(P1)], OWNER, committed(), theirs=theirs)) == []
    both = [bitmap(P0, recording=False), bitmap(P1), bitmap(P2)]
    assert words(plan_bitmap_recovery(both, OWNER, committed(P0), theirs=theirs)) == [
        "merge 20260103 into 20260101",
        "enable 20260101",
        "remove 20260103",
    ]


def test_the_bitmap_of_another_vm_that_records_hides_no_gap_in_ours():
    both = [bitmap(P0, recording=False), bitmap(P1)]
    assert broken_chain_bitmaps(both, OWNER, committed(P1)) == (named(P0),)
    assert broken_chain_bitmaps([bitmap(P1, recording=False)], OWNER, committed(P1)) == ()
