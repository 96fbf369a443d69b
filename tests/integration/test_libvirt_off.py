# SPDX-License-Identifier: GPL-2.0-or-later
"""Domains of libvirt that are shut off: the same chains, by the images that their definition names."""

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fixtures.debian import CannotBeHad
from fixtures.libvirtd import Libvirtd
from tests import interrupted_cli
from tests.conftest import MIB
from tests.libvirt_lab import Lab, Make, begun, kinds, maker, wait_for

libvirt = pytest.importorskip("libvirt", reason="python3-libvirt is not installed")

ONE = {"vda": 4 * MIB}
TWO = {"vda": 4 * MIB, "vdb": 2 * MIB}


@pytest.fixture
def make_lab(daemon: Libvirtd, tmp_path: Path, held: ExitStack, request: pytest.FixtureRequest) -> Make:
    return maker(daemon, tmp_path, held, request.node.nodeid)


def shut_down(lab: Lab) -> None:
    """End the guest and its QEMU, as a shutdown does."""
    lab.writer.remember()
    lab.domain.quit()
    wait_for(lambda: not lab.domain.handle().isActive())


def crash(lab: Lab) -> None:
    """End QEMU so that it stores no bitmap."""
    os.kill(lab.domain.daemon.qemu(lab.domain.name), signal.SIGKILL)
    wait_for(lambda: not lab.domain.handle().isActive())


def offline(lab: Lab, kind: str = "incremental", *options: str) -> Any:
    """Take a point while the domain is off: it holds what the images hold, and they are sound."""
    report = lab.backup(kind, *options)
    assert report["consistency"] == "offline"
    lab.assert_point(report["point"], lab.writer.moment)
    assert_agreed(lab)
    return report


def online(lab: Lab) -> Any:
    """Take an incremental while the domain runs, after some writes."""
    lab.writer.write(4)
    lab.writer.remember()
    report = lab.backup("incremental")
    assert report["consistency"] != "offline"
    lab.assert_point(report["point"], lab.writer.moment)
    return report


def assert_agreed(lab: Lab, checkpoints: int = 1) -> None:
    """What libvirt notes and what the images store is the same, and nothing else of ours is there."""
    noted = [one for one in lab.domain.checkpoints() if one.startswith("backupctl-")]
    assert len(noted) == checkpoints
    for disk in lab.domain.disks:
        assert [name for name, _ in bitmaps(disk["path"])] == noted, disk["target"]
        subprocess.run(["qemu-img", "check", "-q", disk["path"]], check=True, timeout=30)
    assert list(lab.cli.scratch.iterdir()) == []


def bitmaps(image: Path) -> list[tuple[str, list[str]]]:
    """Return the bitmaps that an image stores, with their flags."""
    command = ["qemu-img", "info", "-U", "--output=json", image]
    told = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=30).stdout)
    stored = told["format-specific"]["data"].get("bitmaps", [])
    return sorted((one["name"], one["flags"]) for one in stored if not one["name"].startswith("their"))


def test_a_chain_goes_on_when_the_domain_is_shut_off_and_started_again(make_lab: Make) -> None:
    lab = begun(make_lab, sizes=TWO)
    shut_down(lab)
    first = offline(lab)
    assert sum(disk["stored_bytes"] for disk in first["disks"]) > 0
    second = offline(lab)
    assert sum(disk["dirty_bytes"] for disk in second["disks"]) == 0
    lab.domain.start()
    third = online(lab)
    assert third["parent"] == second["point"]
    shut_down(lab)
    fourth = offline(lab)
    lab.domain.start()
    lab.next_is_right()
    for report in (first, second, third, fourth):
        assert set(kinds(report).values()) == {"incremental"}


def test_a_full_begins_a_chain_while_the_domain_is_off(make_lab: Make) -> None:
    lab = make_lab(ONE)
    lab.writer.write(10)
    shut_down(lab)
    report = offline(lab, "full")
    assert "domain.xml" in json.dumps(lab.cli.json("show", "web", report["point"], vm=False))
    lab.domain.start()
    assert kinds(online(lab)) == {"vda": "incremental"}


def test_a_raw_disk_is_scanned_beside_a_qcow2(make_lab: Make) -> None:
    lab = begun(make_lab, sizes=TWO, formats={"vdb": "raw"})
    shut_down(lab)
    report = lab.backup("incremental")
    assert kinds(report) == {"vda": "incremental", "vdb": "scan"}
    lab.assert_point(report["point"], lab.writer.moment)
    lab.domain.start()
    assert kinds(online(lab)) == {"vda": "incremental", "vdb": "scan"}


