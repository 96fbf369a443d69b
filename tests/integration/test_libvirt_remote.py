# SPDX-License-Identifier: GPL-2.0-or-later
"""Domains of a libvirt that is reached by ssh: an sshd on the loopback, a libvirtd of the test's own."""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest

from fixtures.libvirtd import Libvirtd
from fixtures.sshd import HOST, Sshd
from tests import interrupted_cli
from tests.conftest import MIB
from tests.libvirt_lab import Lab, Make, kinds, maker, plain, wait_for

libvirt = pytest.importorskip("libvirt", reason="python3-libvirt is not installed")


LIBVIRTD = {"small": True}


def there(daemon: Libvirtd) -> str:
    return f"qemu+ssh://{HOST}/system?socket={daemon.directory}/sock/libvirt-sock"


def over_ssh(lab: Lab, sshd: Sshd) -> Lab:
    lab.cli.environment.update(sshd.environment)
    lab.cli.vm = ["--libvirt", there(lab.domain.daemon), "--domain", lab.domain.name]
    return lab


@pytest.fixture
def remote_lab(
    daemon: Libvirtd, sshd: Sshd, tmp_path: Path, held: ExitStack, request: pytest.FixtureRequest
) -> Lab:
    """A lab whose command line reaches its domain by ssh, and that has a first point."""
    make: Make = maker(daemon, tmp_path, held, request.node.nodeid)
    lab = over_ssh(make({"vda": 4 * MIB, "vdb": 2 * MIB}), sshd)
    lab.writer.write(10)
    lab.backup("full")
    lab.writer.write(5)
    return lab


def test_full_and_incremental_over_ssh_are_byte_equal(remote_lab: Lab, sshd: Sshd) -> None:
    lab = remote_lab
    lab.writer.remember()
    report = lab.backup("incremental")
    assert set(kinds(report).values()) == {"incremental"}
    lab.assert_point(report["point"], lab.writer.moment)
    lab.assert_clean()
    lab.next_is_right()
    sshd.await_end()


def test_a_run_killed_in_mid_copy_has_its_job_ended_by_the_guard_there(remote_lab: Lab, sshd: Sshd) -> None:
    lab = remote_lab
    lab.writer.write(20)
    run = lab.cli.start("incremental", "web", "--limit", "200K")
    wait_for(lambda: (lab.cli.repository / "web").glob("*.partial/*.qcow2"), run)
    wait_for(lab.domain.has_job, run)
    run.kill()
    run.communicate()
    wait_for(lambda: not lab.domain.has_job())
    lab.next_is_right()
    sshd.await_end()


def test_a_domain_on_an_iothread_outlives_a_line_that_is_cut_in_mid_copy(
    daemon: Libvirtd, sshd: Sshd, tmp_path: Path, held: ExitStack, request: pytest.FixtureRequest
) -> None:
    """QEMU 7.2 aborts when an NBD client leaves such a disk before its export has gone."""
    lab = over_ssh(
        maker(daemon, tmp_path, held, request.node.nodeid)({"vda": 4 * MIB}, driver="iothread='1'"), sshd
    )
    end_line = {"KILL_AT": "ready", "KILL_WHEN": "after", "ACTION": "cut", "SSHD_PID": str(sshd.pid)}
    lab.cli.call("full", "web", entry=interrupted_cli.ENTRY, **end_line)
    wait_for(lambda: not lab.domain.has_job())
    assert lab.domain.is_running()
    lab.backup("full")
    lab.assert_clean()
    sshd.await_end()


def test_what_is_told_of_a_domain_on_another_host(remote_lab: Lab, daemon: Libvirtd) -> None:
    lab = remote_lab
    findings = {one["subject"]: one["verdict"] for one in lab.cli.json("doctor", "web")["findings"]}
    assert (findings["ssh"], findings["rights"]) == ("ok", "ok")
    assert "bad" not in findings.values()
    assert "Nothing to recover" in lab.cli.run("recover", "web").stdout
    told = plain(lab, "discover", "--libvirt", there(daemon), "--json")
    found = {one["domain"]: one["running"] for one in json.loads(told)["domains"]}
    assert found[lab.domain.name] is True


def shut_down(lab: Lab) -> None:
    """End the guest and its QEMU, as a shutdown does."""
    lab.writer.remember()
    lab.domain.quit()
    wait_for(lambda: not lab.domain.handle().isActive())


def test_a_chain_goes_on_while_the_domain_there_is_off(remote_lab: Lab, sshd: Sshd) -> None:
    lab = remote_lab
    shut_down(lab)
    first = lab.backup("incremental")
    assert first["consistency"] == "offline"
    assert sum(disk["stored_bytes"] for disk in first["disks"]) > 0
    lab.assert_point(first["point"], lab.writer.moment)
    second = lab.backup("incremental")
    assert sum(disk["dirty_bytes"] for disk in second["disks"]) == 0
    assert [set(kinds(one).values()) for one in (first, second)] == [{"incremental"}] * 2
    findings = {one["subject"]: one["verdict"] for one in lab.cli.json("doctor", "web")["findings"]}
    assert (findings["ssh"], findings["image"]) == ("ok", "ok")
    lab.domain.start()
    lab.writer.write(4)
    lab.next_is_right()
    lab.assert_clean()
    sshd.await_end()


def test_a_run_that_is_killed_is_undone_while_the_domain_there_is_off(remote_lab: Lab, sshd: Sshd) -> None:
    lab = remote_lab
    shut_down(lab)
    at = {"KILL_AT": "virDomainCheckpointCreateXML", "KILL_WHEN": "after"}
    lab.cli.call("incremental", "web", entry=interrupted_cli.ENTRY, **at)
    assert any("unfinished" in one for one in lab.cli.json("status", "web")["leftovers"])
    report = lab.backup("incremental")
    assert set(kinds(report).values()) == {"incremental"}
    lab.assert_point(report["point"], lab.writer.moment)
    assert len([one for one in lab.domain.checkpoints() if one.startswith("backupctl-")]) == 1
    sshd.await_end()


def test_a_domain_that_is_off_there_is_skipped_if_that_is_asked_for(remote_lab: Lab) -> None:
    lab = remote_lab
    lab.domain.destroy()
    assert "so it was skipped" in lab.cli.run("incremental", "web", "--if-running").stderr


def test_a_host_without_such_a_libvirt_is_said_so(remote_lab: Lab) -> None:
    lab = remote_lab
    lab.cli.vm[1] = f"qemu+ssh://{HOST}/system?socket=/nonexistent/socket"
    assert "no libvirt answers" in lab.cli.run("incremental", "web", code=1).stderr


def test_a_domain_is_not_defined_on_another_host_with_images_of_this_one(remote_lab: Lab) -> None:
    lab = remote_lab
    words = ("restore", "web", "--to", f"{lab.directory}/new/", "--define", *lab.cli.vm[:2])
    assert "is defined here" in lab.cli.run(*words, code=2, vm=False).stderr
    assert not (lab.directory / "new").exists()
