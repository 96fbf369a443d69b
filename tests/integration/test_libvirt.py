# SPDX-License-Identifier: GPL-2.0-or-later
"""Domains of libvirt, by its own backup API: a libvirtd of the test's own, domains without an OS."""

import json
import os
import shlex
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from fixtures.libvirtd import Libvirtd
from tests.conftest import MIB
from tests.libvirt_lab import Lab, Make, begun, guard_of, kinds, maker, plain, wait_for

libvirt = pytest.importorskip("libvirt", reason="python3-libvirt is not installed")


LIBVIRTD = {"small": True}


@pytest.fixture
def make_lab(daemon: Libvirtd, tmp_path: Path, held: ExitStack, request: pytest.FixtureRequest) -> Make:
    return maker(daemon, tmp_path, held, request.node.nodeid)


def test_a_full_and_incrementals_are_byte_equal(make_lab: Make) -> None:
    lab = make_lab({"vda": 8 * MIB, "vdb": 4 * MIB, "vdc": 2 * MIB}, formats={"vdc": "raw"})
    lab.writer.write(30)
    lab.writer.remember()
    first, begun = lab.backup("full"), lab.writer.moment
    lab.assert_clean()
    lab.writer.write(10)
    lab.writer.remember()
    second, then = lab.backup("incremental"), lab.writer.moment
    assert kinds(second) == {"vda": "incremental", "vdb": "incremental", "vdc": "scan"}
    lab.assert_point(first["point"], begun)
    lab.assert_point(second["point"], then)
    lab.next_is_right()


def test_a_run_killed_in_mid_copy_with_its_guard_leaves_a_job_that_the_next_run_ends(make_lab: Make) -> None:
    """The drill in which virtnbdbackup loses changes: its next incremental starts at the run that failed."""
    lab = begun(make_lab)
    run = copying(lab)
    guard = guard_of(run.pid)
    os.kill(guard, signal.SIGSTOP)  # before it can do anything
    run.kill()
    run.communicate()
    os.kill(guard, signal.SIGKILL)
    assert lab.domain.has_job()
    assert "backup job" in lab.cli.run("status", "web").stdout
    lab.next_is_right()


def copying(lab: Lab) -> "subprocess.Popen[str]":
    """Return a run that copies, slowly."""
    lab.writer.write(20)
    run = lab.cli.start("incremental", "web", "--limit", "200K")
    wait_for(lambda: list((lab.cli.repository / "web").glob("*.partial/*.qcow2")), run)
    wait_for(lab.domain.has_job, run)
    return run


def test_a_libvirtd_that_is_restarted_in_mid_copy_loses_nothing(make_lab: Make, daemon: Libvirtd) -> None:
    lab = begun(make_lab)
    run = copying(lab)
    os.kill(daemon.daemon_process(), signal.SIGTERM)
    run.communicate(timeout=100)
    assert run.returncode in (0, 1, 3)
    daemon.come_again()
    lab.next_is_right()


def test_a_client_that_does_not_read_while_somebody_aborts_the_job_keeps_the_guest_only_until_it_dies(
    make_lab: Make, daemon: Libvirtd
) -> None:
    """QEMU stands still until the client reads or leaves; the guard reads then."""
    lab = begun(make_lab)
    run = copying(lab)
    run.send_signal(signal.SIGSTOP)
    words = ["virsh", "-q", "-c", daemon.uri, "domjobabort", lab.domain.name]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as abort:
        time.sleep(1.0)
        run.kill()
        run.communicate(timeout=60)
        abort.wait(60)
    wait_for(lambda: lab.domain.is_running() and not lab.domain.has_job())
    lab.next_is_right()


