# SPDX-License-Identifier: GPL-2.0-or-later
"""What VMs look like and become between two runs: right, or said why not; never a silent gap."""

import json
import os
import shutil
import subprocess
import time

import pytest

from backupctl.repository.repository import Repository
from fixtures.machine import Disk
from tests.conftest import get_build

MIB = 1 << 20

pytestmark = pytest.mark.simulator_too


def kinds(report) -> dict[str, str]:
    return {disk["name"]: "scan" if disk["scanned"] else disk["kind"] for disk in report["disks"]}


def reasons(lab, report) -> dict[str, str]:
    shown = lab.cli.json("show", "web", report["point"], vm=False)
    return {disk["name"]: disk["reason"] for disk in shown["disks"]}


def begun(make_lab, build, **options):
    lab = make_lab(build, **options)
    lab.writer.write(40)
    lab.backup("full")
    lab.writer.write(20)
    return lab


def remove_bitmap(lab, disk: str) -> None:
    name = lab.machine.bitmaps()[f"node-{disk}"][0]
    assert lab.machine.qmp("block-dirty-bitmap-remove", node=f"node-{disk}", name=name) == {}


def snapshot(lab, *bitmaps: str) -> None:
    """Have vda write to an overlay from now on, with bitmaps of its own."""
    path = lab.directory / "overlay.qcow2"
    command = [lab.machine.build.tool("qemu-img"), "create", "-q", "-f", "qcow2", path, "16M"]
    subprocess.run(command, check=True)
    overlay = {"driver": "qcow2", "node-name": "over", "discard": "unmap", "backing": None}
    overlay["file"] = {"driver": "file", "filename": str(path), "discard": "unmap"}
    assert lab.machine.qmp("blockdev-add", **overlay) == {}
    for name in bitmaps:
        assert lab.machine.qmp("block-dirty-bitmap-add", node="over", name=name, persistent=True) == {}
    assert lab.machine.qmp("blockdev-snapshot", node="node-vda", overlay="over") == {}


def test_the_first_incremental_is_a_full(any_build, make_lab):
    lab = make_lab(any_build)
    Repository.create(lab.cli.repository)  # of other VMs, say
    lab.writer.write(10)
    report = lab.backup("incremental")
    assert (report["kind"], report["parent"]) == ("full", None)
    lab.assert_point(report["point"], lab.writer.moment)


def test_a_disk_whose_bitmap_was_removed_is_scanned_and_only_what_differs_is_stored(build, make_lab):
    lab = begun(make_lab, build)
    remove_bitmap(lab, "vda")
    lab.writer.do("vda", "data", 0, 65536, 0x77)
    report = lab.backup("incremental")
    assert report["kind"] == "incremental"
    assert kinds(report) == {"vda": "scan", "vdb": "incremental"}
    assert report["disks"][0]["unchanged_bytes"] > 0
    assert "gone" in reasons(lab, report)["vda"]
    lab.assert_point(report["point"], lab.writer.moment)
    lab.next_is_right()


def test_a_broken_chain_is_begun_anew_with_a_full_if_that_is_wished(any_build, make_lab):
    lab = begun(make_lab, any_build)
    remove_bitmap(lab, "vda")
    report = lab.backup("incremental", "--on-broken-chain", "full")
    assert kinds(report) == {"vda": "full", "vdb": "incremental"}
    lab.assert_point(report["point"], lab.writer.moment)
    lab.next_is_right()


def test_a_damaged_chain_is_not_built_on(any_build, make_lab):
    lab = begun(make_lab, any_build)
    (base,) = (lab.cli.repository / "web").glob("*Z")
    digests = base / "vda.digests"
    content = bytearray(digests.read_bytes())
    content[-1] ^= 1
    digests.write_bytes(content)
    report = lab.backup("incremental", code=4)
    assert kinds(report) == {"vda": "full", "vdb": "incremental"}
    assert "damaged" in reasons(lab, report)["vda"]
    lab.assert_point(report["point"], lab.writer.moment)


def test_a_disabled_bitmap_is_never_used(any_build, make_lab):
    lab = begun(make_lab, any_build)
    name = lab.machine.bitmaps()["node-vda"][0]
    lab.machine.qmp("block-dirty-bitmap-disable", node="node-vda", name=name)
    lab.writer.write(10)
    report = lab.backup("incremental")
    assert kinds(report)["vda"] == "scan"
    assert "is disabled" in reasons(lab, report)["vda"]
    lab.assert_point(report["point"], lab.writer.moment)


