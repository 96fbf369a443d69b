# SPDX-License-Identifier: GPL-2.0-or-later
"""Which point a disk is built on."""

import os

from backupctl.names import DiskName
from backupctl.operations.backup.plan import missing, newest_with
from backupctl.repository.point import Point
from backupctl.repository.repository import Repository
from tests.unit.points import P1, P2, P3, Builder, disk_entry


def test_the_base_is_the_newest_point_that_holds_the_disk_whichever_directory_was_touched_last(tmp_path):
    builder = Builder(Repository.create(tmp_path / "repository"))
    points = []
    for age, (point, disk) in enumerate([(P1, "vda"), (P2, "vda"), (P3, "vdb")]):
        path = tmp_path / point
        path.mkdir()
        os.utime(path, (1e9 - age, 1e9 - age))
        points.append(Point(path, builder.manifest(point, disk_entry(disk))))
    assert newest_with(DiskName("vda"), points) == points[1]
    assert newest_with(DiskName("vdc"), points) is None


def points_of(tmp_path, *held: str) -> list[Point]:
    builder = Builder(Repository.create(tmp_path / "repository"))
    return [
        Point(tmp_path / point, builder.manifest(point, *map(disk_entry, disks.split())))
        for point, disks in zip((P1, P2, P3), held, strict=False)
    ]


def gone(present: str, points: list[Point]) -> dict[str, str]:
    return {one.name: one.point for one in missing(map(DiskName, present.split()), points)}


def test_a_disk_of_the_last_point_that_the_vm_has_not_is_missed(tmp_path):
    points = points_of(tmp_path, "vda vdb", "vda vdb")
    assert gone("vda", points) == {"vdb": P2}
    assert gone("vda vdb vdc", points) == {}
    assert gone("renamed", points) == {"vda": P2, "vdb": P2}
    assert gone("vda", []) == {}


def test_a_run_of_some_disks_does_not_hide_that_another_is_gone(tmp_path):
    points = points_of(tmp_path, "vda vdb vdc", "vda")
    assert gone("vda vdc", points) == {"vdb": P1}


def test_a_disk_that_a_run_was_without_already_was_taken_out_on_purpose(tmp_path):
    assert gone("vda", points_of(tmp_path, "vda vdb", "vda")) == {}
