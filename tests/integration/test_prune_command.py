# SPDX-License-Identifier: GPL-2.0-or-later
"""Keeping and pruning from the command line, with a machine that goes on being backed up."""

import subprocess

import pytest

from backupctl.names import PointId, disk_name, vm_name
from backupctl.options import ChainOptions
from backupctl.repository import chain, summary
from backupctl.repository.checked_chains import CheckedChains
from backupctl.repository.repository import Repository
from backupctl.sizes import MAX_CHAIN
from tests.conftest import MIB

pytestmark = pytest.mark.simulator_too


@pytest.fixture
def lab(any_build, make_lab):
    return make_lab(any_build, {"vda": 4 * MIB, "vdb": 2 * MIB + 512})


def take(lab, count: int) -> dict[str, dict[str, bytes]]:
    """Take points; returns what each of them holds."""
    held = {}
    for _ in range(count):
        lab.writer.write(5)
        point = lab.backup("incremental" if lab.cli.repository.exists() else "full")["point"]
        held[point] = dict(lab.writer.moment)
    return held


def prune(lab, *rules: str, code: int = 0):
    return lab.cli.json("prune", "web", *rules, vm=False, code=code)


def is_sealed(lab, vm: str = "web") -> bool:
    directory = Repository.open(lab.cli.repository).vm(vm_name(vm))
    return summary.look(directory, closely=True).sealed


def test_after_each_command_that_changes_points_the_summary_is_believed(lab):
    for _ in range(3):
        take(lab, 1)
        assert is_sealed(lab)
    lab.cli.json("protect", "web", "latest~1", vm=False)
    assert is_sealed(lab)
    prune(lab, "--keep-last", "1")
    assert is_sealed(lab)
    points = lab.cli.json("list", "web", vm=False)
    assert [point["protected"] for point in points] == [True, False]
    lab.cli.run("recover", "web")
    assert is_sealed(lab)
    lab.cli.run("rename", "web", "shop", vm=False)
    assert is_sealed(lab, "shop")
    lab.cli.run("rename", "shop", "web", vm=False)
    lab.cli.json("delete", "web", points[0]["point"], "--protected", vm=False)
    assert is_sealed(lab)


def test_after_a_command_that_fails_the_summary_is_believed_as_well(lab):
    held = take(lab, 3)
    assert is_sealed(lab)
    lab.backup("incremental", "--disk", "vdx", code=2)
    assert is_sealed(lab)
    lab.cli.vm[1] = "unix:/nonexistent/monitor"
    lab.cli.call("recover", "web", code=1)
    assert is_sealed(lab)
    lab.cli.vm[1] = f"unix:{lab.machine.qmp_path}"
    lab.cli.json("delete", "web", max(held), vm=False, code=2)
    assert is_sealed(lab)
    bitmap = lab.cli.json("bitmaps", "web")["bitmaps"][0]["name"]
    lab.cli.call("bitmaps", "web", "--remove", bitmap, code=1)
    assert is_sealed(lab)
    lab.writer.do("vda", "data", 0, 4 * MIB, 0x33)
    with lab.cli.start("incremental", "web", "--limit", "64K") as run:
        while not run.stderr.readline().endswith("copy\n"):
            assert run.poll() is None
        run.terminate()
        run.communicate(timeout=60)
    assert run.returncode == 1
    assert is_sealed(lab)


def without_sizes(point: dict) -> dict:
    return {key: value for key, value in point.items() if key != "freed_bytes"}


def listed(lab) -> list[str]:
    return [point["point"] for point in lab.cli.json("list", "web", vm=False)]


def test_a_pruned_chain_goes_on_from_its_newest_point(lab):
    held = take(lab, 5)
    points = list(held)
    assert lab.cli.json("protect", "web", points[1], vm=False)["protected"]
    report = prune(lab, "--keep-last", "2")
    assert report["dropped"] == report["removed"] == [points[0], points[2]]
    assert listed(lab) == [points[1], *points[3:]]
    for point in listed(lab):
        lab.assert_point(point, held[point])
    lab.assert_at_rest()
    lab.next_is_right()
    assert {disk["kind"] for disk in lab.cli.json("show", "web", "latest", vm=False)["disks"]} == {
        "incremental"
    }


