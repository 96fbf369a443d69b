# SPDX-License-Identifier: GPL-2.0-or-later
"""Backups of a VM that is off: the same chains, by the images of its disks."""

import json
import os
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path

import pytest

from tests import interrupted_cli
from tests.off_images import await_copy, daemons_of

pytestmark = pytest.mark.needs_qemu("a VM that is off has no simulator")

SIZES = {"vda": 4 << 20, "vdb": (2 << 20) + 512}


@pytest.fixture
def lab(each_build, make_lab):
    """A machine of two disks on each QEMU, and the command line with the images of both."""
    return with_images(make_lab(each_build, SIZES))


@pytest.fixture
def old_lab(oldest_build, make_lab):
    """The same on the oldest QEMU, for what does not depend on the version."""
    return with_images(make_lab(oldest_build, SIZES))


def with_images(lab):
    for disk in lab.machine.disks:
        kind = ",format=raw" if disk.format == "raw" else ""
        lab.cli.vm += ["--image", f"{disk.name}={disk.path}{kind}"]
    return lab


def shut_down(lab) -> None:
    """End the guest and its QEMU, as a shutdown does; its monitor's socket stays behind, or goes."""
    lab.writer.remember()
    lab.machine.quit()


def start_again(lab) -> None:
    lab.machine.start()


def offline(lab, kind: str, *options: str, leaks: bool = False):
    """Take a point while the VM is off; it must hold what the images hold.

    leaks: the QEMU that had the images before was killed, so they may have clusters that nothing uses.
    """
    report = lab.backup(kind, *options)
    assert report["consistency"] == "offline"
    lab.assert_point(report["point"], lab.writer.moment)
    assert_images_are_whole(lab, leaks=leaks)
    return report


def online(lab, kind: str):
    report = lab.backup(kind)
    assert report["consistency"] == "filesystem"
    lab.assert_point(report["point"], lab.writer.moment)
    return report


def info(lab, disk) -> dict:
    command = [lab.machine.build.tool("qemu-img"), "info", "--output=json", str(disk.path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, timeout=30).stdout)


def bitmaps(lab) -> dict[str, list[tuple[str, list[str]]]]:
    """Return the bitmaps that the images store, with their flags."""
    found = {}
    for disk in lab.machine.disks:
        stored = info(lab, disk).get("format-specific", {}).get("data", {}).get("bitmaps", [])
        found[disk.name] = [(one["name"], one["flags"]) for one in stored]
    return found


