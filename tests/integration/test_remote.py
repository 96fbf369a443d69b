# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM on another host, reached by ssh: an sshd on the loopback with keys of its own."""

import json
import os
import signal
import time

import pytest

from fixtures.sshd import Sshd
from fixtures.storage_daemon import StorageDaemon
from tests import interrupted_cli

pytestmark = pytest.mark.simulator_too


@pytest.fixture
def remote_lab(any_build, make_lab, sshd):
    """A lab whose command line reaches its machine by ssh, and that has a first point."""
    lab = make_lab(any_build, {"vda": 4 << 20, "vdb": (2 << 20) + 512})
    over_ssh(lab, sshd)
    lab.writer.write(10)
    lab.backup("full", "--freeze", "require")
    lab.writer.write(5)
    return lab


def over_ssh(lab, sshd: Sshd) -> None:
    """Have the lab's command line reach its machine by ssh."""
    lab.cli.environment.update(sshd.environment)
    machine = lab.machine
    lab.cli.vm = ["--qmp", sshd.address(machine.qmp_path), "--agent", sshd.address(machine.agent_path)]


def interrupted(lab, sshd: Sshd, at: str, **environment: str):
    """Run an incremental that is interrupted at a step; return how it ended."""
    environment |= {"KILL_AT": at, "SSHD_PID": str(sshd.pid)}
    return lab.cli.call(
        "incremental", "web", "--freeze", "require", entry=interrupted_cli.ENTRY, **environment
    )


def test_full_and_incremental_over_ssh_equal_their_moments_while_the_guest_writes(remote_lab, sshd):
    lab = remote_lab
    lab.writer.start()
    report = lab.backup("incremental", "--freeze", "require", "--limit", "4M")
    lab.writer.stop()
    assert lab.writer.count > 100, "the writes were to go on during the copy"
    assert report["consistency"] == "filesystem", report
    assert {disk["kind"] for disk in report["disks"]} == {"incremental"}
    lab.assert_point(report["point"], lab.writer.moment)
    lab.assert_at_rest()
    sshd.await_end()


def test_files_of_the_other_host_are_stored_and_one_that_is_missing_fails_the_run(remote_lab, sshd, tmp_path):
    lab = remote_lab
    content = os.urandom(3 << 20)  # fetched in several parts
    (tmp_path / "web conf").write_bytes(content)
    (tmp_path / "link").symlink_to("web conf")
    for wrong in ("missing", "link"):
        error = lab.backup("incremental", "--include-file", str(tmp_path / wrong), code=2)["error"]
        assert error["message"].startswith("on vmhost: cannot open"), error
    point = lab.backup("incremental", "--include-file", str(tmp_path / "web conf"))["point"]
    directory = lab.cli.repository / "web" / point / "definition"
    assert (directory / "included-1-web-conf").read_bytes() == content
    if not lab.machine.build.simulated:
        told = json.loads((directory / "qemu.json").read_text())
        assert told["command_line"][0] == lab.machine.build.system[0]
    lab.assert_at_rest()
    sshd.await_end()


def test_a_line_that_is_cut_while_the_guest_is_frozen_thaws_it(remote_lab, sshd):
    done = interrupted(remote_lab, sshd, "transaction", ACTION="cut")
    assert done.returncode == 1, done.stderr
    assert not interrupted_cli.BUG.search(done.stderr), done.stderr
    assert "rolled back" in done.stderr
    remote_lab.assert_at_rest()
    remote_lab.next_is_right()
    sshd.await_end()


def test_a_run_that_is_killed_after_its_copy_leaves_no_export_or_job_on_the_other_host(remote_lab, sshd):
    done = interrupted(remote_lab, sshd, "block-export-del")
    assert done.returncode == -signal.SIGKILL
    sshd.await_end()
    left = remote_lab.machine.leftovers()
    assert not [one for one in left if "exp" in one or "job" in one], left
    assert not remote_lab.agent.frozen
    remote_lab.next_is_right()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda sshd: sshd.know("stranger"), "ost key"),
        (lambda sshd: sshd.write_client("stranger"), "Permission denied"),
        (lambda sshd: sshd.write_client("user", "Port 1"), "cannot connect"),
    ],
    ids=["another host key", "an unknown user key", "nobody listens"],
)
def test_a_host_that_can_not_be_trusted_or_reached_is_told_before_anything_is_touched(
    any_build, make_lab, sshd, change, said
):
    lab = make_lab(any_build, {"vda": 1 << 20})
    over_ssh(lab, sshd)
    change(sshd)
    error = lab.backup("full", code=1)["error"]
    assert error["kind"] == "MonitorUnreachable"
    assert "cannot connect to vmhost by ssh" in error["message"]
    assert said in error["message"]
    assert error["hint"]
    assert not lab.cli.repository.exists()