def test_a_chain_goes_on_over_a_snapshot_of_a_domain_that_is_then_shut_off(make_lab: Make) -> None:
    lab = begun(make_lab, sizes=ONE)
    overlay = lab.directory / "overlay.qcow2"
    words = ("--disk-only", "--no-metadata", "--diskspec", f"vda,file={overlay}")
    lab.domain.daemon.virsh("snapshot-create-as", lab.domain.name, "s", *words)
    lab.writer.write(5)
    shut_down(lab)
    report = lab.backup("incremental")
    assert kinds(report) == {"vda": "incremental"}
    lab.assert_point(report["point"], lab.writer.moment)
    again = lab.backup("incremental")
    assert kinds(again) == {"vda": "incremental"}
    lab.assert_point(again["point"], lab.writer.moment)
    lab.domain.start()
    lab.next_is_right()  # and libvirt removes what was left below the overlay
    shut_down(lab)
    assert [len(bitmaps(one)) for one in (overlay, lab.domain.disks[0]["path"])] == [1, 0]


def test_an_overlay_that_libvirt_did_not_make_is_scanned(make_lab: Make) -> None:
    """It has no bitmap of the checkpoint, although the image below has; libvirt would refuse the snapshot."""
    lab = begun(make_lab, sizes=ONE)
    shut_down(lab)
    lab.cli.vm += ["--image", f"vda={with_base(lab)}"]
    report = lab.backup("incremental")
    assert kinds(report) == {"vda": "scan"}
    lab.assert_point(report["point"], lab.writer.moment)
    lab.domain.start()
    assert kinds(online(lab)) == {"vda": "incremental"}


def resume(lab: Lab) -> None:
    """Start a saved domain: with its memory, unless this QEMU no longer loads it the way libvirt asks for.

    libvirt 11.3 names the file as "fd:", which QEMU 11.1 refuses. The guest then boots from its images.
    """
    try:
        lab.domain.start()
    except CannotBeHad as err:
        if "fd: migration to a file is not supported" not in str(err):
            raise
        lab.domain.handle().managedSaveRemove(0)
        lab.domain.start()


def test_a_saved_domain_is_backed_up_as_its_images_are(make_lab: Make) -> None:
    lab = begun(make_lab, sizes=ONE)
    lab.domain.handle().managedSave(0)
    lab.writer.remember()
    assert kinds(offline(lab)) == {"vda": "incremental"}
    resume(lab)
    lab.next_is_right()


def test_kept_checkpoints_serve_differentials_across_a_shutdown(make_lab: Make) -> None:
    keep = ("--keep-checkpoints", "2")
    lab = make_lab(ONE)
    lab.writer.write(10)
    since = lab.backup("full", *keep)["point"]
    lab.writer.write(3)
    lab.backup("incremental", *keep)
    lab.writer.write(3)
    shut_down(lab)
    report = lab.backup("incremental", "--since", since, *keep)
    assert (kinds(report), report["parent"]) == ({"vda": "incremental"}, since)
    lab.assert_point(report["point"], lab.writer.moment)
    assert_agreed(lab, checkpoints=3)


def test_after_a_crash_of_qemu_the_images_are_scanned(make_lab: Make) -> None:
    lab = begun(make_lab, sizes=ONE)
    crash(lab)
    image, now = lab.domain.disks[0]["path"], lab.directory / "now.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, now], check=True, timeout=30)
    lab.writer.model["vda"][:] = now.read_bytes()
    report = lab.backup("incremental")
    assert kinds(report) == {"vda": "scan"}
    lab.assert_point(report["point"], {"vda": now.read_bytes()})
    lab.domain.start()
    lab.next_is_right()


@pytest.mark.parametrize(
    ("call", "when", "then"),
    [
        ("virDomainCheckpointCreateXML", "before", "on"),
        ("virDomainCheckpointCreateXML", "after", "off"),
        ("virDomainCheckpointCreateXML", "after", "on"),
        ("virDomainCheckpointDelete", "before", "on"),
        ("virDomainCheckpointDelete", "after", "off"),
        ("blockdev-reopen", "before", "off"),
        ("blockdev-reopen", "after", "on"),
        ("transaction", "after", "off"),
        ("block-export-add", "after", "on"),
    ],
)
def test_a_run_that_is_killed_is_undone_by_the_next_whether_the_domain_runs_then(
    make_lab: Make, call: str, when: str, then: str
) -> None:
    lab = begun(make_lab, sizes=TWO)
    shut_down(lab)
    died = lab.cli.call("incremental", "web", entry=interrupted_cli.ENTRY, KILL_AT=call, KILL_WHEN=when)
    assert died.returncode == -signal.SIGKILL, died.stderr
    if then == "off":
        lab.backup("incremental")  # whose images may still be locked for a moment
        assert_agreed(lab)
        lab.domain.start()
    else:
        start_patiently(lab)
    lab.writer.write(3)
    lab.writer.remember()
    report = lab.backup("incremental")
    lab.assert_point(report["point"], lab.writer.moment)
    lab.assert_clean()
    shut_down(lab)
    assert set(kinds(offline(lab)).values()) == {"incremental"}