def assert_images_are_whole(lab, leaks: bool = False) -> None:
    """No image is corrupt or locked, and no daemon has it open."""
    for disk in lab.machine.disks:
        if disk.format != "qcow2":
            continue
        done = subprocess.run(
            [lab.machine.build.tool("qemu-img"), "check", "-q", str(disk.path)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode in ((0, 3) if leaks else (0,)), done.stdout + done.stderr


def test_a_chain_goes_on_across_shutdowns_in_both_directions(lab):
    lab.writer.write(20)
    online(lab, "full")
    lab.writer.write(5)
    shut_down(lab)
    first = offline(lab, "incremental")
    assert not any(disk["scanned"] for disk in first["disks"])
    assert sum(disk["stored_bytes"] for disk in first["disks"]) > 0
    nothing = offline(lab, "incremental")
    assert not any(disk["scanned"] for disk in nothing["disks"])
    assert sum(disk["dirty_bytes"] for disk in nothing["disks"]) == 0
    start_again(lab)
    lab.writer.write(5)
    report = online(lab, "incremental")
    assert report["parent"] == nothing["point"]
    assert not any(disk["scanned"] for disk in report["disks"])
    lab.assert_at_rest()
    shut_down(lab)
    last = offline(lab, "incremental")
    assert sum(disk["dirty_bytes"] for disk in last["disks"]) == 0
    assert [len(found) for found in bitmaps(lab).values()] == [1, 1]
    assert all(flags == ["auto"] for found in bitmaps(lab).values() for _, flags in found)


def test_a_full_begins_a_chain_while_the_vm_is_off(lab):
    lab.writer.write(20)
    shut_down(lab)
    offline(lab, "full")
    start_again(lab)
    lab.writer.write(5)
    report = online(lab, "incremental")
    assert not any(disk["scanned"] for disk in report["disks"])


def test_a_differential_works_offline_from_checkpoints_of_both(lab):
    keep = ("--keep-checkpoints", "2")
    lab.writer.write(20)
    since = lab.backup("full", *keep)["point"]
    lab.writer.write(3)
    lab.backup("incremental", *keep)
    lab.writer.write(3)
    shut_down(lab)
    report = offline(lab, "incremental", "--since", since, *keep)
    assert report["parent"] == since
    assert not any(disk["scanned"] for disk in report["disks"])


def test_a_raw_image_is_scanned_and_needs_no_scratch_space(old_lab, oldest_build, make_lab, tmp_path):
    lab = old_lab
    raw = tmp_path / "other.raw"
    raw.write_bytes(os.urandom(1 << 20))
    lab.cli.vm[-1] = f"vdb={raw},format=raw"
    lab.writer.write(10)
    shut_down(lab)
    point = lab.backup("full")["point"]
    assert lab.cli.raw(point, "vdb", tmp_path) == raw.read_bytes()
    with raw.open("r+b") as file:
        file.seek(65536)
        file.write(b"\1" * 65536)
    report = lab.backup("incremental")
    assert {disk["name"]: disk["scanned"] for disk in report["disks"]} == {"vda": False, "vdb": True}
    assert next(one["stored_bytes"] for one in report["disks"] if one["name"] == "vdb") < 1 << 19
    assert lab.cli.raw(report["point"], "vdb", tmp_path) == raw.read_bytes()


def test_a_vm_that_runs_is_refused_by_its_lock_however_its_socket_is_named(lab):
    lab.writer.write(3)
    lab.cli.vm[1] = "unix:/nonexistent/qmp"
    error = lab.cli.json("full", "web", code=1)["error"]
    assert error["kind"] == "MonitorUnreachable"
    assert "in use by another process" in error["message"]
    assert error["state"] == "nothing was touched"
    assert not lab.cli.repository.exists()


def test_a_raw_image_of_a_vm_that_runs_is_refused(oldest_build, make_lab):
    lab = with_images(make_lab(oldest_build, {"vda": 1 << 20}, formats={"vda": "raw"}))
    lab.cli.vm[1] = "unix:/nonexistent/qmp"
    error = lab.cli.json("full", "web", code=1)["error"]
    assert "in use by another process" in error["message"]


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_a_vm_cannot_start_while_its_images_are_read(oldest_build, make_lab, kind):
    lab = with_images(make_lab(oldest_build, {"vda": 4 << 20}, formats={"vda": kind}))
    lab.writer.write(20)
    shut_down(lab)
    run = lab.cli.start("full", "web", *("--limit", "200K"))
    try:
        await_copy(lab, run)
        image = lab.machine.disks[0].path
        writer = [lab.machine.build.tool("qemu-io"), "-f", kind, "-c", "write 0 64k", str(image)]
        done = subprocess.run(writer, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode
        assert "lock" in done.stderr + done.stdout
    finally:
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=60)
    assert daemons_of(lab) == []


def test_a_monitor_that_is_silent_is_not_a_vm_that_is_off(old_lab):
    """Another client holds it: the VM may run."""
    held = old_lab.machine.qmp_path
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(held))
        error = old_lab.cli.json("full", "web", "--command-timeout", "1", "--if-running", code=1)["error"]
    assert "does not answer" in error["message"]


def test_an_unfinished_online_run_is_rolled_back_offline(lab):
    lab.writer.write(20)
    online(lab, "full")
    lab.writer.write(5)
    died = lab.cli.call(
        "incremental", "web", entry=interrupted_cli.ENTRY, KILL_AT="block-export-add", KILL_WHEN="after"
    )
    assert died.returncode == -signal.SIGKILL
    lab.writer.write(5)
    assert lab.agent.frozen is False
    shut_down(lab)
    left = lab.cli.json("status", "web")["leftovers"]
    assert any("unfinished" in one for one in left)
    assert lab.cli.json("recover", "web")["actions"]
    assert [len(found) for found in bitmaps(lab).values()] == [1, 1]
    report = offline(lab, "incremental")
    assert not any(disk["scanned"] for disk in report["disks"])


def test_a_run_that_froze_and_was_killed_needs_no_agent_when_the_vm_is_off(old_lab):
    lab = old_lab
    lab.writer.write(5)
    online(lab, "full")
    died = lab.cli.call("incremental", "web", entry=interrupted_cli.ENTRY, KILL_AT="transaction")
    assert died.returncode == -signal.SIGKILL
    time.sleep(2)
    shut_down(lab)
    lab.agent.close()
    lab.cli.run("recover", "web")
    offline(lab, "incremental")


def test_bitmaps_of_a_qemu_that_was_killed_are_not_used(lab):
    lab.writer.write(20)
    online(lab, "full")
    shut_down(lab)  # which stores the bitmaps
    start_again(lab)
    lab.writer.write(5)
    lab.machine.kill()
    states = {disk["bitmap_state"] for disk in lab.cli.json("status", "web")["disks"]}
    assert states == {"inconsistent"}
    lab.writer.moment = {one.name: contents(lab, one) for one in lab.machine.disks}
    report = offline(lab, "incremental", leaks=True)
    assert all(disk["scanned"] for disk in report["disks"])
    again = offline(lab, "incremental", leaks=True)
    assert not any(disk["scanned"] for disk in again["disks"])


def contents(lab, disk) -> bytes:
    raw = lab.directory / "now.raw"
    command = [lab.machine.build.tool("qemu-img"), "convert", "-O", "raw", disk.path, raw]
    subprocess.run(command, check=True, timeout=60)
    return raw.read_bytes()


def test_a_storage_daemon_that_is_killed_costs_the_run_and_nothing_else(old_lab):
    lab = old_lab
    lab.writer.write(20)
    lab.backup("full")
    lab.writer.write(20)
    shut_down(lab)
    run = lab.cli.start("incremental", "web", "--limit", "100K", "--json")
    found = await_copy(lab, run)
    os.kill(found[0], signal.SIGKILL)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 1, said
    report = offline(lab, "incremental")
    assert not any(disk["scanned"] for disk in report["disks"])


def test_a_storage_daemon_that_hangs_is_replaced_and_the_run_rolled_back(old_lab):
    lab = old_lab
    lab.writer.write(20)
    lab.backup("full")
    lab.writer.write(20)
    shut_down(lab)
    waits = ("--stall-timeout", "2", "--command-timeout", "2")
    run = lab.cli.start("incremental", "web", "--limit", "100K", "--json", *waits)
    (daemon,) = await_copy(lab, run)
    os.kill(daemon, signal.SIGSTOP)
    said, _ = run.communicate(timeout=100)
    assert run.returncode == 1, said
    assert daemons_of(lab) == []
    report = offline(lab, "incremental")
    assert not any(disk["scanned"] for disk in report["disks"])


def test_a_writer_that_ignores_the_lock_fails_the_run(old_lab):
    lab = old_lab
    lab.writer.write(20)
    shut_down(lab)
    run = lab.cli.start("full", "web", "--limit", "300K", "--json")
    await_copy(lab, run)
    os.utime(lab.machine.disks[0].path)
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 1
    error = json.loads(said)["error"]
    assert "ignores QEMU's lock" in error["message"]
    assert error["state"] == "rolled back: nothing is lost, nothing of this run is left"


def test_without_images_a_vm_that_is_off_fails_as_before_and_the_hint_tells_of_images(oldest_build, make_lab):
    lab = make_lab(oldest_build, {"vda": 1 << 20})
    shut_down(lab)
    error = lab.cli.json("full", "web", code=1)["error"]
    assert error["kind"] == "MonitorUnreachable"
    assert "--image" in error["hint"]


def test_if_running_skips_a_vm_that_is_off(old_lab):
    lab = old_lab
    lab.writer.write(3)
    lab.backup("full", "--if-running")
    shut_down(lab)
    report = lab.cli.json("incremental", "web", "--if-running")
    assert report["point"] is None
    assert "is off" in report["skipped"]
    assert len(lab.cli.json("list", "web", vm=False)) == 1
    said = lab.cli.run("full", "web", "--if-running")
    assert "no backup: web is off" in said.stderr


def configured(lab, tmp_path: Path, when_off: str) -> Path:
    images = ", ".join(f'{one.name} = "{one.path}"' for one in lab.machine.disks)
    file = tmp_path / "backupctl.toml"
    file.write_text(
        f'[vm.web]\nqmp = "unix:{lab.machine.qmp_path}"\nagent = "unix:{lab.machine.agent_path}"\n'
        f'when_off = "{when_off}"\nimage = {{{images}}}\nkeep_last = 1\n'
    )
    file.chmod(0o600)
    return file


def test_the_configuration_says_what_a_vm_that_is_off_means(old_lab, tmp_path):
    lab = old_lab
    lab.cli.vm = ["--config", str(configured(lab, tmp_path, "fail"))]
    lab.writer.write(3)
    lab.backup("full")
    lab.backup("full")
    shut_down(lab)
    assert lab.cli.json("run", "web", code=1)["vms"][0]["error"]["kind"] == "MonitorUnreachable"
    configured(lab, tmp_path, "skip")
    told = lab.cli.json("run", "web")["vms"][0]
    assert [task["outcome"] for task in told["tasks"]] == ["skipped", "skipped", "skipped"]
    assert told["exit_code"] == 0
    planned = lab.cli.json("run", "web", "--dry-run")["vms"][0]
    assert [task["outcome"] for task in planned["tasks"]] == ["skipped"]
    lab.cli.run("run", "web")
    assert len(lab.cli.json("list", "web", vm=False)) == 2, "a skipped backup was followed by a prune"
    configured(lab, tmp_path, "backup")
    told = lab.cli.json("run", "web")["vms"][0]
    assert [task["outcome"] for task in told["tasks"]] == ["done", "done", "skipped"]


def test_status_doctor_and_bitmaps_look_at_the_images(old_lab):
    lab = old_lab
    lab.writer.write(3)
    point = lab.backup("full")["point"]
    shut_down(lab)
    found = lab.cli.json("status", "web")
    assert found["disks"][0]["bitmap_state"] == "recording"
    assert "the VM is off" in found["qemu"]
    findings = {one["subject"]: one for one in lab.cli.json("doctor", "web")["findings"]}
    assert findings["monitor"]["verdict"] == "ok"
    assert "agent" not in findings
    listed = lab.cli.json("bitmaps", "web")["bitmaps"]
    assert [point in one["name"] for one in listed] == [True, True]
    assert lab.cli.json("show", "web", "latest", vm=False)["consistency"] == "filesystem"


def test_images_alone_need_no_monitor(old_lab):
    lab = old_lab
    lab.writer.write(3)
    shut_down(lab)
    lab.cli.vm = lab.cli.vm[4:]
    offline(lab, "full")
    error = lab.cli.json("full", "web", "--if-running", code=2)["error"]
    assert "no monitor" in error["message"]


def test_a_backing_file_is_read_only_if_it_is_named(old_lab):
    lab = old_lab
    image, tool = lab.machine.disks[0].path, lab.machine.build.tool("qemu-img")
    lab.writer.write(10)
    shut_down(lab)
    over = image.with_name("over.qcow2")
    command = [tool, "create", "-q", "-f", "qcow2", "-b", str(image), "-F", "qcow2", str(over)]
    subprocess.run(command, check=True, timeout=30)
    at = lab.cli.vm.index("--image") + 1
    lab.cli.vm[at] = f"vda={over}"
    error = lab.cli.json("full", "web", code=1)["error"]
    assert "backing file" in error["message"]
    lab.cli.vm[at] = f"vda={over},backing={lab.machine.disks[1].path}"
    assert "does not have the backing file" in lab.cli.json("full", "web", code=1)["error"]["message"]
    lab.cli.vm[at] = f"vda={over},backing={image}"
    offline(lab, "full")


@pytest.mark.parametrize("made", ["backing", "data-file", "json"])
def test_a_header_that_leads_elsewhere_is_refused(old_lab, tmp_path, made):
    lab = old_lab
    shut_down(lab)
    tool, image = lab.machine.build.tool("qemu-img"), tmp_path / "hostile.qcow2"
    secret = tmp_path / "shadow"
    secret.write_bytes(b"root:secret\n" * 100)
    if made == "data-file":
        options = ["-o", f"data_file={secret}"]
        subprocess.run([tool, "create", "-q", "-f", "qcow2", *options, image, "64k"], check=True, timeout=30)
    else:
        name = str(secret) if made == "backing" else json.dumps({"driver": "file", "filename": str(secret)})
        name = name if made == "backing" else f"json:{name}"
        command = [tool, "create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", "raw", image, "64k"]
        subprocess.run(command, check=True, timeout=30)
    lab.cli.vm[lab.cli.vm.index("--image") + 1] = f"vda={image}"
    error = lab.cli.json("full", "web", code=1)["error"]
    assert error["kind"] == "Refused"
    assert not lab.cli.repository.exists()


@pytest.mark.parametrize("made", ["link", "raw as qcow2", "missing", "unclosed", "twice"])
def test_an_image_that_is_not_what_is_said_is_refused(old_lab, tmp_path, made):
    lab = old_lab
    shut_down(lab)
    image = lab.machine.disks[0].path
    named = tmp_path / "named"
    if made == "link":
        named.symlink_to("/etc/shadow")
    elif made == "raw as qcow2":
        named.write_bytes(b"\0" * 65536)
    elif made == "unclosed":
        content = bytearray(image.read_bytes())
        content[72:80] = struct.pack(">Q", 1)
        named.write_bytes(content)
    elif made == "twice":
        named = lab.machine.disks[1].path
    lab.cli.vm[lab.cli.vm.index("--image") + 1] = f"vda={named}"
    error = lab.cli.json("full", "web", code=1)["error"]
    assert error["kind"] in ("Refused", "MonitorUnreachable")
    assert str(named) in error["message"] or "/etc/shadow" in error["message"]
    assert not lab.cli.repository.exists()