def test_a_repository_that_fills_up_in_mid_copy_loses_nothing(make_lab: Make) -> None:
    """The other drill in which virtnbdbackup loses changes."""
    lab = begun(make_lab)
    lab.writer.do("vda", "data", 0, 4 * MIB)
    arguments = ("full-disk", "incremental", "web")
    failed = lab.cli.call(*arguments, entry="backupctl.cli.faulty:faulty_cli")
    assert failed.returncode == 1, failed.stderr
    lab.assert_clean()
    lab.next_is_right()


def test_after_a_crash_of_qemu_the_disk_is_scanned(make_lab: Make) -> None:
    lab = begun(make_lab, sizes={"vda": 4 * MIB})
    os.kill(lab.domain.daemon.qemu(lab.domain.name), signal.SIGKILL)
    wait_for(lambda: not lab.domain.handle().isActive())
    image = str(lab.domain.disks[0]["path"])
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, lab.directory / "now.raw"], check=True)
    lab.domain.start()
    report = lab.backup("incremental")
    assert kinds(report) == {"vda": "scan"}
    lab.assert_point(report["point"], {"vda": (lab.directory / "now.raw").read_bytes()})
    lab.writer.model["vda"][:] = (lab.directory / "now.raw").read_bytes()
    lab.next_is_right()


def test_a_chain_goes_on_over_a_snapshot_and_a_block_commit(make_lab: Make) -> None:
    lab = begun(make_lab, sizes={"vda": 4 * MIB})
    virsh, name = lab.domain.daemon.virsh, lab.domain.name
    overlay = lab.directory / "overlay.qcow2"
    virsh(
        "snapshot-create-as", name, "s", "--disk-only", "--no-metadata", "--diskspec", f"vda,file={overlay}"
    )
    lab.next_is_right()
    lab.writer.write(5)
    virsh("blockcommit", name, "vda", "--active", "--pivot", "--wait")
    lab.next_is_right()


def test_exchanged_images_are_scanned_although_both_have_the_bitmap(make_lab: Make) -> None:
    lab = begun(make_lab, sizes={"vda": 4 * MIB, "vdb": 4 * MIB})
    lab.domain.daemon.virsh("shutdown", lab.domain.name, "--mode", "acpi")
    lab.domain.quit()
    wait_for(lambda: not lab.domain.handle().isActive())
    one, other = (disk["path"] for disk in lab.domain.disks)
    xml = lab.domain.daemon.directory / f"{lab.domain.name}.xml"
    text = lab.domain.daemon.virsh("dumpxml", lab.domain.name)
    swapped = text.replace(str(one), "ONE").replace(str(other), str(one)).replace("ONE", str(other))
    xml.write_text(swapped)
    lab.domain.daemon.virsh("define", xml)
    lab.domain.start()
    model = lab.writer.model
    model["vda"], model["vdb"] = model["vdb"], model["vda"]
    lab.writer.write(3)
    lab.writer.remember()
    report = lab.backup("incremental")
    assert kinds(report) == {"vda": "scan", "vdb": "scan"}
    lab.assert_point(report["point"], lab.writer.moment)


def test_checkpoints_of_others_stay(make_lab: Make) -> None:
    lab = begun(make_lab, sizes={"vda": 4 * MIB})
    lab.domain.handle().checkpointCreateXML(
        "<domaincheckpoint><name>virtnbdbackup.0</name></domaincheckpoint>"
    )
    lab.next_is_right()
    assert "virtnbdbackup.0" in lab.domain.checkpoints()
    (told,) = lab.cli.json("status", "web")["other_tools"]
    assert (told["tool"], told["names"]) == ("virtnbdbackup", ["virtnbdbackup.0"])
    subprocess.run(shlex.split(told["removal"][0]), check=True, timeout=60, stdout=subprocess.DEVNULL)
    assert "virtnbdbackup.0" not in lab.domain.checkpoints()


