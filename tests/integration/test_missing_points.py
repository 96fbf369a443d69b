# SPDX-License-Identifier: GPL-2.0-or-later
"""Older points are gone, or can't be restored any more: all that is said says so, and no run is hindered."""

import json
import shutil
from pathlib import Path

import pytest

from fixtures import builds
from tests.conftest import MIB


@pytest.fixture
def lab(make_lab):
    """A simulated VM: of QEMU nothing is asked here but its bitmaps."""
    made = make_lab(builds.simulator("7.2"), {"vda": 2 * MIB, "vdb": MIB}, seed=3)
    made.writer.write(10)
    return made


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def taken(lab, kind: str = "incremental", *options: str, code: int = 0) -> dict:
    lab.writer.write(5)
    lab.writer.remember()
    return lab.backup(kind, *options, code=code)


def test_what_is_missing_is_told_by_every_command(lab):
    points = [taken(lab, kind)["point"] for kind in ("full", "full", "incremental")]
    shutil.rmtree(lab.cli.repository / "web" / points[0])
    said = f"the recovery point {points[0]} of web is missing"
    found = lab.cli.json("verify", "web", code=4, vm=False)
    assert [(one["kind"], one["message"].startswith(said)) for one in found["damage"]] == [("history", True)]
    assert said in lab.cli.run("verify", "web", points[0], code=4, vm=False).stderr
    assert any(said in text for text in lab.cli.json("status", "web")["damaged"])
    findings = lab.cli.json("doctor", "web")["findings"]
    assert any(said in one["said"] and one["verdict"] == "warning" for one in findings)
    assert said in lab.cli.run("list", "web", vm=False).stderr
    assert said in lab.cli.run("incremental", "web", "--quiet").stderr
    (lab.cli.repository / "web" / "history").unlink()  # as the page says, if it was on purpose
    assert lab.cli.run("incremental", "web", "--quiet").stderr == ""
    lab.cli.run("verify", "web", vm=False)


def test_a_bitmap_whose_point_was_removed_is_told_as_that(lab):
    first, newest = taken(lab, "full")["point"], taken(lab)["point"]
    shutil.rmtree(lab.cli.repository / "web" / newest)
    status = lab.cli.json("status", "web")
    assert any(f"the point {newest} that it names is gone" in left for left in status["leftovers"])
    assert not any("unfinished" in left for left in status["leftovers"])
    why = f"the point {newest} that its bitmap names is gone from the repository"
    assert all(why in disk["reason"] for disk in status["disks"])
    report = taken(lab)
    assert report["parent"] == first
    assert [(disk["scanned"], why in disk["reason"]) for disk in report["disks"]] == [(True, True)] * 2
    lab.assert_point(report["point"], lab.writer.moment)


def test_an_older_copy_of_the_repository_is_told_by_the_vms_bitmaps(lab, tmp_path):
    taken(lab, "full")
    shutil.copytree(lab.cli.repository, tmp_path / "older")
    newest = taken(lab)["point"]
    shutil.rmtree(lab.cli.repository)
    shutil.copytree(tmp_path / "older", lab.cli.repository)
    _assert_told_as_gone(lab, newest)
    report = taken(lab)
    assert all(
        f"the point {newest} that its bitmap names is gone" in disk["reason"] for disk in report["disks"]
    )
    assert [one["point"] for one in report["warnings"] if one["code"] == "point-gone"] == [newest]
    assert not any("unfinished" in one["message"] for one in report["notes"])
    lab.assert_point(report["point"], lab.writer.moment)


def test_the_loss_of_all_that_there_was_of_a_vm_is_told_by_its_bitmaps(lab):
    newest = [taken(lab, kind)["point"] for kind in ("full", "incremental")][-1]
    shutil.rmtree(lab.cli.repository / "web")
    _assert_told_as_gone(lab, newest)
    done = lab.cli.run("incremental", "web", "--quiet")
    said = f"warning: the recovery point {newest}, from which a bitmap of web records, is not in"
    assert said in done.stderr
    assert lab.cli.run("incremental", "web", "--quiet").stderr == ""


def _assert_told_as_gone(lab, point: str) -> None:
    status = lab.cli.json("status", "web")
    assert status["gone"] == [point]
    assert all(f"the point {point} that it names is gone" in left for left in status["leftovers"])
    said = f"the recovery point {point}, from which a bitmap of web records, is not in"
    assert said in " ".join(lab.cli.run("status", "web").stdout.split())
    assert any(said in one for one in _warnings(lab))
    bitmaps = lab.cli.json("bitmaps", "web")["bitmaps"]
    assert all(one["why"].startswith("its point is gone") for one in bitmaps if one["point"] == point)


def test_a_run_that_meets_damage_commits_and_then_says_what_is_lost(lab):
    points = [taken(lab, kind)["point"] for kind in ("full", "incremental")]
    flip(lab.cli.repository / "web" / points[0] / "vda.digests")
    lab.writer.write(5)
    lab.writer.remember()
    done = lab.cli.run("incremental", "web", "--quiet", "--json", code=4)
    (new,) = {path.name for path in (lab.cli.repository / "web").glob("2*Z")} - set(points)
    assert f"the new point {new} of web is committed and complete" in done.stderr
    warned = [one for one in json.loads(done.stdout)["warnings"] if one["code"] == "point-damaged"]
    assert [(one["point"], one["disk"]) for one in warned] == [(point, "vda") for point in points]
    assert all(f"warning: {one['message']}" in done.stderr for one in warned)
    assert "next:  backupctl verify web" in done.stderr
    lab.assert_point(new, lab.writer.moment)
    lab.assert_at_rest()
    for told in (lab.cli.json("status", "web")["damaged"], _warnings(lab)):
        assert [text.split(" cannot")[0] for text in told if "restored" in text] == [
            f"vda of {point}" for point in points
        ]
    taken(lab)  # what stands on the new one is whole, and it is no news any more


def _warnings(lab) -> list[str]:
    findings = lab.cli.json("doctor", "web")["findings"]
    return [one["said"] for one in findings if one["verdict"] == "warning" and one["subject"] == "repository"]


def test_reason_and_damage_of_each_disk_are_in_the_document(lab):
    points = [taken(lab, kind)["point"] for kind in ("full", "incremental")]
    (lab.cli.repository / "web" / points[0] / "vdb.qcow2").unlink()
    report = taken(lab, code=4)
    vda, vdb = report["disks"]
    assert (vda["kind"], vda["reason"], vda["damaged"]) == ("incremental", "", [])
    assert (vdb["kind"], vdb["damaged"]) == ("full", points)
    assert "is damaged" in vdb["reason"]
    flip(lab.cli.repository / "web" / points[1] / "manifest.json", 100)
    again = taken(lab, "full", code=4)
    on_it = report["point"]  # whose vda is a layer on that of the point that nobody can read now
    assert [disk["damaged"] for disk in again["disks"]] == [[points[1], on_it], points]