def test_on_broken_chain_fail_touches_nothing(any_build, make_lab):
    lab = begun(make_lab, any_build)
    remove_bitmap(lab, "vdb")
    freezes = len(lab.agent.freezes)
    error = lab.backup("incremental", "--on-broken-chain", "fail", code=1)["error"]
    assert "vdb" in error["message"]
    assert len(lab.agent.freezes) == freezes
    assert len(list((lab.cli.repository / "web").iterdir())) == 4, "lock, history, summary and the full"


def test_after_a_crash_of_qemu_the_disks_are_scanned_and_little_more_than_the_change_is_stored(
    build, make_lab
):
    lab = begun(make_lab, build)
    lab.machine.quit()
    lab.machine.start()  # now the bitmaps are loaded from the files
    before = lab.writer.moment  # of the full
    lab.writer.write(10)
    for disk in ("vda", "vdb"):  # what QEMU has not flushed is lost with it, to the guest as to us
        lab.machine.io(disk, "flush")
    lab.machine.kill()
    lab.machine.start()
    report = lab.backup("incremental")
    assert set(kinds(report).values()) == {"scan"}
    assert "inconsistent" in reasons(lab, report)["vda"]
    lab.assert_point(report["point"], lab.writer.moment)
    for disk in report["disks"]:
        old, new = before[disk["name"]], lab.writer.moment[disk["name"]]
        changed = sum(old[at : at + 65536] != new[at : at + 65536] for at in range(0, len(new), 65536))
        assert disk["stored_bytes"] <= changed * 65536 + 5 * 65536, "qcow2's own tables come on top"
    lab.assert_at_rest()
    lab.next_is_right()


def test_a_clean_restart_of_qemu_keeps_the_chain(build, make_lab):
    lab = begun(make_lab, build)
    lab.machine.quit()
    lab.machine.start()
    lab.writer.write(10)
    report = lab.backup("incremental")
    assert set(kinds(report).values()) == {"incremental"}
    lab.assert_point(report["point"], lab.writer.moment)


def test_an_external_snapshot_ends_the_chain_of_its_disk(build, make_lab):
    lab = begun(make_lab, build)
    snapshot(lab)
    lab.writer.write(20)
    report = lab.backup("incremental")
    assert kinds(report) == {"vda": "scan", "vdb": "incremental"}
    assert "external snapshot" in reasons(lab, report)["vda"]
    lab.assert_point(report["point"], lab.writer.moment)
    lab.writer.write(10)
    report = lab.backup("incremental")
    assert kinds(report) == {"vda": "incremental", "vdb": "incremental"}
    lab.assert_point(report["point"], lab.writer.moment)


def test_a_snapshot_that_took_the_bitmaps_name_along_ends_the_chain_too(build, make_lab):
    """So does libvirt: the overlay gets an empty bitmap of each recording one's name, and that records on."""
    lab = begun(make_lab, build, sizes={"vda": 16 * MIB})
    lab.writer.do("vda", "data", 0, 65536, 0x77)
    (name,) = lab.machine.bitmaps()["node-vda"]
    snapshot(lab, name)
    lab.writer.do("vda", "data", MIB, 65536, 0x78)
    report = lab.backup("incremental")
    assert kinds(report) == {"vda": "scan"}
    lab.assert_point(report["point"], lab.writer.moment)
    lab.writer.write(10)
    report = lab.backup("incremental")
    assert kinds(report) == {"vda": "incremental"}
    lab.assert_point(report["point"], lab.writer.moment)


@pytest.mark.needs_qemu("the simulator can't be migrated")
def test_a_vm_that_is_migrated_is_refused_and_so_is_one_that_has_gone(build, make_lab):
    """Our job would make a migration fail; and the disks of who has gone are written by another QEMU."""
    lab = begun(make_lab, build)

    def refused() -> str:
        error = lab.backup("incremental", code=1)["error"]
        assert error["state"] == "nothing was touched"
        return error["message"]

    def migrated(wanted: str) -> None:
        deadline = time.monotonic() + 60
        while lab.machine.qmp("query-migrate").get("status") != wanted:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    pause = [{"capability": "pause-before-switchover", "state": True}]
    assert lab.machine.qmp("migrate-set-capabilities", capabilities=pause) == {}
    assert lab.machine.qmp("migrate", uri="exec:cat >/dev/null") == {}
    migrated("pre-switchover")
    assert "under way" in refused()
    assert lab.machine.qmp("migrate-continue", state="pre-switchover") == {}
    migrated("completed")
    assert (why := refused()).startswith("the VM has gone")
    assert why in lab.cli.json("status", "web")["next_run"]
    assert lab.machine.qmp("cont") == {}
    lab.writer.write(5)
    report = lab.backup("incremental")
    assert set(kinds(report).values()) == {"incremental"}
    lab.assert_point(report["point"], lab.writer.moment)