def test_kept_checkpoints_serve_differentials(make_lab: Make) -> None:
    lab = make_lab({"vda": 4 * MIB})
    lab.writer.write(10)
    first = lab.backup("full", "--keep-checkpoints", "2")
    for _ in range(2):
        lab.writer.write(3)
        lab.backup("incremental", "--keep-checkpoints", "2")
    lab.assert_clean(checkpoints=3)
    lab.writer.write(3)
    lab.writer.remember()
    report = lab.backup("incremental", "--since", first["point"], "--keep-checkpoints", "2")
    assert (kinds(report), report["parent"]) == ({"vda": "incremental"}, first["point"])
    lab.assert_point(report["point"], lab.writer.moment)
    lab.assert_clean(checkpoints=3)


def test_somebody_elses_backup_is_left_alone(make_lab: Make) -> None:
    lab = begun(make_lab, sizes={"vda": 4 * MIB})
    socket = lab.directory / "theirs"
    scratch = f"<scratch file='{lab.directory}/theirs.scratch'/>"
    disk = f"<disk name='vda' backup='yes' type='file'>{scratch}</disk>"
    lab.domain.handle().backupBegin(
        f"<domainbackup mode='pull'><server transport='unix' socket='{socket}'/><disks>{disk}</disks>"
        "</domainbackup>",
        None,
    )
    done = lab.cli.run("incremental", "web", code=1)
    assert "somebody else's backup" in done.stderr
    assert lab.domain.has_job()
    assert "somebody else's backup" in lab.cli.run("status", "web").stdout
    lab.domain.handle().abortJob()
    wait_for(lambda: not lab.domain.has_job())
    lab.next_is_right()


def test_what_is_told_of_a_domain(make_lab: Make) -> None:
    lab = begun(make_lab, sizes={"vda": 4 * MIB})
    status = lab.cli.json("status", "web")
    assert [(one["name"], one["bitmap_state"], one["next"]) for one in status["disks"]] == [
        ("vda", "recording", "incremental")
    ]
    (bitmap,) = lab.cli.json("bitmaps", "web")["bitmaps"]
    assert (bitmap["use"], bitmap["disk"]) == ("live", "vda")
    findings = {one["subject"]: one["verdict"] for one in lab.cli.json("doctor", "web")["findings"]}
    assert findings["rights"] == "ok"
    assert findings["agent"] == "warning"
    assert "bad" not in findings.values()
    assert "Nothing to recover" in lab.cli.run("recover", "web").stdout


def test_a_domain_that_is_off_and_is_to_fail_then_or_is_unknown_is_said_so(make_lab: Make) -> None:
    lab = make_lab({"vda": 4 * MIB})
    lab.domain.destroy()
    configuration = lab.directory / "backupctl.toml"
    configuration.write_text('[defaults]\nwhen_off = "fail"\n')
    lab.cli.environment["BACKUPCTL_CONFIG"] = str(configuration)
    assert "is not running" in lab.cli.run("full", "web", code=1).stderr
    lab.cli.vm[-1] = "nobody"
    assert "has no domain named 'nobody'" in lab.cli.run("full", "web", code=1).stderr


def test_domains_are_found_by_a_pattern_and_configured(make_lab: Make) -> None:
    lab = make_lab({"vda": 4 * MIB})
    uri, name = lab.domain.daemon.uri, lab.domain.name
    told = plain(lab, "discover", f"{name[:-1]}*", "--libvirt", uri, "--toml")
    lab.cli.environment["BACKUPCTL_CONFIG"] = str(lab.directory / "backupctl.toml")
    (lab.directory / "backupctl.toml").write_text(f'[defaults]\nscratch = "{lab.cli.scratch}"\n\n{told}')
    found = json.loads(plain(lab, "discover", name, "nobody*", "--libvirt", uri, "--json"))
    assert found["domains"] == [{"domain": name, "running": True, "configured_as": [name]}]
    report = lab.cli.json("full", name, vm=False)
    assert kinds(report) == {"vda": "full"}
    assert "running" in plain(lab, "discover", "--libvirt", uri)
