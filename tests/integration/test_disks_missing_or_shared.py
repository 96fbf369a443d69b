# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks that points hold and the VM has not; and two devices that are one disk."""

import json
import subprocess

import pytest

from tests.conftest import MIB


@pytest.mark.simulator_too
def test_a_disk_that_is_gone_from_the_vm_is_told_and_its_last_point_kept(any_build, make_lab, tmp_path):
    lab = make_lab(any_build, {"vda": 4 * MIB, "vdb": 4 * MIB})
    lab.writer.write(3)
    first = lab.backup("full")
    assert first["missing_disks"] == []
    mistyped = tmp_path / "mistyped.toml"
    mistyped.write_text('[vm.web.disks]\nvdb = "vbd"\n')
    mistyped.chmod(0o600)
    lab.cli.environment["BACKUPCTL_CONFIG"] = str(mistyped)
    missing = [{"name": "vdb", "point": first["point"]}]
    assert lab.cli.json("status", "web")["missing_disks"] == missing
    findings = lab.cli.json("doctor", "web")["findings"]
    assert [one["verdict"] for one in findings if one["subject"] == "missing"] == ["warning"]
    done = lab.cli.run("incremental", "web", "--json", "--quiet")
    second = json.loads(done.stdout)
    (warned,) = [one for one in second["warnings"] if one["code"] == "disk-missing"]
    assert (warned["disk"], warned["point"]) == ("vdb", first["point"])
    assert f"warning: {warned['message']}" in done.stderr  # also with --quiet
    assert second["missing_disks"] == missing
    lab.backup("incremental")
    pruned = lab.cli.json("prune", "web", "--keep-last", "1", vm=False)
    (kept,) = [one for one in pruned["points"] if one["point"] == first["point"]]
    assert (kept["keep"], "the newest that holds vdb" in str(kept["reasons"])) == (True, True)
    lab.cli.raw(first["point"], "vdb", tmp_path)


@pytest.mark.simulator_too
def test_a_point_is_listed_by_what_its_disks_are(any_build, make_lab):
    lab = make_lab(any_build, {"vda": 2 * MIB, "vdb": 2 * MIB})
    lab.backup("full")
    lab.backup("incremental")
    for disk in ("vdb", "vda"):
        for node in ("vda", "vdb") if disk == "vda" else ("vdb",):
            for name in lab.machine.bitmaps()[f"node-{node}"]:
                lab.machine.qmp("block-dirty-bitmap-remove", node=f"node-{node}", name=name)
        lab.backup("incremental", "--on-broken-chain", "full")
    points = lab.cli.json("list", "web", vm=False)
    assert [one["disks_kind"] for one in points] == ["full", "incremental", "mixed", "full"]
    assert [one["kind"] for one in points] == ["full", *["incremental"] * 3]
    said = lab.cli.run("list", "web", vm=False).stdout.splitlines()[1:-1]
    assert ["incremental (1 full)" in line for line in said] == [False, False, True, False]
    assert "incremental" not in said[3]


def test_what_another_vm_writes_to_a_shared_disk_is_in_the_next_incremental(build, make_lab, tmp_path):
    """A disk for a cluster of guests: the bitmap of one QEMU tells nothing of what another one wrote."""
    image = tmp_path / "shared.raw"
    image.write_bytes(bytes(4 * MIB))
    node = {"driver": "raw", "node-name": "both", "file": {"driver": "file", "filename": str(image)}}
    device = "virtio-blk-pci,id=one,drive=both,share-rw=on"
    lab = make_lab(build, {"vda": 2 * MIB}, extra=["-blockdev", json.dumps(node), "-device", device])
    lab.backup("full")
    with image.open("r+b") as other:
        other.seek(MIB)
        other.write(b"\7" * 65536)
    lab.machine.io("one", "write -q -P 9 2M 64k")
    report = lab.backup("incremental")
    content = lab.cli.raw(report["point"], "one", tmp_path)
    assert (content[MIB], content[2 * MIB]) == (7, 9)
    assert [disk["scanned"] for disk in report["disks"]] == [False, True]
    assert "other VMs may write to it" in report["disks"][1]["reason"]
    lab.assert_at_rest()


def test_two_devices_on_one_node_are_one_disk(build, make_lab, tmp_path):
    """A shared disk (share-rw: multipath, a cluster of guests) is backed up once, under the first name."""
    image = tmp_path / "shared.qcow2"
    command = [build.tool("qemu-img"), "create", "-q", "-f", "qcow2", image, "4M"]
    subprocess.run(command, check=True, timeout=30)
    node = {"driver": "qcow2", "node-name": "both", "file": {"driver": "file", "filename": str(image)}}
    extra = ["-blockdev", json.dumps(node)]
    for name in ("one", "two"):
        extra += ["-device", f"virtio-blk-pci,id={name},drive=both,share-rw=on"]
    lab = make_lab(build, {"vda": 2 * MIB}, extra=extra)
    findings = [one["said"] for one in lab.cli.json("doctor", "web")["findings"]]
    assert any("two is left out: it is the same disk as one (node both)" in said for said in findings)
    for kind, device in (("full", "one"), ("incremental", "two")):
        lab.machine.io(device, "write -q -P 7 1M 64k")
        report = lab.backup(kind)
        assert [disk["name"] for disk in report["disks"]] == ["vda", "one"]
    lab.machine.io("two", "write -q -P 9 2M 64k")
    report = lab.backup("incremental")
    content = lab.cli.raw(report["point"], "one", tmp_path)
    assert (content[MIB], content[2 * MIB]) == (7, 9)
    assert not report["disks"][1]["scanned"]
    if build.number >= (10, 0):
        error = lab.backup("incremental", "--view", "snapshot-access", "--freeze", "require", code=1)["error"]
        assert "several devices" in error["message"]
    lab.assert_at_rest()