@pytest.mark.parametrize("clean", [True, False])
def test_an_unfinished_run_of_the_running_domain_is_rolled_back_when_it_is_off(
    make_lab: Make, clean: bool
) -> None:
    lab = begun(make_lab, sizes=ONE)
    died = lab.cli.call(
        "incremental", "web", entry=interrupted_cli.ENTRY, KILL_AT="virDomainBackupBegin", KILL_WHEN="after"
    )
    assert died.returncode == -signal.SIGKILL
    wait_for(lambda: not lab.domain.has_job())
    lab.writer.write(5)
    if clean:
        shut_down(lab)
        assert any("unfinished" in one for one in lab.cli.json("status", "web")["leftovers"])
        assert lab.cli.json("recover", "web")["actions"]
        assert_agreed(lab)
        assert kinds(offline(lab)) == {"vda": "incremental"}
    else:
        crash(lab)
        assert kinds(lab.backup("incremental")) == {"vda": "scan"}
        assert_agreed(lab)


def test_a_bitmap_of_ours_that_libvirt_does_not_know_of_is_removed(make_lab: Make) -> None:
    lab = begun(make_lab, sizes=ONE)
    shut_down(lab)
    (name,) = lab.domain.checkpoints()
    lab.domain.daemon.virsh("checkpoint-delete", lab.domain.name, name, "--metadata")
    assert any("no checkpoint" in one for one in lab.cli.json("status", "web")["leftovers"])
    report = offline(lab)
    assert kinds(report) == {"vda": "scan"}


def test_checkpoints_and_bitmaps_of_others_stay(make_lab: Make) -> None:
    lab = begun(make_lab, sizes=ONE)
    lab.domain.handle().checkpointCreateXML("<domaincheckpoint><name>their.0</name></domaincheckpoint>")
    shut_down(lab)
    offline(lab)
    assert "their.0" in lab.domain.checkpoints()
    assert "left alone" in lab.cli.run("status", "web").stdout
    findings = lab.cli.json("doctor", "web")["findings"]
    assert any("their.0" in json.dumps(one) for one in findings)
    lab.domain.start()
    lab.writer.write(1)
    lab.domain.daemon.virsh("checkpoint-dumpxml", lab.domain.name, "their.0", "--size")


def test_the_bitmaps_of_a_domain_that_is_off_are_listed_and_removed(make_lab: Make) -> None:
    lab = begun(make_lab, sizes=TWO)
    shut_down(lab)
    found = lab.cli.json("bitmaps", "web")["bitmaps"]
    assert [(one["disk"], one["use"]) for one in found] == [("vda", "live"), ("vdb", "live")]
    shutil.rmtree(lab.cli.repository)
    words = [word for one in found for word in ("--remove", one["name"])]
    lab.cli.json("bitmaps", "web", *words)
    assert_agreed(lab, checkpoints=0)


@pytest.mark.parametrize(("options", "code"), [(("--if-running",), 0), ((), 0)])
def test_what_is_done_with_a_domain_that_is_off_is_decided_as_for_every_vm(
    make_lab: Make, options: tuple[str, ...], code: int
) -> None:
    lab = begun(make_lab, sizes=ONE)
    shut_down(lab)
    before = len(lab.cli.json("list", "web", vm=False))
    lab.cli.run("incremental", "web", *options, code=code)
    assert len(lab.cli.json("list", "web", vm=False)) == before + (not options)


def test_a_domain_is_not_started_while_its_images_are_read(make_lab: Make) -> None:
    lab = begun(make_lab, sizes=ONE)
    shut_down(lab)
    run = lab.cli.start("full", "web", "--limit", "200K")
    wait_for(lambda: list((lab.cli.repository / "web").glob("*.partial/*.qcow2")), run)
    with pytest.raises(CannotBeHad, match="lock"):
        lab.domain.start()
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    lab.domain.start()
    lab.next_is_right()


def test_a_backing_file_that_the_definition_does_not_name_must_be_configured(make_lab: Make) -> None:
    """A QEMU that its guest has taken over could have written its name."""
    lab = make_lab(ONE)
    lab.domain.destroy()
    named = with_base(lab)
    error = lab.cli.json("full", "web", code=1)["error"]
    assert "base.qcow2" in error["message"]
    lab.cli.vm += ["--image", f"vda={named}"]
    lab.writer.remember()
    offline(lab, "full")


def with_base(lab: Lab) -> str:
    """Put an overlay in the place of the image; return how both are named on the command line."""
    top, base = Path(lab.domain.disks[0]["path"]), lab.directory / "base.qcow2"
    top.rename(base)
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(top)]
    subprocess.run(create, check=True, timeout=30)
    return f"{top},backing={base}"


def start_patiently(lab: Lab) -> None:
    """Start the domain: the daemon of a killed run has the images for some milliseconds more."""
    for _ in range(50):
        try:
            return lab.domain.start()
        except CannotBeHad:
            time.sleep(0.1)
    return lab.domain.start()