@pytest.mark.parametrize("sizes", [(24 * MIB,), (10 * MIB,), (6 * MIB, 16 * MIB)], ids=str)
def test_a_resized_disk_keeps_its_chain_and_has_the_right_bytes(build, make_lab, sizes):
    """Shrunk and grown again: the end reads as zeroes, and no bitmap says so."""
    lab = make_lab(build)
    lab.writer.do("vda", "data", 0, 16 * MIB, 0x55)
    lab.backup("full")
    for size in sizes:
        lab.machine.qmp("block_resize", **{"node-name": "node-vda", "size": size})
        model = lab.writer.model["vda"][:size]
        lab.writer.model["vda"] = model + bytes(size - len(model))
    lab.writer.write(20)
    report = lab.backup("incremental")
    assert kinds(report)["vda"] == "incremental"
    assert report["disks"][0]["size"] == sizes[-1]
    lab.assert_point(report["point"], lab.writer.moment)
    lab.next_is_right()


def test_a_disk_added_in_mid_chain_is_full_and_then_incremental(build, make_lab):
    lab = begun(make_lab, build)
    path = lab.directory / "vdc.qcow2"
    subprocess.run([build.tool("qemu-img"), "create", "-q", "-f", "qcow2", path, "4M"], check=True)
    disk = Disk("vdc", path)
    node = json.loads(disk.arguments()[1])
    assert lab.machine.qmp("blockdev-add", **node) == {}
    assert lab.machine.qmp("device_add", driver="virtio-blk-pci", id="vdc", drive=disk.node, bus="rp1") == {}
    lab.writer.model["vdc"] = bytearray(4 * MIB)
    lab.writer.write(30)
    report = lab.backup("incremental")
    assert kinds(report) == {"vda": "incremental", "vdb": "incremental", "vdc": "full"}
    assert "new disk" in reasons(lab, report)["vdc"]
    lab.assert_point(report["point"], lab.writer.moment)
    lab.writer.write(10)
    report = lab.backup("incremental")
    assert set(kinds(report).values()) == {"incremental"}
    lab.assert_point(report["point"], lab.writer.moment)


def test_a_run_for_one_disk_leaves_the_other_ones_chain_alone(any_build, make_lab):
    lab = begun(make_lab, any_build)
    lab.backup("incremental", "--disk", "vda")
    lab.writer.write(10)
    report = lab.backup("incremental")
    assert set(kinds(report).values()) == {"incremental"}
    lab.assert_point(report["point"], lab.writer.moment)
    lab.assert_at_rest()


def test_an_unknown_disk_is_refused_with_those_there_are(any_build, make_lab):
    lab = make_lab(any_build)
    error = lab.backup("full", "--disk", "sda", code=2)["error"]
    assert "vda, vdb" in error["message"]


@pytest.mark.needs_qemu("the simulator has no CD with a medium, and no disk without a format of its own")
def test_read_only_media_and_empty_drives_are_left_out_and_named(any_build, make_lab, tmp_path):
    iso = tmp_path / "disc.iso"
    iso.write_bytes(bytes(MIB))
    lab = make_lab(
        any_build,
        extra=[
            *("-device", "ide-cd,id=empty,bus=ide.0"),
            *("-drive", f"if=none,id=disc,file={iso},format=raw,media=cdrom,readonly=on"),
            *("-device", "ide-cd,id=cd,drive=disc,bus=ide.1"),
            *("-blockdev", f"driver=raw,node-name=ro,read-only=on,file.driver=file,file.filename={iso}"),
            *("-device", "virtio-blk-pci,id=fixed,drive=ro"),
        ],
    )
    lab.writer.write(10)
    done = lab.cli.run("full", "web", "--json")
    report = json.loads(done.stdout)
    assert kinds(report) == {"vda": "full", "vdb": "full"}
    skipped = {one["disk"]: one["reason"] for one in report["notes"] if one["code"] == "disk-skipped"}
    for name, why in (("empty", "empty"), ("cd", "read-only"), ("fixed", "read-only")):
        assert why in skipped[name]
    lab.assert_point(report["point"], lab.writer.moment)


