# SPDX-License-Identifier: GPL-2.0-or-later
"""Backups of a VM on another host that is off: its images are opened there."""

import json
import os
import signal
import subprocess

import pytest

from fixtures.sshd import Sshd
from tests import interrupted_cli
from tests.off_images import await_copy, daemons_of

pytestmark = pytest.mark.needs_qemu("a VM that is off has no simulator")

SIZES = {"vda": 4 << 20, "vdb": (2 << 20) + 512}


@pytest.fixture
def lab(oldest_build, make_lab, sshd):
    """A machine of two disks, and a command line that reaches its monitor and its images by ssh."""
    return over_ssh(make_lab(oldest_build, SIZES), sshd)


def over_ssh(lab, sshd: Sshd):
    lab.cli.environment.update(sshd.environment)
    lab.cli.vm = ["--qmp", sshd.address(lab.machine.qmp_path), *images(lab, sshd)]
    return lab


def images(lab, sshd: Sshd) -> list[str]:
    words = []
    for disk in lab.machine.disks:
        kind = ",format=raw" if disk.format == "raw" else ""
        words += ["--image", f"{disk.name}={sshd.address(disk.path)}{kind}"]
    return words


def shut_down(lab) -> None:
    lab.writer.remember()
    lab.machine.quit()


def offline(lab, kind: str, *options: str):
    report = lab.backup(kind, *options)
    assert report["consistency"] == "offline"
    lab.assert_point(report["point"], lab.writer.moment)
    assert daemons_of(lab) == []
    return report


def test_a_chain_goes_on_across_shutdowns_of_a_vm_on_another_host(lab, sshd):
    lab.writer.write(20)
    lab.backup("full")
    lab.writer.write(5)
    shut_down(lab)
    first = offline(lab, "incremental")
    assert not any(disk["scanned"] for disk in first["disks"])
    assert sum(disk["stored_bytes"] for disk in first["disks"]) > 0
    nothing = offline(lab, "incremental")
    assert sum(disk["dirty_bytes"] for disk in nothing["disks"]) == 0
    lab.machine.start()
    lab.writer.write(5)
    lab.writer.remember()
    report = lab.backup("incremental")
    assert report["parent"] == nothing["point"]
    assert not any(disk["scanned"] for disk in report["disks"])
    lab.assert_point(report["point"], lab.writer.moment)
    lab.assert_at_rest()
    sshd.await_end()


def test_images_on_another_host_are_a_vm_by_themselves(lab, sshd):
    lab.writer.write(20)
    shut_down(lab)
    lab.cli.vm = images(lab, sshd)
    offline(lab, "full")
    report = offline(lab, "incremental")
    assert not any(disk["scanned"] for disk in report["disks"])
    findings = {one["subject"]: one["verdict"] for one in lab.cli.json("doctor", "web")["findings"]}
    assert (findings["ssh"], findings["image"]) == ("ok", "ok")
    assert "bad" not in findings.values()
    assert lab.cli.json("bitmaps", "web")["bitmaps"]
    sshd.await_end()


def test_a_vm_that_runs_there_is_refused_by_its_lock_however_its_socket_is_named(lab, sshd):
    lab.cli.vm[1] = sshd.address("/nonexistent/qmp")
    error = lab.cli.json("full", "web", code=1)["error"]
    assert error["kind"] == "MonitorUnreachable"
    assert error["message"].startswith("on vmhost: ")
    assert "in use by another process" in error["message"]
    assert error["state"] == "nothing was touched"
    assert not lab.cli.repository.exists()
    sshd.await_end()


def test_a_vm_is_not_started_while_its_images_are_read_over_ssh(lab, sshd):
    lab.writer.write(20)
    shut_down(lab)
    run = lab.cli.start("full", "web", "--limit", "200K")
    await_copy(lab, run)
    with pytest.raises(RuntimeError, match="lock"):
        lab.machine.start()
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert daemons_of(lab) == []
    lab.machine.start()
    lab.backup("full")
    lab.assert_at_rest()


@pytest.mark.parametrize("at", ["blockdev-reopen", "transaction"])
def test_a_run_killed_while_its_bitmaps_change_loses_none_since_the_daemon_ends_in_good_order(lab, sshd, at):
    lab.writer.write(20)
    lab.backup("full")
    lab.writer.write(5)
    shut_down(lab)
    died = lab.cli.call("incremental", "web", entry=interrupted_cli.ENTRY, KILL_AT=at, KILL_WHEN="after")
    assert died.returncode == -signal.SIGKILL, died.stderr
    sshd.await_end()
    assert daemons_of(lab) == []
    report = offline(lab, "incremental")
    assert not any(disk["scanned"] for disk in report["disks"])


