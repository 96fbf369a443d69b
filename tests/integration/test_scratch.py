# SPDX-License-Identifier: GPL-2.0-or-later
"""A scratch file that is far too small costs the backup, never one write of the guest."""

import os
import signal
import subprocess
import time

import pytest

from fixtures import guest as guests
from tests.conftest import MIB, get_build
from tests.integration.test_guest import assert_unharmed

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which takes root"),
]
DISK_BYTES = 1024 * MIB
FLOOD = "flood 768"
"""Much more than a small scratch takes, at several hundred MiB a second."""
SMALL = {False: "512M", True: "1024M"}
"""The least that is accepted for such a disk: without and with an iothread under 7.2."""
QUICK = [("7.2", "fleecing", False), ("newest", "fleecing", True), ("newest", "snapshot-access", True)]
VIEWS = [
    *QUICK,
    ("7.2", "fleecing", True),
    ("newest", "fleecing", False),
    ("newest", "snapshot-access", False),
]


def view_id(case: tuple[str, str, bool]) -> str:
    version, view, iothread = case
    return f"{version}-{view}{'-iothread' if iothread else ''}"


@pytest.fixture
def small(tmp_path, held):
    """Mount a tmpfs of so many MiB; returns its directory."""

    def mount(size_mib: int):
        directory = tmp_path / "small"
        directory.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", directory], check=False, timeout=30
        )
        if done.returncode:
            pytest.skip("no file system can be mounted here")
        held.callback(subprocess.run, ["umount", "-l", directory], check=True, timeout=30)
        return directory

    return mount


def cases(chosen: list[tuple[str, str, bool]], quick: int) -> list[object]:
    """Return parameters, of which but the first ones are for `make test-long`."""
    slow = pytest.mark.slow
    return [
        pytest.param(case, id=view_id(case), marks=() if number < quick else slow)
        for number, case in enumerate(chosen)
    ]


def small_size(version: str, *, iothread: bool) -> str:
    return SMALL[iothread and version == "7.2"]


def await_export(guest, run) -> None:
    deadline = time.monotonic() + 60
    while not guest.qmp("query-block-exports"):
        assert time.monotonic() < deadline
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)


def words(text: str) -> str:
    return " ".join(text.split())


def assert_point_is_the_paused_disk(guest, cli, tmp_path) -> None:
    """The next incremental, of the paused guest, is its disk byte for byte, and the file system is clean."""
    assert guest.tell("freeze") == "ok"
    guest.qmp("stop")
    report = cli.json("incremental", "web", "--freeze", "never")
    assert {disk["kind"] for disk in report["disks"]} == {"incremental"}
    assert not any(disk["scanned"] for disk in report["disks"])
    raw = tmp_path / "point.raw"
    cli.run("restore", "web", report["point"], "--to", str(raw), vm=False)
    compare = [guest.build.tool("qemu-img"), "compare", "-U", "-f", "raw", "-F", "qcow2"]
    done = subprocess.run(
        [*compare, raw, guest.disks[0].path], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    guests.check_file_system(raw)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("case", cases(VIEWS, 3))
def test_a_scratch_that_is_far_too_small_costs_the_backup_and_no_write(case, boot, small, tmp_path):
    version, view, iothread = case
    guest, cli = boot(get_build(version), DISK_BYTES, used=True, iothread=iothread)
    size = small_size(version, iothread=iothread)
    large, cli.scratch = cli.scratch, small(int(size[:-1]) + 8)
    cli.run("full", "web", "--scratch-size", size)
    with cli.start("full", "web", "--limit", "4M", "--view", view, "--scratch-size", size) as run:
        await_export(guest, run)
        begun = time.monotonic()
        assert guest.tell(FLOOD) == "ok"
        _, told = run.communicate(timeout=90)
    assert run.returncode == 1, told
    why = "gave up before the guest's own writes could fail" if view == "fleecing" else "NBD server answered"
    assert why in words(told)
    assert "rolled back" in told
    assert guest.leftovers() == []
    print(f"QEMU {version}, {view}: given up {time.monotonic() - begun:.2f} s after the flood began")
    assert guest.tell("stop") == "ok"
    assert_unharmed(guest)
    cli.scratch = large
    assert_point_is_the_paused_disk(guest, cli, tmp_path)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("case", cases([case for case in VIEWS if case[1] == "fleecing"], 1))
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_run_that_can_look_no_more_does_no_harm(case, number, boot, small):
    """Killed, the guard ends its job; stopped, the guard kills it as soon as the scratch file fills up."""
    version, view, iothread = case
    guest, cli = boot(get_build(version), DISK_BYTES, used=True, iothread=iothread)
    size = small_size(version, iothread=iothread)
    cli.scratch = small(int(size[:-1]) + 8)
    with cli.start("full", "web", "--limit", "4M", "--view", view, "--scratch-size", size) as run:
        await_export(guest, run)
        time.sleep(0.3)
        assert guest.tell(FLOOD) == "ok"
        run.send_signal(number)
        run.communicate(timeout=60)
    assert run.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while guest.qmp("query-jobs"):
        assert time.monotonic() < deadline, "the guard was to end the job"
        time.sleep(0.05)
    time.sleep(0.5)
    assert guest.tell("stop") == "ok"
    assert_unharmed(guest)
    cli.run("recover", "web")
    assert guest.leftovers() == []


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("case", VIEWS, ids=view_id)
def test_no_scratch_size_fails_a_write_under_a_flood_that_never_ends(case, boot, small, tmp_path):
    version, view, iothread = case
    guest, cli = boot(get_build(version), DISK_BYTES, used=True, iothread=iothread)
    cli.scratch = small(100)
    assert guest.tell(FLOOD) == "ok"
    codes = {}
    for size in ("16M", "256M", "511M", "512M", "600M", "768M", "1024M", "1100M"):
        room = f"remount,size={int(size[:-1]) + 8}m"
        subprocess.run(["mount", "-o", room, cli.scratch], check=True, timeout=30)
        done = subprocess.run(
            cli.command("full", "web", "--view", view, "--limit", "60M", "--scratch-size", size),
            env=cli.environment,
            cwd=cli.environment["PYTHONPATH"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        codes[size] = done.returncode
        said = words(done.stderr)
        assert done.returncode in (0, 1), said
        if done.returncode:
            assert "must be set aside" in said or "rolled back" in said, said
        assert guest.leftovers() == []
    assert guest.tell("stop") == "ok"
    assert_unharmed(guest)
    assert codes["1100M"] == 0, "as large as the whole disk: it can't be used up"
    assert sum(codes.values()) >= 5
    assert_point_is_the_paused_disk(guest, cli, tmp_path)
    print(f"QEMU {version}, {view}: {codes}")
