# SPDX-License-Identifier: GPL-2.0-or-later
"""Every bitmap of ours is shown with what it is for, and only what nothing needs can be removed."""

import json

import pytest

from tests.conftest import MIB
from tests.integration.test_topology import snapshot

pytestmark = pytest.mark.simulator_too
GONE = "backupctl-0badc0de-20250101T000000Z-vda"
FOREIGN = "libvirt-checkpoint"


def begun(make_lab, build, *names: str):
    lab = make_lab(build, {"vda": 16 * MIB})
    lab.writer.write(5)
    lab.backup("full", "--keep-checkpoints", "1")
    lab.writer.write(2)
    lab.backup("incremental", "--keep-checkpoints", "1")
    for name in names:
        made = lab.machine.qmp("block-dirty-bitmap-add", node="node-vda", name=name, persistent=True)
        assert made == {}
    return lab


def test_what_another_program_left_is_told_and_goes_by_the_command_that_is_named(any_build, make_lab):
    lab = make_lab(any_build, {"vda": 16 * MIB})
    theirs = "qmpbackup-vda-8a1050f7-cabd-4e29-a825-742e5eecdfea"
    assert lab.machine.qmp("block-dirty-bitmap-add", node="node-vda", name=theirs, persistent=True) == {}
    first = lab.backup("full")
    (note,) = [one for one in first["notes"] if one["code"] == "other-tool-found"]
    assert theirs in json.dumps(note)
    lab.writer.write(2)
    again = lab.backup("incremental")
    assert "other-tool-found" not in [one["code"] for one in again["notes"]]
    assert theirs in lab.machine.bitmaps()["node-vda"]
    (told,) = lab.cli.json("status", "web")["other_tools"]
    assert (told["tool"], told["names"]) == ("qmpbackup", [theirs])
    assert theirs in lab.cli.run("status", "web").stdout
    (finding,) = [one for one in lab.cli.json("doctor", "web")["findings"] if one["subject"] == "other tools"]
    assert told["removal"][0] in finding["advice"]
    command = json.loads(told["removal"][0])
    assert lab.machine.qmp(command["execute"], **command["arguments"]) == {}
    assert lab.cli.json("status", "web")["other_tools"] == []


def uses(lab) -> dict[str, str]:
    """Return what each bitmap is for, by the command and by status, which agree."""
    found = lab.cli.json("bitmaps", "web")["bitmaps"]
    assert found == lab.cli.json("status", "web")["bitmaps"]
    return {one["name"]: one["use"] for one in found}


def test_bitmaps_are_shown_and_removed_by_name_or_repository_but_the_live_one_never(build, make_lab):
    lab = begun(make_lab, build, GONE, FOREIGN)
    by_use = {use: name for name, use in uses(lab).items()}
    assert set(by_use) == {"live", "checkpoint", "orphan"}
    assert by_use["orphan"] == GONE
    (warned,) = [one for one in lab.cli.json("doctor", "web")["findings"] if one["subject"] == "bitmaps"]
    assert warned["verdict"] == "warning"
    assert "--remove-repository 0badc0de" in warned["advice"]
    before = set(lab.machine.bitmaps()["node-vda"])
    for arguments, code in {
        ("--remove", by_use["live"]): 1,
        ("--remove", GONE, "--remove", by_use["live"]): 1,
        ("--remove-repository", by_use["live"].split("-")[1]): 1,
        ("--remove", FOREIGN): 2,
        ("--remove-repository", "libvirt"): 2,
        ("--dry-run", "--remove", GONE): 0,
        ("--dry-run",): 2,
    }.items():
        lab.cli.run("bitmaps", "web", *arguments, code=code)
        assert set(lab.machine.bitmaps()["node-vda"]) == before, arguments
    lab.cli.run("bitmaps", "web", "--remove-repository", "0badc0de")
    lab.cli.run("bitmaps", "web", "--remove", by_use["checkpoint"])
    assert set(lab.machine.bitmaps()["node-vda"]) == {by_use["live"], FOREIGN}
    report = lab.backup("incremental")
    assert not report["disks"][0]["scanned"]
    lab.assert_point(report["point"], lab.writer.moment)


def test_the_base_of_another_repository_is_live_if_the_configuration_names_it(any_build, make_lab, tmp_path):
    lab = begun(make_lab, any_build)
    (live,) = [name for name, use in uses(lab).items() if use == "live"]
    first, lab.cli.repository = lab.cli.repository, tmp_path / "second"
    found = lab.cli.json("bitmaps", "web")["bitmaps"]  # also where there is no repository yet
    assert {one["use"] for one in found} == {"orphan"}
    config = tmp_path / "both.toml"
    config.write_text(f'[vm.web]\nrepository = "{first}"\n')
    config.chmod(0o600)
    lab.cli.environment["BACKUPCTL_CONFIG"] = str(config)
    lab.backup("full")
    assert uses(lab)[live] == "live"
    error = lab.cli.json("bitmaps", "web", "--remove", live, code=1)["error"]
    assert error["kind"] == "Refused"


def test_a_bitmap_of_another_vms_point_is_told_and_left_alone(any_build, make_lab):
    """A disk that moves between VMs of one repository takes it along."""
    lab = begun(make_lab, any_build)
    names = set(lab.machine.bitmaps()["node-vda"])
    lab.writer.write(3)
    told = lab.cli.json("status", "other")
    assert {one["use"] for one in told["bitmaps"]} == {"other-vm"}
    assert told["leftovers"] == []
    assert told["gone"] == []
    done = lab.cli.run("full", "other")
    assert "unfinished" not in done.stderr
    assert "is not in" not in done.stderr  # its point is there, as that of the other VM
    assert lab.cli.run("recover", "other").stdout == "Nothing to recover.\n"
    assert names < set(lab.machine.bitmaps()["node-vda"])
    lab.writer.write(3)
    report = lab.backup("incremental")
    assert not report["disks"][0]["scanned"]
    lab.assert_point(report["point"], lab.writer.moment)


def test_of_two_bitmaps_of_one_name_the_one_that_tells_of_the_gap_goes_last(any_build, make_lab):
    """Without the one on the backing layer, the overlay's empty one would look sound."""
    lab = begun(make_lab, any_build)
    (live,) = [name for name, use in uses(lab).items() if use == "live"]
    lab.writer.write(3)
    snapshot(lab, live)
    assert uses(lab)[live] == "unusable"
    done = lab.cli.run("bitmaps", "web", "--remove", live, code=1)  # QEMU changes nothing on a backing layer
    assert f"{live} on node-vda" in done.stderr
    assert [node for node, names in lab.machine.bitmaps().items() if live in names] == ["node-vda"]
    assert lab.cli.json("status", "web")["disks"][0]["next"] == "scan"