def test_a_host_without_python_is_told_before_anything_is_touched(any_build, make_lab, sshd):
    lab = make_lab(any_build, {"vda": 1 << 20})
    sshd.close()
    sshd.start("SetEnv PATH=/nowhere")
    over_ssh(lab, sshd)
    error = lab.backup("full", code=1)["error"]
    assert "no python3 of version 3.11" in error["message"]
    assert not lab.cli.repository.exists()


def test_a_monitor_that_is_not_there_is_told_by_its_address(any_build, make_lab, sshd):
    lab = make_lab(any_build, {"vda": 1 << 20})
    over_ssh(lab, sshd)
    lab.cli.vm[1] += "-missing"
    error = lab.backup("full", code=1)["error"]
    assert error["kind"] == "MonitorUnreachable"
    assert error["message"] == f"no QEMU monitor at {lab.cli.vm[1]}: No such file or directory"
    assert not lab.cli.repository.exists()


def test_status_does_not_fail_while_a_run_has_the_host(remote_lab, sshd):
    run = remote_lab.cli.start("incremental", "web", "--limit", "1M")
    deadline = time.monotonic() + 60
    while not sshd.sessions() and time.monotonic() < deadline:
        time.sleep(0.05)
    seen = remote_lab.cli.json("status", "web", "--command-timeout", "1")
    assert run.wait(60) == 0
    assert run.communicate()
    assert seen["vm"] == "web"


def test_doctor_and_status_tell_of_the_host(remote_lab, sshd):
    findings = remote_lab.cli.json("doctor", "web")["findings"]
    (of_ssh,) = [one for one in findings if one["subject"] == "ssh"]
    assert of_ssh["verdict"] == "ok"
    assert "vmhost: connected" in of_ssh["said"]
    assert not [one for one in findings if one["verdict"] == "bad"], findings
    assert not remote_lab.cli.json("status", "web")["leftovers"]
    missing = remote_lab.directory / "missing"
    remote_lab.cli.scratch.rmdir()
    remote_lab.cli.scratch = missing
    findings = remote_lab.cli.json("doctor", "web", code=1)["findings"]
    assert [one for one in findings if one["subject"] == "scratch" and one["verdict"] == "bad"]
    sshd.await_end()


@pytest.mark.needs_qemu("the simulator takes descriptors")
def test_a_daemon_that_takes_no_descriptors_has_named_files_there_that_the_next_run_sweeps(
    oldest_build, make_lab, sshd
):
    lab = make_lab(oldest_build, {"vda": 1 << 20}, kind_of_machine=StorageDaemon)
    over_ssh(lab, sshd)
    lab.cli.vm = lab.cli.vm[:2]
    lab.writer.write(5)
    lab.backup("full")
    lab.writer.write(5)
    environment = {"KILL_AT": "transaction"}
    died = lab.cli.call("incremental", "web", entry=interrupted_cli.ENTRY, **environment)
    assert died.returncode == -signal.SIGKILL
    sshd.await_end()
    (left,) = lab.cli.scratch.iterdir()
    assert left.stat().st_mode & 0o777 == 0o700
    assert [one.name.endswith(".qcow2") for one in left.iterdir()] == [True]
    assert f"scratch directory {left}" in lab.cli.json("status", "web")["leftovers"]
    lab.next_is_right()


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_line_that_falls_silent_ends_the_run_here_and_its_work_there(remote_lab, sshd):
    """Nobody says that the line is cut: neither end gets a byte."""
    lab = remote_lab
    lab.writer.write(50)
    begun = time.monotonic()
    done = interrupted(lab, sshd, "transaction", ACTION="silence", KILL_WHEN="after")
    assert done.returncode in (1, 3), done.stderr
    assert time.monotonic() - begun < 150
    for one in sshd.sessions():
        os.kill(one, signal.SIGCONT)
    sshd.await_end(90)
    assert not lab.agent.frozen
    lab.next_is_right()
