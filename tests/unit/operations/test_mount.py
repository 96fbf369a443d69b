# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl mount` and `umount`: disks as files, and what is left when a mount is killed: nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from backupctl.errors import TargetExists, UsageError
from backupctl.system import fuse, locks
from backupctl.targets import mount_points
from tests.unit.points import P1, P2, Builder, disk_entry

MIB = 1 << 20
CONTENT = os.urandom(65536)


@pytest.fixture
def vm(builder) -> Builder:
    if not (shutil.which("nbdfuse") and shutil.which("fusermount3") and os.access("/dev/fuse", os.W_OK)):
        pytest.skip("nothing can be mounted with FUSE here")
    disks = [(disk_entry(name), [(0, CONTENT)]) for name in ("vda", "vdb")]
    builder.point(P1, *disks)
    builder.point(P2, (disk_entry(parent=P1), [(65536, CONTENT)]))
    return builder


def command(vm: Builder, name: str, *words: object) -> list[str]:
    given = ("vm1", *words, "--repository", vm.repository.path) if name == "mount" else words
    return [sys.executable, "-m", "backupctl", name, *map(str, given), "--json"]


def call(vm: Builder, *words: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(vm, *map(str, words)), capture_output=True, text=True, timeout=60, check=False
    )


@contextmanager
def mounting(vm: Builder, *words: object) -> Iterator["subprocess.Popen[str]"]:
    """Run `mount` until it has mounted."""
    with subprocess.Popen(
        command(vm, "mount", *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout
        try:
            while child.stdout.readline().strip() not in ("}", ""):
                pass
            assert child.poll() is None, child.stderr.read() if child.stderr else ""
            yield child
        finally:
            child.kill()


def awaited(look) -> None:
    deadline = time.monotonic() + 60
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_each_disk_is_a_file_until_the_command_is_stopped(vm, tmp_path):
    target = tmp_path / "m"
    with mounting(vm, P1, target) as child:
        assert sorted(os.listdir(target)) == ["vda.raw", "vdb.raw"]
        for name in ("vda.raw", "vdb.raw"):
            assert (target / name).stat().st_size == MIB
            assert (target / name).read_bytes()[:65536] == CONTENT
            with pytest.raises(OSError, match=r"Read-only|Permission|Operation"), (target / name).open("r+b"):
                pass
        descriptor = os.open(vm.directory.path / P1, os.O_RDONLY)
        assert not locks.take(descriptor, 0), "a prune could change what is mounted"
        os.close(descriptor)
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 0
    assert os.listdir(target) == []


def test_a_mount_in_the_background_is_ended_by_umount(vm, tmp_path):
    target = tmp_path / "m"
    done = call(vm, "mount", P2, target, "--background")
    assert done.returncode == 0, done.stderr
    path = Path(json.loads(done.stdout)["mounted"][0]["path"])
    assert path.read_bytes()[:131072] == CONTENT * 2
    again = call(vm, "mount", P2, target)
    assert again.returncode == 2
    assert "is mounted over" in again.stderr
    assert path.read_bytes()[:65536] == CONTENT
    assert json.loads(call(vm, "umount", target).stdout) == {"unmounted": [str(path)]}
    awaited(lambda: not os.listdir(target))


def test_a_mount_is_listed_whatever_its_name_and_without_being_touched(vm, tmp_path):
    target = tmp_path / "a b\\c\td"
    with mounting(vm, P1, target) as child:
        assert mount_points.is_listed(target / "vda.raw")
        assert not mount_points.is_listed(target / "none.raw")
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0
    assert not mount_points.is_listed(target / "vda.raw")


def test_a_killed_mount_leaves_nothing_mounted_and_the_next_one_works(vm, tmp_path):
    target = tmp_path / "m"
    with mounting(vm, P2, target) as child:
        child.send_signal(signal.SIGKILL)
        child.wait(60)
    awaited(lambda: not mount_points.is_listed(target / "vda.raw"))
    with mounting(vm, P2, target) as child:
        assert (target / "vda.raw").read_bytes()[:65536] == CONTENT
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0
    assert os.listdir(target) == []


def test_a_background_mount_that_fails_says_so_and_has_its_exit_code(vm, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/vda.raw").write_text("mine")
    done = call(vm, "mount", P2, tmp_path / "m", "--background")
    assert done.returncode == 2
    assert "already exists" in done.stderr
    assert (tmp_path / "m/vda.raw").read_text() == "mine"


def test_without_nbdfuse_the_package_is_named(monkeypatch):
    monkeypatch.setattr(fuse.shutil, "which", lambda _name: None)
    with pytest.raises(UsageError, match="nbdfuse and fusermount3 not found") as caught:
        fuse.check()
    assert caught.value.next_command == "apt install libnbd-bin fuse3"


def test_a_link_in_place_of_a_file_is_not_mounted_over_and_not_removed(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "outside").touch()
    (tmp_path / "m/vda.raw").symlink_to(tmp_path / "outside")
    with pytest.raises(TargetExists), mount_points.made(tmp_path / "m", ["vda"]):
        pass
    assert (tmp_path / "m/vda.raw").is_symlink()


def test_a_file_that_was_exchanged_meanwhile_is_not_removed(tmp_path):
    with mount_points.made(tmp_path / "m", ["vda"]) as (path,):
        path.rename(tmp_path / "moved")
        path.write_text("mine")
    assert path.read_text() == "mine"


def test_umount_of_a_directory_without_mounts_does_nothing(vm, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/vda.raw").touch()
    assert json.loads(call(vm, "umount", tmp_path / "m").stdout) == {"unmounted": []}
    assert call(vm, "umount", tmp_path / "none").returncode == 2