def test_an_unfinished_run_of_the_vm_is_rolled_back_there_when_it_is_off(lab, sshd):
    lab.cli.vm += ["--agent", sshd.address(lab.machine.agent_path)]
    lab.writer.write(20)
    lab.backup("full")
    lab.writer.write(3)
    died = lab.cli.call(
        "incremental", "web", entry=interrupted_cli.ENTRY, KILL_AT="transaction", KILL_WHEN="after"
    )
    assert died.returncode == -signal.SIGKILL
    sshd.await_end()
    lab.writer.write(3)
    shut_down(lab)
    assert lab.cli.json("status", "web")["leftovers"]
    assert lab.cli.json("recover", "web")["actions"]
    report = offline(lab, "incremental")
    assert not any(disk["scanned"] for disk in report["disks"])
    sshd.await_end()


def test_a_daemon_that_is_killed_there_in_mid_copy_fails_the_run_and_loses_nothing(lab, sshd):
    lab.writer.write(20)
    lab.backup("full")
    lab.writer.write(20)
    shut_down(lab)
    run = lab.cli.start("incremental", "web", "--limit", "200K")
    await_copy(lab, run)
    for one in daemons_of(lab):
        os.kill(one, signal.SIGKILL)
    _, words = run.communicate(timeout=60)
    assert run.returncode == 1, words
    assert not interrupted_cli.BUG.search(words), words
    report = offline(lab, "incremental")
    assert not any(disk["scanned"] for disk in report["disks"])
    sshd.await_end()


def test_a_host_without_a_storage_daemon_is_told_before_anything_is_touched(lab, sshd):
    shut_down(lab)
    sshd.close()
    sshd.start("SetEnv QEMU_STORAGE_DAEMON=/nowhere/daemon")
    error = lab.cli.json("full", "web", code=1)["error"]
    assert error["message"].startswith("on vmhost: cannot start /nowhere/daemon")
    assert "qemu-system-common" in error["hint"]
    assert not lab.cli.repository.exists()


def test_what_an_image_there_must_not_be_is_refused_there(lab, sshd, tmp_path):
    shut_down(lab)
    top, base = tmp_path / "top.qcow2", lab.machine.disks[0].path
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(top)]
    subprocess.run(create, check=True, timeout=30)
    lab.cli.vm = ["--image", f"vda={sshd.address(top)}"]
    error = lab.cli.json("full", "web", code=1)["error"]
    assert error["kind"] == "Refused"
    assert error["message"].startswith(f"on vmhost: {top} is an overlay")
    assert "backing=FILE" in error["hint"]
    lab.cli.vm[1] += f",backing={base}"
    point = lab.backup("full")["point"]
    told = json.loads((lab.cli.repository / "web" / point / "definition" / "images.json").read_text())
    assert (told["host"], told["images"][0]["path"]) == ("vmhost", str(top))


def test_a_raw_image_there_is_scanned(lab, sshd, tmp_path):
    shut_down(lab)
    raw = tmp_path / "other disk.raw"
    raw.write_bytes(os.urandom(1 << 20))
    lab.cli.vm = ["--image", f"vdb={sshd.address(raw)},format=raw"]
    point = lab.backup("full")["point"]
    assert lab.cli.raw(point, "vdb", tmp_path) == raw.read_bytes()
    with raw.open("r+b") as file:
        file.write(b"\1" * 65536)
    report = lab.backup("incremental")
    assert report["disks"][0]["scanned"]
    assert lab.cli.raw(report["point"], "vdb", tmp_path) == raw.read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_line_that_falls_silent_ends_the_daemon_there_and_the_run_loses_nothing(lab, sshd):
    """Nobody says that the line is cut: neither end gets a byte."""
    lab.writer.write(20)
    lab.backup("full")
    lab.writer.write(5)
    shut_down(lab)
    silent = {"KILL_AT": "blockdev-reopen", "KILL_WHEN": "after", "ACTION": "silence"}
    done = lab.cli.call("incremental", "web", entry=interrupted_cli.ENTRY, SSHD_PID=str(sshd.pid), **silent)
    assert done.returncode in (1, 3), done.stderr
    for one in sshd.sessions():
        os.kill(one, signal.SIGCONT)
    sshd.await_end(90)
    assert daemons_of(lab) == []
    report = offline(lab, "incremental")
    assert not any(disk["scanned"] for disk in report["disks"])


def test_a_vm_that_is_off_there_is_skipped_if_that_is_asked_for(lab):
    shut_down(lab)
    assert "so it was skipped" in lab.cli.run("full", "web", "--if-running").stderr
    assert not lab.cli.repository.exists()