def test_raw_disks_work_and_the_cost_of_a_restart_is_told(build, make_lab):
    lab = make_lab(build, {"vda": 16 * MIB}, formats={"vda": "raw"})
    lab.writer.write(40)
    warned = [
        one for one in lab.cli.json("full", "web")["warnings"] if one["code"] == "bitmap-not-persistent"
    ]
    assert [one["disk"] for one in warned] == ["vda"]
    lab.writer.write(20)
    report = lab.backup("incremental")
    assert kinds(report) == {"vda": "incremental"}
    lab.assert_point(report["point"], lab.writer.moment)
    lab.machine.quit()
    lab.machine.start()
    report = lab.backup("incremental")
    assert kinds(report) == {"vda": "scan"}
    lab.assert_point(report["point"], lab.writer.moment)


def test_foreign_bitmaps_are_not_touched(any_build, make_lab):
    lab = make_lab(any_build, {"vda": 16 * MIB})
    lab.machine.qmp("block-dirty-bitmap-add", node="node-vda", name="libvirt-1", persistent=True)
    lab.writer.write(20)
    lab.backup("full")
    lab.backup("incremental")
    assert "libvirt-1" in lab.machine.bitmaps()["node-vda"]
    lab.assert_at_rest()


def test_a_disk_on_which_somebody_elses_job_works_is_refused_and_the_job_left_alone(build, make_lab):
    lab = begun(make_lab, build, sizes={"vda": 8 * MIB})
    target = lab.directory / "theirs.raw"
    target.write_bytes(bytes(8 * MIB))
    node = {"driver": "raw", "node-name": "theirs", "file": {"driver": "file", "filename": str(target)}}
    job = {"job-id": "theirs", "device": "node-vda", "target": "theirs", "sync": "none"}
    assert lab.machine.qmp("blockdev-add", **node) == {}
    assert lab.machine.qmp("blockdev-backup", **job) == {}
    told = lab.cli.json("incremental", "web", code=1)["error"]
    assert (told["kind"], told["state"]) == ("Refused", "nothing was touched")
    assert "another job works on vda" in told["message"]
    assert told["message"] in lab.cli.json("status", "web")["next_run"]
    assert [each["id"] for each in lab.machine.qmp("query-jobs")] == ["theirs"]
    assert lab.machine.qmp("job-cancel", id="theirs") == {}
    deadline = time.monotonic() + 60
    while lab.machine.qmp("query-jobs"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lab.next_is_right()


def test_two_repositories_back_up_one_vm_each_with_its_own_chain(any_build, make_lab, tmp_path):
    lab = begun(make_lab, any_build)
    first, lab.cli.repository = lab.cli.repository, tmp_path / "second"
    lab.backup("full")
    lab.writer.write(10)
    second = lab.backup("incremental")
    lab.assert_point(second["point"], lab.writer.moment)
    lab.cli.repository = first
    report = lab.backup("incremental")
    assert set(kinds(report).values()) == {"incremental"}
    lab.assert_point(report["point"], lab.writer.moment)
    lab.assert_at_rest(bitmaps_each=2)


@pytest.mark.needs_qemu("the simulator is no program of another user's")
@pytest.mark.skipif(os.geteuid() != 0, reason="starts QEMU as another user, which takes root")
def test_a_qemu_of_another_user_needs_no_rights_on_our_directories(build, make_lab):
    if not shutil.which("setpriv"):
        pytest.skip("no setpriv")
    if not all(directory.stat().st_mode & 0o001 for directory in build.binaries.parents):
        build = get_build("installed")  # the cache is in a home that is closed to others
    lab = make_lab(build, {"vda": 16 * MIB}, user="nobody", open_to_user=True)
    lab.cli.repository.mkdir(mode=0o700)
    lab.cli.scratch.chmod(0o700)
    lab.writer.write(30)
    lab.assert_points_under_writes("full", "incremental")


def test_disks_can_be_stored_under_names_of_the_configuration(any_build, make_lab, tmp_path):
    lab = make_lab(any_build, {"vda": 8 * MIB})
    lab.writer.write(10)
    path = tmp_path / "backupctl.toml"
    path.write_text(
        f'[vm.web]\nqmp = "unix:{lab.machine.qmp_path}"\nagent = "unix:{lab.machine.agent_path}"\n'
        f'repository = "{lab.cli.repository}"\nscratch = "{lab.cli.scratch}"\n'
        '[vm.web.disks]\nvda = "system"\n'
    )
    command = lab.cli.command("full", "web", "--json", vm=False)[:-2]
    environment = {**lab.cli.environment, "BACKUPCTL_CONFIG": str(path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    point = json.loads(done.stdout)["point"]
    assert (lab.cli.repository / "web" / point / "system.qcow2").is_file()
