# SPDX-License-Identifier: GPL-2.0-or-later
"""The empty image of a scratch file is as QEMU's own."""

import json
import os
import subprocess

import pytest

from backupctl.errors import Failed
from backupctl.vm.qmp import empty_qcow2

GIB = 1 << 30
SIZES = (512, 65536, 16 << 20, (8 << 20) + 512, 512 << 20, (512 << 20) + 512, 1024 * GIB, 2048 * 1024 * GIB)


def made(path, size):
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        empty_qcow2.write(descriptor, size)
    finally:
        os.close(descriptor)


def told(tool, command, path):
    done = subprocess.run(
        [tool, command, "-f", "qcow2", "--output=json", path],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("size", SIZES)
def test_each_qemu_finds_it_sound_and_as_its_own(each_build, tmp_path, size):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    made(ours, size)
    tool = each_build.tool("qemu-img")
    subprocess.run([tool, "create", "-q", "-f", "qcow2", theirs, str(size)], check=True, timeout=60)
    sound = told(tool, "check", ours)
    assert [sound.get(what, 0) for what in ("check-errors", "corruptions", "leaks")] == [0, 0, 0]
    both = [told(tool, "info", path) for path in (ours, theirs)]
    for about in both:
        del about["filename"], about["actual-size"]
        about.pop("children", None)
    assert both[0] == both[1]
    assert ours.stat().st_size == sound["image-end-offset"]


@pytest.mark.parametrize("size", SIZES[:6])
def test_it_can_be_written_to_its_end(any_build, tmp_path, size):
    path, tool = tmp_path / "ours", any_build.tool("qemu-io")
    made(path, size)
    commands = ("-c", f"write -P 7 {size - 512} 512", "-c", f"read -P 7 {size - 512} 512")
    said = subprocess.run(
        [tool, "-f", "qcow2", *commands, path],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "verification failed" not in said.stdout
    assert told(any_build.tool("qemu-img"), "check", path).get("check-errors", 0) == 0


def test_a_disk_that_no_qcow2_can_hold_is_an_error(tmp_path):
    with pytest.raises(Failed, match="a qcow2 image cannot have"):
        made(tmp_path / "ours", 1 << 60)
