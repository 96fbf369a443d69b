# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks that a point does not hold: named with their newest point, or taken from there."""

import json
import subprocess
import sys

import pytest

from backupctl.cancel import Cancellation
from backupctl.errors import Locked, NoSuchPoint, UsageError
from backupctl.events.restore import DiskFromEarlierPoint, DisksNotRestored
from backupctl.operations.restore import in_place, overlay, selection, whole
from backupctl.operations.restore.request import RestoreRequest
from backupctl.operations.restore.selection import MissingDisk
from backupctl.progress import Silent
from backupctl.system import locks
from tests.unit.operations.test_restore_whole import as_raw
from tests.unit.points import P1, P2, P3, Builder, disk_entry
from tests.unit.recording import Recording


@pytest.fixture
def parted(builder: Builder) -> Builder:
    """A full of two disks, then one run each of vdb and of vda alone."""
    builder.point(P1, (disk_entry("vda"), [(0, b"A")]), (disk_entry("vdb"), [(0, b"B")]))
    builder.point(P2, (disk_entry("vdb", parent=P1), [(0, b"b")]))
    builder.point(P3, (disk_entry("vda", parent=P1), [(0, b"a")]))
    return builder


def run(way, builder, to, *, point="latest", **options):
    told = Recording()
    chosen = builder.directory.point(point).id
    request = RestoreRequest(directory=builder.directory, point=chosen, to=str(to), overwrite=True, **options)
    if way is overlay.restore:
        return way(request, told), told
    return way(request, told, Cancellation()), told


WAYS = pytest.mark.parametrize(
    "way", [whole.restore, overlay.restore, in_place.restore], ids=["whole", "thin", "only changed"]
)


@WAYS
def test_what_a_point_does_not_hold_is_named_with_its_newest_point(parted, tmp_path, way):
    run(whole.restore, parted, tmp_path / "to", point=P1)
    report, told = run(way, parted, tmp_path / "to")
    assert report.missing == (MissingDisk("vdb", P2),)
    assert [one.name for one in report.images] == ["vda"]
    assert told.warnings == [DisksNotRestored(P3, {"vdb": P2})]


@WAYS
def test_all_disks_come_each_from_its_newest_point_and_are_told_with_it(parted, tmp_path, way):
    run(whole.restore, parted, tmp_path / "to", point=P1)
    report, told = run(way, parted, tmp_path / "to", all_disks=True)
    assert {one.name: one.point for one in report.images} == {"vda": P3, "vdb": P2}
    assert report.missing == ()
    assert as_raw(tmp_path / "to/vda.qcow2")[:1] == b"a"
    assert as_raw(tmp_path / "to/vdb.qcow2")[:1] == b"b"
    assert told.warnings == []
    assert DiskFromEarlierPoint("vdb", P3, P2) in told.notes


def test_nothing_comes_from_later_than_the_point(parted, tmp_path):
    report, told = run(whole.restore, parted, tmp_path / "to", point=P2, all_disks=True)
    assert {one.name: one.point for one in report.images} == {"vda": P1, "vdb": P2}
    assert told.warnings == []


def test_a_point_with_all_disks_and_one_disk_that_was_asked_for_are_complete(parted, tmp_path):
    for options in ({"point": P1}, {"disk": "vda"}):
        report, told = run(whole.restore, parted, tmp_path / "to", **options)
        assert (report.missing, told.warnings) == ((), [])
    with pytest.raises(UsageError, match="mutually exclusive"):
        run(whole.restore, parted, tmp_path / "to", disk="vda", all_disks=True)


def test_a_disk_that_the_point_does_not_hold_is_refused_with_the_way_to_it(parted, tmp_path):
    with pytest.raises(NoSuchPoint, match=f"newest point with vdb is {P2}") as caught:
        run(whole.restore, parted, tmp_path / "to", disk="vdb")
    assert f"backupctl restore vm1 {P2} --disk vdb" in caught.value.next_command
    with pytest.raises(NoSuchPoint, match="no disk 'vdz'"):
        run(whole.restore, parted, tmp_path / "to", disk="vdz")
    assert not (tmp_path / "to").exists()


def test_every_point_that_is_read_is_held(parted):
    """Each with what it stands on: P1 is below both."""
    with selection.chosen(parted.directory, P3, None, all_disks=True, reporter=Silent()) as chosen:
        assert [(part.point.id, part.entry.name) for part in chosen.parts] == [(P3, "vda"), (P2, "vdb")]
        for point in (P1, P2, P3):
            with pytest.raises(Locked), locks.directory(parted.directory.path / point, 0):
                raise AssertionError
    with locks.directory(parted.directory.path / P2, 0):
        pass


def test_the_command_says_what_is_missing(parted, tmp_path):
    base = [sys.executable, "-m", "backupctl", "restore", "vm1", "--to", str(tmp_path / "to"), "--json"]
    base += ["--repository", str(parted.repository.path)]
    done = subprocess.run(base, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["missing"] == [{"name": "vdb", "point": P2}]
    assert document["disks"][0]["point"] == P3
    assert "Not restored: vdb" in done.stderr
    done = subprocess.run(
        [*base, "--force", "--all-disks"], capture_output=True, text=True, timeout=60, check=False
    )
    assert [(one["name"], one["point"]) for one in json.loads(done.stdout)["disks"]] == [
        ("vda", P3),
        ("vdb", P2),
    ]
