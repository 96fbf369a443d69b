# SPDX-License-Identifier: GPL-2.0-or-later
"""A libvirt whose QEMUs run as a user of their own, as every distribution has it."""

import os
import pwd
import stat
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from fixtures.libvirtd import Libvirtd
from tests.conftest import MIB
from tests.libvirt_lab import Lab, kinds, maker, wait_for

libvirt = pytest.importorskip("libvirt", reason="python3-libvirt is not installed")

USER, GROUP = "nobody", "nogroup"


LIBVIRTD = {"user": (USER, GROUP)}


@pytest.fixture
def lab(daemon: Libvirtd, held: ExitStack, request: pytest.FixtureRequest) -> Lab:
    """A lab whose images QEMU's user can reach."""
    directory = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="u-", dir=daemon.directory)))
    directory.chmod(0o755)
    made = maker(daemon, directory, held, request.node.nodeid)({"vda": 8 * MIB, "vdb": 2 * MIB})
    made.cli.scratch.chmod(0o711)
    made.writer.write(10)
    made.backup("full")
    made.writer.write(5)
    return made


def test_a_qemu_of_another_user_is_backed_up_on_and_off(lab: Lab) -> None:
    qemu = lab.domain.daemon.qemu(lab.domain.name)
    assert Path(f"/proc/{qemu}").stat().st_uid == pwd.getpwnam(USER).pw_uid
    lab.next_is_right()
    lab.writer.remember()
    lab.domain.quit()
    wait_for(lambda: not lab.domain.handle().isActive())
    owners = [Path(disk["path"]).stat().st_uid for disk in lab.domain.disks]
    report = lab.backup("incremental")
    assert set(kinds(report).values()) == {"incremental"}
    lab.assert_point(report["point"], lab.writer.moment)
    assert [Path(disk["path"]).stat().st_uid for disk in lab.domain.disks] == owners
    lab.domain.start()
    lab.next_is_right()


def test_nobody_but_qemu_and_root_can_reach_the_files_of_a_run(lab: Lab) -> None:
    user = pwd.getpwnam(USER).pw_uid
    lab.writer.write(20)
    run = lab.cli.start("incremental", "web", "--limit", "200K")
    wait_for(lambda: list((lab.cli.repository / "web").glob("*.partial/*.qcow2")), run)
    try:
        (directory,) = lab.cli.scratch.iterdir()
        assert (stat.S_IMODE(directory.stat().st_mode), directory.stat().st_uid) == (0o710, os.geteuid())
        assert stat.S_IMODE((directory / "nbd").stat().st_mode) == 0o700
        scratch = sorted(directory.glob("*.qcow2"))
        assert {(stat.S_IMODE(one.stat().st_mode), one.stat().st_uid) for one in scratch} == {(0o600, user)}
    finally:
        run.kill()
        run.communicate()
    lab.next_is_right()


def test_a_scratch_directory_that_qemu_cannot_enter_is_refused_with_advice(lab: Lab) -> None:
    lab.cli.scratch.chmod(0o700)
    error = lab.cli.json("incremental", "web", code=1)["error"]
    assert "who may not enter" in error["message"]
    (rights,) = [
        one for one in lab.cli.json("doctor", "web", code=1)["findings"] if one["subject"] == "rights"
    ]
    assert rights["verdict"] == "bad"
    lab.cli.scratch.chmod(0o711)
    lab.next_is_right()