def test_a_dry_run_tells_the_same_and_touches_nothing(lab):
    points = list(take(lab, 4))
    said = prune(lab, "--keep-last", "1", "--dry-run")
    assert listed(lab) == points
    assert [one["keep"] for one in said["points"]] == [False, False, False, True]
    assert (said["freed_is_estimate"], said["points"][-1]["freed_bytes"]) == (True, None)
    done = prune(lab, "--keep-last", "1")
    assert [without_sizes(one) for one in done["points"]] == [without_sizes(one) for one in said["points"]]
    assert abs(done["freed_bytes"] - said["freed_bytes"]) <= 3 * 65536 * len(done["merged"])
    text = lab.cli.run("prune", "web", "--keep-daily", "3", "--dry-run", vm=False).stdout
    assert "daily 1 of 3" in text
    assert "would be dropped; nothing was changed" in text


def test_no_rule_is_wrong_use(lab):
    points = list(take(lab, 2))
    done = lab.cli.run("prune", "web", vm=False, code=2)
    assert "--keep-last" in done.stderr
    assert listed(lab) == points


def test_protection_is_shown_and_taken_away(lab):
    old, new = take(lab, 2)
    lab.cli.run("protect", "web", old, vm=False)
    shown = lab.cli.json("list", "web", vm=False)
    assert [point["protected"] for point in shown] == [True, False]
    assert "prune never drops it" in lab.cli.run("show", "web", old, vm=False).stdout
    assert prune(lab, "--keep-last", "1")["dropped"] == []
    lab.cli.run("unprotect", "web", old, vm=False)
    assert prune(lab, "--keep-last", "1")["dropped"] == [old]
    assert listed(lab) == [new]


def test_what_is_not_merged_yet_is_told_and_none_of_the_points(lab):
    held = take(lab, 3)
    points = list(held)
    (lab.cli.repository / "web" / points[1] / "retired").touch()  # as a prune that died leaves it
    status = lab.cli.json("status", "web")
    assert any(points[1] in line and "merged" in line for line in status["leftovers"])
    assert "an earlier run left" not in status["next_run"]
    assert listed(lab) == [points[0], points[2]]
    lab.cli.run("restore", "web", points[1], "--to", str(lab.directory / "no"), vm=False, code=2)
    lab.cli.run("verify", "web", vm=False)
    assert prune(lab, "--keep-last", "9")["removed"] == [points[1]]
    lab.assert_point(points[2], held[points[2]])
    lab.next_is_right()


@pytest.mark.parametrize(("layers", "begun_anew"), [(149, False), (150, True)])
def test_by_default_no_chain_gets_longer_than_qemus_tools_follow(monkeypatch, layers, begun_anew):
    monkeypatch.setattr(chain, "below", lambda *_: range(layers))
    most = ChainOptions().max_layers
    assert (
        bool(CheckedChains(None).too_long(most, PointId("20261128T000000Z"), disk_name("vda"))) is begun_anew
    )
    assert most <= MAX_CHAIN


def test_a_chain_that_is_long_enough_is_begun_anew(lab):
    take(lab, 3)
    lab.writer.write(5)
    config = lab.directory / "backupctl.toml"
    config.write_text("[defaults]\nmax_chain = 3\n")
    lab.cli.environment["BACKUPCTL_CONFIG"] = str(config)
    status = lab.cli.json("status", "web")
    assert {(disk["next"], "3 layers" in disk["reason"]) for disk in status["disks"]} == {("full", True)}
    report = lab.backup("incremental")
    assert {disk["kind"] for disk in report["disks"]} == {"full"}
    lab.assert_point(report["point"], lab.writer.moment)
    lab.assert_at_rest()
    report = lab.backup("incremental", "--max-chain", "3")
    assert {disk["kind"] for disk in report["disks"]} == {"incremental"}
    assert len(prune(lab, "--keep-last", "9", "--max-chain", "2")["long_chains"]) == 2


def test_a_chain_whose_files_got_holes_goes_on(lab):
    """As a copy by `cp --sparse=always` has them: each cluster has 4 KiB of data, and holes around them."""
    for cluster in range(0, 60, 3):
        lab.writer.do("vda", "data", cluster * 65536 + 16384, 4096)
    lab.backup("full")
    for path in lab.cli.repository.rglob("*.qcow2"):
        subprocess.run(["fallocate", "--dig-holes", path], check=True, timeout=60)
    lab.writer.do("vda", "data", 7 * 65536, 4096)
    report = lab.backup("incremental")
    assert [disk["kind"] for disk in report["disks"]] == ["incremental"] * 2
    assert lab.cli.json("verify", "web", vm=False)["damage"] == []
    assert prune(lab, "--keep-last", "1")["left"] == []
    lab.assert_point(report["point"], lab.writer.moment)
