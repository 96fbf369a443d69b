# SPDX-License-Identifier: GPL-2.0-or-later
"""A scratch file that is far too small costs the backup, never one write of the guest."""

import os
import subprocess
import time

import pytest

from tests.conftest import MIB
from tests.integration.test_guest import assert_unharmed

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which takes root"),
]
DISK_BYTES = 1536 * MIB
FLOOD_MIB = "1024"
"""Much more than any scratch here takes, at several hundred MiB a second."""


@pytest.fixture
def small(tmp_path, held):
    """Mount a tmpfs of so many MiB; returns its folder."""

    def mount(size_mib: int):
        folder = tmp_path / "small"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", folder], check=False, timeout=30
        )
        if done.returncode:
            pytest.skip("no file system can be mounted here")
        held.callback(subprocess.run, ["umount", "-l", folder], check=True, timeout=30)
        return folder

    return mount


def flooded(guest, cli, *options: str) -> tuple[str, float]:
    """Begin a full that takes long, let the guest write as fast as it can; returns what was said, seconds."""
    with cli.start("full", "web", "--limit", "4M", *options) as run:
        deadline = time.monotonic() + 60
        while not guest.qmp("query-block-exports"):
            assert time.monotonic() < deadline
            assert run.poll() is None, run.communicate()
            time.sleep(0.01)
        begun = time.monotonic()
        assert guest.tell(f"flood {FLOOD_MIB}") == "ok"
        _, told = run.communicate(timeout=90)
    assert run.returncode == 1, told
    return told, time.monotonic() - begun


@pytest.mark.timeout(300)
@pytest.mark.parametrize("iothread", [False, True], ids=["main", "iothread"])
def test_a_scratch_that_is_far_too_small_costs_the_backup_and_no_write(
    build, boot, small, tmp_path, iothread
):
    guest, cli = boot(build, DISK_BYTES, used=True, iothread=iothread)
    size = "1024M" if iothread and build.version == "7.2" else "512M"
    cli.scratch = small(int(size[:-1]) + 8)
    told, seconds = flooded(guest, cli, "--view", "fleecing", "--scratch-size", size)
    assert "gave up before the guest's own writes could fail" in " ".join(told.split()), told
    assert "rolled back" in told
    assert guest.leftovers() == []
    time.sleep(0.5)
    assert guest.tell("stop") == "ok"
    assert_unharmed(guest)
    print(f"QEMU {build.version}: given up after {seconds:.2f} s of flood")
