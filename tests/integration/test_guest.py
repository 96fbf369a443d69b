# SPDX-License-Identifier: GPL-2.0-or-later
"""A real Linux guest with a real agent, its file system under write load."""

import time
from pathlib import Path

import pytest

from fixtures import guest as guests
from fixtures.guest import Guest
from fixtures.proxy import Proxy
from tests.conftest import Cli, get_build

pytestmark = pytest.mark.guest


def assert_restored(cli: Cli, point: str, directory: Path) -> int:
    """The restored file system is clean and its files are what the guest's journal says."""
    raw = directory / f"{point}.raw"
    cli.run("restore", "web", point, "--to", str(raw), vm=False)
    guests.check_file_system(raw)
    lines = guests.check_journal(raw, directory)
    raw.unlink()
    return lines


def assert_unharmed(guest: Guest) -> int:
    """QEMU lives, the file system is writable, not one write failed; returns how many files were written."""
    assert guest.alive(), guest.complaints()
    status = guest.tell("status")
    mode, errors, kernel, count = status.split()
    assert (mode, errors, kernel) == ("rw", "errors=0", "kernel=0"), status
    return int(count.removeprefix("count="))


@pytest.mark.timeout(300)
def test_a_busy_file_system_is_restored_clean_from_a_full_and_three_incrementals(build, boot, tmp_path):
    guest, cli = boot(build)
    guest.tell("load")
    time.sleep(1)
    points, frozen = [], []
    for number in range(4):
        report = cli.json("incremental" if number else "full", "web", "--freeze", "require")
        assert report["consistency"] == "filesystem"
        points.append(report["point"])
        frozen.append(report["frozen_ms"])
        assert guest.leftovers() == []
        assert len(guest.bitmaps()["node-vda"]) == 1
        time.sleep(1)
    guest.tell("stop")
    assert assert_unharmed(guest) > 20
    lines = [assert_restored(cli, point, tmp_path) for point in points]
    assert lines == sorted(lines)
    assert lines[0] < lines[-1], "the guest was to write between the points"
    assert max(frozen) < 10_000
    print(f"QEMU {build.version}: frozen {frozen} ms, journal lines {lines}")


@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    ("driver", "times"),
    [
        ("virtio-blk-pci", 5),
        ("scsi-hd", 5),
        pytest.param("virtio-blk-pci", 50, marks=pytest.mark.slow),
        pytest.param("scsi-hd", 50, marks=pytest.mark.slow),
    ],
)
def test_sigkill_in_mid_copy_leaves_a_guest_on_an_iothread_alive(build, boot, tmp_path, driver, times):
    """On Debian's 7.2 a client that goes away kills such a VM; the guard keeps it from going away."""
    guest, cli = boot(build, iothread=True, driver=driver)
    cli.json("full", "web")
    guest.tell("load")
    for _ in range(times):
        time.sleep(0.5)
        with cli.start("incremental", "web", "--limit", "1M") as run:
            deadline = time.monotonic() + 60
            while not guest.qmp("query-block-exports"):
                assert time.monotonic() < deadline
                assert run.poll() is None, run.communicate()
                time.sleep(0.01)
            time.sleep(0.15)
            run.kill()
            run.communicate(timeout=60)
        time.sleep(0.3)
        assert_unharmed(guest)
    report = cli.json("incremental", "web")
    guest.tell("stop")
    assert_unharmed(guest)
    assert {disk["kind"] for disk in report["disks"]} == {"incremental"}
    assert_restored(cli, report["point"], tmp_path)
    assert guest.leftovers() == []


@pytest.mark.timeout(200)
def test_sigkill_while_a_real_guest_is_frozen_thaws_it(boot, tmp_path):
    """The run is killed as it takes the moment, which is between freeze and thaw: the guard thaws."""
    guest, cli = boot(get_build("7.2"))
    cli.json("full", "web")
    guest.tell("load")
    killed = []

    def kill(content: bytes) -> str:
        if killed or b'"transaction"' not in content:
            return ""
        killed.append(run.kill())
        return "after"

    path = guest.directory / "proxy"
    with Proxy(path, guest.qmp_path, kill):
        direct, cli.vm[1] = cli.vm[1], f"unix:{path}"
        with cli.start("incremental", "web", "--freeze", "require") as run:
            run.communicate(timeout=60)
        cli.vm[1] = direct
        assert killed
        time.sleep(2)
    before = assert_unharmed(guest)
    time.sleep(1.5)
    assert assert_unharmed(guest) > before, "the guest was to go on writing"
    report = cli.json("incremental", "web", "--freeze", "require")
    guest.tell("stop")
    assert_restored(cli, report["point"], tmp_path)
