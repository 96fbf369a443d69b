# SPDX-License-Identifier: GPL-2.0-or-later
"""A Linux guest under libvirt: it is frozen and thawed through libvirt, whatever is killed meanwhile."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fixtures import guest as guests
from fixtures.debian import CannotBeHad
from fixtures.libvirt_guest import Guest
from fixtures.libvirtd import Libvirtd
from fixtures.sshd import HOST, Sshd
from tests import interrupted_cli
from tests.conftest import MIB, ROOT, Cli

libvirt = pytest.importorskip("libvirt", reason="python3-libvirt is not installed")
pytestmark = pytest.mark.guest


LIBVIRTD = {"small": True}


Boot = Callable[..., tuple[Guest, Cli]]


@pytest.fixture
def boot(daemon: Libvirtd, tmp_path: Path, held: ExitStack) -> Boot:
    def boot(*, used: bool = False) -> tuple[Guest, Cli]:
        path = tmp_path / "vda.qcow2"
        guests.make_disk(path, 64 * MIB, "qemu-img", used=used)
        try:
            guest = Guest(daemon, path)
        except CannotBeHad as err:
            pytest.skip(str(err))
        held.callback(guest.close)
        guest.start()
        scratch = Path(tempfile.mkdtemp(prefix="s-", dir=daemon.directory))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
        return guest, Cli(tmp_path / "repository", environment, scratch, guest.arguments)

    return boot


def wait_for(what: Callable[[], Any], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_thawed(guest: Guest) -> bool:
    import libvirt_qemu  # noqa: PLC0415 - the module is skipped without it

    try:
        status = libvirt_qemu.qemuAgentCommand(guest.handle(), '{"execute":"guest-fsfreeze-status"}', 5, 0)
    except libvirt.libvirtError:
        return False
    return "thawed" in str(status)


def check_point(cli: Cli, point: str, directory: Path) -> None:
    """A frozen file system is clean as it is, and holds what the guest had written."""
    raw = directory / f"{point}.raw"
    raw.write_bytes(cli.raw(point, "vda", directory))
    guests.check_file_system(raw)
    guests.check_journal(raw, directory)


def test_a_guest_is_frozen_through_libvirt(boot: Boot, tmp_path: Path) -> None:
    guest, cli = boot()
    guest.tell("load")
    reports = [cli.json(kind, "web", "--freeze", "require") for kind in ("full", "incremental")]
    assert guest.tell("stop") == "ok"
    for report in reports:
        assert 0 < report["frozen_ms"] < 10_000
        check_point(cli, report["point"], tmp_path)
    assert "errors=0" in guest.tell("status")
    assert is_thawed(guest)
    findings = {one["subject"]: one["verdict"] for one in cli.json("doctor", "web")["findings"]}
    assert findings["agent"] == "ok"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_killed_while_the_guest_is_frozen_has_it_thawed_and_its_job_ended(
    boot: Boot, tmp_path: Path, when: str
) -> None:
    guest, cli = boot()
    guest.tell("load")
    died = cli.call(
        *("full", "web", "--freeze", "require"),
        entry=interrupted_cli.ENTRY,
        KILL_AT="virDomainBackupBegin",
        KILL_WHEN=when,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    wait_for(lambda: is_thawed(guest) and not guest.has_job())
    report = cli.json("full", "web", "--freeze", "require")
    assert guest.tell("stop") == "ok"
    check_point(cli, report["point"], tmp_path)
    assert "errors=0" in guest.tell("status")


def test_a_libvirtd_killed_while_the_guest_is_frozen_has_it_thawed_when_it_is_back(
    boot: Boot, daemon: Libvirtd, tmp_path: Path
) -> None:
    guest, cli = boot()
    guest.tell("load")
    around = {"ACTION": "crash", "VM_PID": str(daemon.daemon_process())}
    call = "virDomainBackupBegin"
    done = cli.call(
        *("full", "web", "--freeze", "require"),
        entry=interrupted_cli.ENTRY,
        KILL_AT=call,
        KILL_WHEN="after",
        **around,
    )
    assert done.returncode in (0, 1, 3), done.stderr
    daemon.come_again()
    wait_for(lambda: is_thawed(guest) and not guest.has_job())
    report = cli.json("full", "web", "--freeze", "require")
    assert guest.tell("stop") == "ok"
    check_point(cli, report["point"], tmp_path)
    assert "errors=0" in guest.tell("status")


def test_a_qemu_that_hangs_while_the_backup_begins_is_given_up_and_found_again(
    boot: Boot, daemon: Libvirtd, tmp_path: Path
) -> None:
    """libvirt has no time-out: the backup begins when QEMU goes on, and nobody waits for it any more."""
    guest, cli = boot()
    guest.tell("load")
    qemu = daemon.qemu(guest.name)
    around = {"ACTION": "stop", "VM_PID": str(qemu), "KILL_AT": "virDomainBackupBegin"}
    words = ("full", "web", "--freeze", "require", "--freeze-budget", "3", "--command-timeout", "2")
    try:
        failed = cli.call(*words, entry=interrupted_cli.ENTRY, KILL_WHEN="before", **around)
    finally:
        os.kill(qemu, signal.SIGCONT)
    assert failed.returncode in (1, 3), failed.stderr
    assert not interrupted_cli.BUG.search(failed.stderr), failed.stderr
    wait_for(lambda: is_thawed(guest) and not guest.has_job())
    report = cli.json("full", "web", "--freeze", "require")
    assert guest.tell("stop") == "ok"
    check_point(cli, report["point"], tmp_path)
    assert len(guest.checkpoints()) == 1
    assert "errors=0" in guest.tell("status")


def test_a_line_that_is_cut_while_the_guest_is_frozen_has_it_thawed_on_its_own_host(
    boot: Boot, tmp_path: Path, held: ExitStack
) -> None:
    guest, cli = boot()
    try:
        sshd = Sshd(tmp_path / "sshd")
    except CannotBeHad as err:
        pytest.skip(str(err))
    held.callback(sshd.close)
    sshd.start()
    cli.environment.update(sshd.environment)
    there = f"qemu+ssh://{HOST}/system?socket={guest.daemon.directory}/sock/libvirt-sock"
    cli.vm = ["--libvirt", there, "--domain", guest.name]
    guest.tell("load")
    around = {"ACTION": "cut", "SSHD_PID": str(sshd.pid), "KILL_AT": "virDomainBackupBegin"}
    words = ("full", "web", "--freeze", "require")
    done = cli.call(*words, entry=interrupted_cli.ENTRY, KILL_WHEN="after", **around)
    assert done.returncode in (0, 1, 3), done.stderr
    wait_for(lambda: is_thawed(guest) and not guest.has_job())
    report = cli.json(*words)
    assert 0 < report["frozen_ms"] < 10_000
    assert guest.tell("stop") == "ok"
    check_point(cli, report["point"], tmp_path)
    assert "errors=0" in guest.tell("status")
    findings = {one["subject"]: one["verdict"] for one in cli.json("doctor", "web")["findings"]}
    assert (findings["agent"], findings["ssh"]) == ("ok", "ok")


@pytest.mark.parametrize("killed", [False, True])
def test_a_guest_that_a_full_scratch_file_paused_goes_on_and_none_of_its_writes_fails(
    boot: Boot, daemon: Libvirtd, *, killed: bool
) -> None:
    guest, cli = boot(used=True)
    cli.scratch = daemon.directory / "small"
    # In the daemon's mounts, but with the test's own /proc. A chroot that the tests run in has its own root.
    inside = ["nsenter", "-t", str(daemon.daemon_process()), "-m", "-r", "-w"]
    # What a run that was killed before left there, of another VM.
    subprocess.run([*inside, "find", cli.scratch, "-mindepth", "1", "-delete"], check=True)
    inside += ["unshare", "-m", "sh", "-c"]
    inside += ['mount -t proc proc /proc && exec "$@"', "sh"]
    program = [sys.executable, "-m", "tests.small_scratch"]
    words = cli.arguments("full", "web", "--freeze", "never", "--limit", "1M")
    run = subprocess.Popen(
        [*inside, *program, *words], env=cli.environment, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: guest.has_job() or run.poll() is not None)
        assert run.poll() is None, run.communicate()[1]
        if killed:
            run.send_signal(signal.SIGSTOP)  # it must not see the guest paused
        assert guest.control is not None
        guest.control.write("flood 48\n")  # it may be paused before it answers
        guest.control.flush()
        if killed:
            wait_for(lambda: guest.handle().state() == [3, 5])
            run.kill()
        _, said = run.communicate(timeout=120)
    finally:
        run.kill()
    if not killed:
        assert run.returncode == 1, said
        # On a busy machine the run may look at the file system first, which is as full.
        assert "paused the guest" in said or "is filling up (0 MiB left)" in said, said
    wait_for(lambda: guest.is_running() and not guest.has_job())
    assert guest.control.readline().strip() == "ok"
    assert guest.tell("stop") == "ok"
    assert "rw errors=0 kernel=0" in guest.tell("status")
