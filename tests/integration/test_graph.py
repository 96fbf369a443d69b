# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks that are more than a file with a format over it: data files, filters, encryption."""

import os
import subprocess
from collections.abc import Iterable
from typing import Any

import pytest

from fixtures.machine import Machine
from fixtures.shapes import Nodes, over, shaped

MIB = 1 << 20


def quick(names: Iterable[str], most: str) -> list[object]:
    """Return parameters, of which all but one are for `make test-long`."""
    return [pytest.param(name, marks=() if name == most else pytest.mark.slow) for name in names]


def begun(make_lab, build, kind: type[Machine], **options: Any):
    lab = make_lab(build, {"vda": 16 * MIB}, kind_of_machine=kind, **options)
    lab.writer.write(30)
    return lab


DATA_FILE = shaped(lambda node: node, "-f", "qcow2", "-o", "data_file={}.data,data_file_raw=on")


def exchange_data(lab, content: bytes) -> None:
    """Write to the data file while the VM is off. What the qcow2 calls zeroes the guest goes on to see so."""
    (lab.directory / "vda.qcow2.data").write_bytes(content)
    raw = lab.directory / "seen.raw"
    command = [lab.machine.build.tool("qemu-img"), "convert", "-O", "raw", lab.directory / "vda.qcow2", raw]
    subprocess.run(command, check=True, timeout=60)
    lab.writer.model["vda"][:] = raw.read_bytes()


def test_the_bitmap_of_a_disk_with_a_data_file_is_not_trusted_after_a_restart(build, make_lab):
    """A point put back onto the data file, with the VM off, changes the disk and not the bitmap."""
    lab = begun(make_lab, build, DATA_FILE)
    first = lab.backup("full")["point"]
    told = lab.cli.json("doctor", "web")["findings"]
    assert any("vda cannot store a dirty bitmap" in one["said"] for one in told)
    lab.writer.write(20)
    report = lab.backup("incremental")
    assert report["disks"][0]["scanned"] is False, "within one life of QEMU the bitmap serves"
    lab.assert_point(report["point"], lab.writer.moment)
    lab.machine.quit()
    exchange_data(lab, lab.cli.raw(first, "vda", lab.directory))
    lab.machine.start()
    report = lab.backup("incremental")
    assert report["disks"][0]["scanned"] is True
    lab.assert_point(report["point"], {"vda": bytes(lab.writer.model["vda"])})
    lab.next_is_right()


def test_a_stored_bitmap_of_a_disk_with_a_data_file_is_not_trusted(any_build, make_lab):
    """Whoever stored it, and however sound it looks."""
    lab = begun(make_lab, any_build, DATA_FILE)
    point = lab.backup("full")["point"]
    (name,) = lab.machine.bitmaps()["node-vda"]
    for command, more in (("remove", {}), ("add", {"persistent": True, "granularity": 65536})):
        assert lab.machine.qmp(f"block-dirty-bitmap-{command}", node="node-vda", name=name, **more) == {}
    lab.machine.quit()
    exchange_data(lab, os.urandom(16 * MIB))
    lab.machine.start()
    assert lab.machine.bitmaps()["node-vda"] == [name]
    assert "another file than its bitmap" in lab.cli.json("status", "web")["disks"][0]["reason"]
    report = lab.backup("incremental")
    assert (report["parent"], report["disks"][0]["scanned"]) == (point, True)
    lab.assert_point(report["point"], {"vda": bytes(lab.writer.model["vda"])})
    lab.assert_at_rest()


FILTERS = {
    "preallocate": over("preallocate"),
    "copy-on-read": over("copy-on-read"),
    "throttle": over("throttle", **{"throttle-group": "slow"}),
    "copy-before-write": over("copy-before-write", target="old"),
}


@pytest.mark.parametrize("name", quick(FILTERS, "copy-before-write"))
def test_a_filter_of_the_users_own_is_no_job(name, build, make_lab):
    lab = begun(make_lab, build, shaped(FILTERS[name]))
    full = lab.backup("full")
    lab.assert_point(full["point"], lab.writer.moment)
    lab.next_is_right()
    assert lab.cli.json("status", "web")["disks"][0]["next"] == "incremental"


def test_a_job_whose_filter_has_a_name_is_told_from_a_users_filter(newest_build, make_lab):
    lab = begun(make_lab, newest_build, shaped(FILTERS["throttle"]))
    job = {"job-id": "theirs", "device": "node-vda", "target": "old", "sync": "none"}
    assert lab.machine.qmp("blockdev-backup", **job, **{"filter-node-name": "named"}) == {}
    told = lab.backup("full", code=1)["error"]
    assert (
        "another job works on vda: its top node is a copy-before-write of the job theirs" in told["message"]
    )


def test_a_job_whose_filter_has_no_name_is_seen_before_the_guest_is_frozen(build, make_lab):
    lab = make_lab(build, {"vda": 16 * MIB})
    null = {"driver": "null-co", "node-name": "new", "size": 16 * MIB}
    assert lab.machine.qmp("blockdev-add", **null) == {}
    job = {"job-id": "theirs", "device": "node-vda", "target": "new", "sync": "full"}
    assert lab.machine.qmp("blockdev-mirror", **job) == {}
    told = lab.backup("full", code=1)["error"]
    assert (told["message"], told["state"]) == ("another job works on vda: theirs", "nothing was touched")
    assert lab.agent.freezes == []


def encrypted_qcow2(node: Nodes) -> Nodes:
    return {**node, "encrypt": {"format": "luks", "key-secret": "key"}}


def luks(node: Nodes) -> Nodes:
    return {**node, "driver": "luks", "key-secret": "key"}


IN = ("--object", "secret,id=key,data=open", "-o")
ENCRYPTED = {
    "qcow2": (
        encrypted_qcow2,
        "-f",
        "qcow2",
        *IN,
        "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10",
    ),
    "luks": (luks, "-f", "luks", *IN, "key-secret=key,iter-time=10"),
    "below": (
        lambda node: over("throttle", **{"throttle-group": "slow"})(luks(node)),
        "-f",
        "luks",
        *IN,
        "key-secret=key,iter-time=10",
    ),
}


@pytest.mark.parametrize("name", quick(ENCRYPTED, "below"))
def test_that_the_backup_of_an_encrypted_disk_is_not_encrypted_is_told(name, build, make_lab):
    node_of, *create = ENCRYPTED[name]
    lab = begun(make_lab, build, shaped(node_of, *create))
    lab.writer.do("vda", "data", 0, 16 * MIB, 0x11)  # what was never written is no zeroes there
    warned = lab.cli.json("full", "web", "--quiet")["warnings"]
    assert [one["disk"] for one in warned if one["code"] == "disk-encrypted"] == ["vda"]
    told = lab.cli.json("doctor", "web")["findings"]
    assert [one["verdict"] for one in told if "encrypted" in one["said"]] == ["warning"]
    lab.next_is_right()
    quiet = lab.cli.run("incremental", "web", "--quiet").stderr
    assert "encrypted" not in quiet
    assert "encrypted" in lab.cli.run("incremental", "web").stderr
