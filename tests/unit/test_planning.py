# SPDX-License-Identifier: GPL-2.0-or-later
"""Which point a disk is built on."""

import os

from backupctl.names import DiskName
from backupctl.planning import newest_with
from backupctl.repository.layout import Repository
from backupctl.repository.vm_folder import Point
from tests.unit.repository.conftest import P1, P2, P3, Builder, disk_entry


def test_the_base_is_the_newest_point_that_holds_the_disk_whichever_folder_was_touched_last(tmp_path):
    builder = Builder(Repository.create(tmp_path / "repository"))
    points = []
    for age, (point, disk) in enumerate([(P1, "vda"), (P2, "vda"), (P3, "vdb")]):
        path = tmp_path / point
        path.mkdir()
        os.utime(path, (1e9 - age, 1e9 - age))
        points.append(Point(path, builder.manifest(point, disk_entry(disk))))
    assert newest_with(DiskName("vda"), points) == points[1]
    assert newest_with(DiskName("vdc"), points) is None
