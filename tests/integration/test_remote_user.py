# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM on another host, where a user logs in who is not root and has no rights but those to its own files."""

import os
import signal
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from fixtures.libvirtd import Libvirtd
from fixtures.sshd import Account, Sshd
from tests import interrupted_cli
from tests.conftest import MIB, Lab
from tests.integration import test_libvirt_remote as libvirt_remote
from tests.integration.conftest import started_sshd
from tests.integration.test_offline_remote import images, offline, over_ssh, shut_down
from tests.libvirt_lab import Make, kinds, maker
from tests.off_images import await_copy, daemons_of

pytestmark = [
    pytest.mark.needs_qemu("a VM that is off has no simulator"),
    pytest.mark.skipif(os.geteuid() != 0, reason="an sshd that knows another user takes root"),
]

NOBODY = Account("nobody", 65_534)
"""A user whom libvirtd knows as well."""
LIBVIRTD = {"small": True}
SIZES = {"vda": 4 << 20, "vdb": (2 << 20) + 512}


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A directory that the user may enter. Every start of pytest closes those that pytest makes."""
    with tempfile.TemporaryDirectory(prefix="user-") as made:
        Path(made).chmod(0o711)
        yield Path(made)


@pytest.fixture
def lab(oldest_build, make_lab, account_sshd):
    """A machine of two disks that runs as that user, and a command line that reaches it as that user."""
    user = str(account_sshd.account.number)
    made = over_ssh(make_lab(oldest_build, SIZES, user=user, open_to_user=True), account_sshd)
    give(made, account_sshd.account.number, account_sshd.account.number, 0o600)
    made.writer.write(20)
    return made


def give(lab: Lab, user: int, group: int, mode: int) -> None:
    for disk in lab.machine.disks:
        os.chown(disk.path, user, group)
        disk.path.chmod(mode)


def files_of(user: int) -> list[Path]:
    """Return what backupctl made for the user in the directory for temporary files of every session."""
    made = (one for one in Path("/tmp").iterdir() if one.name.startswith(("bctl-", "backupctl-")))
    found = []
    for one in made:
        with suppress(FileNotFoundError):  # of another test, which has ended
            if one.lstat().st_uid == user:
                found.append(one)
    return found


def refused(lab: Lab, command: str = "full") -> tuple[str, str]:
    """Run a command that must change nothing; return what it says is wrong, and what to do."""
    before = {disk.path: disk.path.read_bytes() for disk in lab.machine.disks}
    error = lab.cli.json(command, "web", code=1)["error"]
    assert error["state"] == "nothing was touched"
    assert before == {path: path.read_bytes() for path in before}
    return error["message"], error["hint"]


def bad_findings(lab: Lab) -> list[tuple[str, str]]:
    found = lab.cli.json("doctor", "web", code=1)["findings"]
    return [(one["said"], one["advice"]) for one in found if one["verdict"] == "bad"]


def test_a_chain_goes_on_in_images_of_the_users_own_and_nothing_is_left_there(lab, account_sshd):
    user = account_sshd.account.number
    shut_down(lab)
    full = offline(lab, "full")
    lab.machine.start()
    lab.writer.write(5)
    shut_down(lab)
    report = offline(lab, "incremental")
    assert report["parent"] == full["point"]
    assert not any(disk["scanned"] for disk in report["disks"])
    account_sshd.await_end()
    assert files_of(user) == []


def test_what_a_run_makes_there_is_closed_to_other_users(lab, account_sshd):
    shut_down(lab)
    run = lab.cli.start("full", "web", "--limit", "200K")
    (daemon,) = await_copy(lab, run)
    user = account_sshd.account.number
    status = Path(f"/proc/{daemon}/status").read_text()
    assert f"Uid:\t{user}\t{user}" in status
    assert "Umask:\t0077" in status
    made = files_of(user)
    assert len(made) == 3  # for what ssh forwards, for the daemon, for locks
    for one in made:
        assert stat.S_IMODE(one.stat().st_mode) == 0o700
        assert all(stat.S_IMODE(inner.lstat().st_mode) & 0o077 == 0 for inner in one.iterdir()), one
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    account_sshd.await_end()
    assert files_of(user) == []
    assert daemons_of(lab) == []


@pytest.mark.parametrize("at", ["blockdev-reopen", "transaction"])
def test_a_run_that_is_killed_is_undone_by_the_next_and_loses_no_bitmap(lab, account_sshd, at):
    shut_down(lab)
    offline(lab, "full")
    lab.machine.start()
    lab.writer.write(5)
    shut_down(lab)
    died = lab.cli.call("incremental", "web", entry=interrupted_cli.ENTRY, KILL_AT=at, KILL_WHEN="after")
    assert died.returncode == -signal.SIGKILL, died.stderr
    report = offline(lab, "incremental")
    assert not any(disk["scanned"] for disk in report["disks"])
    account_sshd.await_end()
    assert files_of(account_sshd.account.number) == []


def test_an_image_that_the_user_may_not_write_to_is_refused_and_doctor_says_so(lab, account_sshd):
    shut_down(lab)
    give(lab, 0, account_sshd.account.number, 0o640)
    path = lab.machine.disks[0].path
    message, hint = refused(lab)
    assert message.startswith(f"on vmhost: cannot write to {path}: Permission denied")
    assert hint == f"user keeper may not write to it; its owner may run: setfacl -m u:keeper:rw {path}"
    assert not lab.cli.repository.exists()
    assert bad_findings(lab) == [(message, hint)]


def test_a_run_that_was_killed_waits_for_the_right_to_write_to_its_images(lab, account_sshd):
    shut_down(lab)
    died = lab.cli.call("full", "web", entry=interrupted_cli.ENTRY, KILL_AT="transaction", KILL_WHEN="after")
    assert died.returncode == -signal.SIGKILL, died.stderr
    account_sshd.await_end()
    give(lab, 0, account_sshd.account.number, 0o640)
    error = lab.cli.json("recover", "web", code=3)["error"]
    assert error["message"].startswith(f"on vmhost: cannot write to {lab.machine.disks[0].path}: Permission")
    assert "setfacl -m u:keeper:rw" in error["hint"]
    give(lab, account_sshd.account.number, 0, 0o600)
    lab.cli.json("recover", "web")
    offline(lab, "full")


def test_an_image_or_a_directory_that_is_closed_to_the_user_is_named_with_the_right_that_is_missing(
    lab, account_sshd
):
    shut_down(lab)
    give(lab, 0, 0, 0o600)
    path = lab.machine.disks[0].path
    message, hint = refused(lab)
    assert message == f"on vmhost: cannot open {path}: Permission denied"
    assert hint == f"user keeper may not write to it; its owner may run: setfacl -m u:keeper:rw {path}"
    closed = lab.directory / "closed there"
    closed.mkdir(mode=0o700)
    lab.cli.vm = ["--image", f"vda={account_sshd.address(closed / 'below' / 'vda.qcow2')}"]
    message, hint = refused(lab)
    assert message == f"on vmhost: cannot open {closed}/below/vda.qcow2: Permission denied"
    assert hint == f"user keeper may not enter {closed}; its owner may run: setfacl -m u:keeper:x '{closed}'"
    assert bad_findings(lab) == [(message, hint)]


def test_images_of_another_user_that_a_group_may_write_to_are_backed_up_as_they_are(lab, account_sshd):
    shut_down(lab)
    give(lab, 0, account_sshd.account.group, 0o660)
    offline(lab, "full")
    report = offline(lab, "incremental")
    assert not any(disk["scanned"] for disk in report["disks"])
    for disk in lab.machine.disks:
        found = disk.path.stat()
        assert (found.st_uid, found.st_gid) == (0, account_sshd.account.group)
        assert stat.S_IMODE(found.st_mode) == 0o660


def test_an_image_that_the_qemu_of_another_user_has_open_is_refused(lab, account_sshd):
    shut_down(lab)
    lab.machine.user = ""
    lab.machine.start()
    lab.cli.vm = images(lab, account_sshd)
    message, hint = refused(lab)
    assert (
        message
        == f"on vmhost: {lab.machine.disks[0].path} is in use by another process, perhaps the VM itself"
    )
    assert "through its monitor" in hint
    assert not lab.cli.repository.exists()


def test_of_root_and_the_user_one_at_a_time_backs_up_the_images(lab, account_sshd):
    shut_down(lab)
    as_user, first = lab.cli.vm, lab.cli.repository
    run = lab.cli.start("full", "web", "--json", "--limit", "150K")
    await_copy(lab, run)
    lab.cli.vm = [one.replace("ssh://", "ssh://root@") for one in as_user]
    lab.cli.repository = lab.directory / "other"
    error = lab.cli.json("full", "web", code=75)["error"]
    assert error["message"].startswith(
        f"on root@vmhost: another backup of {lab.machine.disks[0].path} is under"
    )
    assert (error["kind"], error["state"]) == ("Locked", "nothing was touched")
    assert not list(lab.cli.repository.glob("web/*/vda.qcow2"))
    _, words = run.communicate(timeout=60)
    assert run.returncode == 0, words
    offline(lab, "full")
    lab.cli.vm, lab.cli.repository = as_user, first
    report = offline(lab, "incremental")
    assert not any(disk["scanned"] for disk in report["disks"])


def test_a_vm_that_runs_as_the_user_is_backed_up_through_its_monitor(lab, account_sshd: Sshd):
    agent = ["--agent", account_sshd.address(lab.machine.agent_path)]
    lab.machine.agent_path.chmod(0o777)
    os.chown(lab.cli.scratch, account_sshd.account.number, -1)
    lab.cli.vm += agent
    lab.assert_points_under_writes("full", "incremental")
    account_sshd.await_end()
    assert files_of(account_sshd.account.number) == []


def test_a_monitor_that_the_user_may_not_connect_to_is_told_with_whom_to_log_in(lab, account_sshd):
    lab.machine.directory.chmod(0o700)
    error = lab.cli.json("full", "web", code=1)["error"]
    assert error["message"].endswith("/qmp: Permission denied")
    assert error["hint"].startswith("ssh logs in a user who may not connect to it")


def test_root_is_told_to_leave_images_in_a_users_directory_to_that_user(lab, account_sshd):
    shut_down(lab)
    home = account_sshd.directory / "home"
    image = home / "vda.qcow2"
    lab.machine.disks[0].path.rename(image)
    lab.cli.vm = ["--image", f"vda=ssh://root@vmhost{image}"]
    error = lab.cli.json("full", "web", code=1)["error"]
    assert f"the directory {home} belongs to user {account_sshd.account.number}" in error["message"]
    assert error["hint"].endswith("or back it up as its owner")
    lab.cli.vm = ["--image", f"vda={account_sshd.address(image)}"]
    lab.backup("full")


def test_a_user_who_may_use_libvirt_backs_up_a_domain_that_is_off(
    daemon: Libvirtd, tmp_path: Path, held: ExitStack, request: pytest.FixtureRequest
) -> None:
    make: Make = maker(daemon, tmp_path, held, request.node.nodeid)
    lab = libvirt_remote.over_ssh(make({"vda": 4 * MIB}), started_sshd(tmp_path, held, NOBODY))
    lab.writer.write(10)
    libvirt_remote.shut_down(lab)
    error = lab.cli.json("full", "web", code=1)["error"]
    assert error["message"] == "no libvirt answers on vmhost: Permission denied"
    assert "a member of the group libvirt may" in error["hint"]
    daemon.directory.chmod(0o711)
    image = tmp_path / "vda.qcow2"
    error = lab.cli.json("full", "web", code=1)["error"]
    assert error["message"].startswith(f"on vmhost: cannot write to {image}: Permission denied")
    os.chown(image, NOBODY.number, NOBODY.number)
    error = lab.cli.json("full", "web", code=1)["error"]
    assert (
        error["message"]
        == f"on vmhost: cannot read the scratch directory {lab.cli.scratch}: Permission denied"
    )
    lab.cli.scratch = tmp_path / "scratch"
    lab.cli.scratch.mkdir(mode=0o755)
    lab.backup("full")
    report = lab.backup("incremental")
    assert (report["consistency"], set(kinds(report).values())) == ("offline", {"incremental"})
    lab.assert_point(report["point"], lab.writer.moment)
    assert len([one for one in lab.domain.checkpoints() if one.startswith("backupctl-")]) == 1
    assert files_of(NOBODY.number) == []
