# SPDX-License-Identifier: GPL-2.0-or-later
"""Deleting points, renaming and removing a VM, with a machine that goes on being backed up."""

import pytest

from tests.conftest import MIB
from tests.integration.test_prune_command import listed, take

pytestmark = pytest.mark.simulator_too


@pytest.fixture
def lab(any_build, make_lab):
    return make_lab(any_build, {"vda": 4 * MIB, "vdb": 2 * MIB + 512})


def kinds(lab) -> list[tuple[str, bool]]:
    return [(one["kind"], one["scanned"]) for one in lab.cli.json("show", "web", "latest", vm=False)["disks"]]


def test_the_newest_point_is_deleted_and_the_next_incremental_is_right(lab):
    held = take(lab, 3)
    points = list(held)
    error = lab.cli.json("delete", "web", points[2], vm=False, code=2)["error"]
    assert "the next incremental would have to read all of vda, vdb" in error["message"]
    assert listed(lab) == points
    said = lab.cli.json("delete", "web", points[2], "--newest", "--dry-run", vm=False)
    assert (said["would_delete"], said["deleted"], listed(lab)) == ([points[2]], [], points)
    done = lab.cli.json("delete", "web", points[2], "--newest", vm=False)
    assert (done["deleted"], [one["disk"] for one in done["newest"]]) == ([points[2]], ["vda", "vdb"])
    assert listed(lab) == points[:2]
    status = lab.cli.json("status", "web")
    why = f"the point {points[2]} that its bitmap names was deleted"
    assert {(disk["next"], disk["reason"]) for disk in status["disks"]} == {("scan", why)}
    assert status["gone"] == []
    assert all(
        left.endswith(f"the point {points[2]} that it names was deleted") for left in status["leftovers"]
    )
    assert len(status["leftovers"]) == 2
    why = [one["why"] for one in lab.cli.json("bitmaps", "web")["bitmaps"] if one["point"] == points[2]]
    assert all(one.startswith("its point was deleted; the next run") for one in why)
    lab.next_is_right()
    assert kinds(lab) == [("incremental", True)] * 2
    for point in points[:2]:
        lab.assert_point(point, held[point])
    lab.assert_at_rest()
    lab.next_is_right()
    assert kinds(lab) == [("incremental", False)] * 2


def test_the_bitmap_of_a_deleted_newest_point_goes_on_as_that_of_the_checkpoint_before(lab):
    lab.writer.write(5)
    lab.backup("full", "--keep-checkpoints", "2")
    for _ in range(2):
        lab.writer.write(5)
        lab.backup("incremental", "--keep-checkpoints", "2")
    points = listed(lab)
    lab.writer.write(5)
    lab.cli.run("delete", "web", points[2], "--newest", vm=False)
    assert {disk["next"] for disk in lab.cli.json("status", "web")["disks"]} == {"incremental"}
    lab.writer.write(5)
    made = lab.backup("incremental", "--keep-checkpoints", "2")
    assert [one["scanned"] for one in made["disks"]] == [False, False]
    lab.assert_point(made["point"], lab.writer.moment)


def test_points_in_between_are_deleted_by_the_beginning_of_their_ids(lab):
    held = take(lab, 4)
    points = list(held)
    assert (
        "is not the id of a recovery point" in lab.cli.run("delete", "web", "latest", vm=False, code=2).stderr
    )
    assert "is ambiguous" in lab.cli.run("delete", "web", points[0][:4], vm=False, code=2).stderr
    lab.cli.run("delete", "web", points[0], points[2][:15], vm=False)
    assert listed(lab) == [points[1], points[3]]
    for point in listed(lab):
        lab.assert_point(point, held[point])
    lab.assert_at_rest()
    lab.next_is_right()


def test_a_renamed_vm_goes_on_incrementally_under_its_new_name(lab):
    held = take(lab, 2)
    said = lab.cli.json("rename", "web", "www", vm=False)
    assert (said["renamed"], said["new_name"]) == (True, "www")
    assert lab.cli.json("rename", "web", "www", vm=False)["renamed"] is False
    assert [one["vm"] for one in lab.cli.json("list", "www", vm=False)] == ["www", "www"]
    lab.writer.write(5)
    made = lab.cli.json("incremental", "www")
    assert {(one["kind"], one["scanned"]) for one in made["disks"]} == {("incremental", False)}
    error = lab.cli.json("show", "web", "latest", vm=False, code=2)["error"]
    assert error["hint"] == "web was renamed to www in this repository"
    warned = lab.cli.json("incremental", "web")
    assert (warned["kind"], warned["warnings"][0]["code"]) == ("full", "vm-renamed")
    lab.cli.run("remove", "web", "--yes", vm=False)
    lab.cli.run("recover", "www")
    lab.cli.run("rename", "www", "web", vm=False)
    lab.assert_point(made["point"], lab.writer.moment)
    for point, moment in held.items():
        lab.assert_point(point, moment)
    lab.assert_at_rest()


def test_a_removed_vm_leaves_bitmaps_that_recover_removes_and_a_full_begins_anew(lab):
    take(lab, 2)
    assert "--yes" in lab.cli.run("remove", "web", vm=False, code=2).stderr
    said = lab.cli.json("remove", "web", "--dry-run", vm=False)
    assert (said["dry_run"], len(said["points"])) == (True, 2)
    done = lab.cli.json("remove", "web", "--yes", vm=False)
    assert done["points"] == said["points"]
    assert "has no backup of the VM web" in lab.cli.run("remove", "web", "--yes", vm=False, code=2).stderr
    lab.cli.run("recover", "web")
    assert lab.cli.json("bitmaps", "web")["bitmaps"] == []
    lab.writer.write(5)
    made = lab.backup("full")
    lab.assert_point(made["point"], lab.writer.moment)
    lab.next_is_right()
