# SPDX-License-Identifier: GPL-2.0-or-later
import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from backupctl import thin
from backupctl.errors import Interrupted, Locked, TargetExists, UsageError, WriteFailed
from backupctl.report import Silent, Stop
from backupctl.repository import images, landing
from backupctl.repository.vm_folder import VmFolder
from backupctl.restore import restore
from tests.unit.repository.conftest import P1, P2, Builder, die_at, disk_entry


def run(point, to, *, disk=None, image_format=None, force=False, stop=None):
    folder = VmFolder(point.path.parent, point.manifest.vm, point.manifest.repository)
    return restore(
        folder,
        point,
        to=str(to),
        disk=disk,
        image_format=image_format,
        force=force,
        reporter=Silent(),
        stop=stop or Stop(),
    )


def as_raw(path: Path) -> bytes:
    raw = path.with_suffix(".check")
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(path), str(raw)], check=True, timeout=60)
    return raw.read_bytes()


def tree(root: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_restored_file_is_byte_equal_and_the_backup_unchanged(two_points, tmp_path, image_format):
    builder, content = two_points
    before = tree(builder.repository.path)
    report = run(builder.folder.point("latest"), tmp_path / "out.IMG", image_format=image_format)
    found = tmp_path / "out.IMG"
    assert (found.read_bytes() if image_format == "raw" else as_raw(found)) == content
    assert tree(builder.repository.path) == before
    assert (report.point, report.images[0].size, report.images[0].format) == (P2, len(content), image_format)
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_restored_qcow2_stands_alone(two_points, tmp_path):
    builder, _ = two_points
    run(builder.folder.point(P2), tmp_path / "out.qcow2")
    said = subprocess.run(
        ["qemu-img", "info", tmp_path / "out.qcow2"], capture_output=True, check=True, timeout=60
    )
    assert b"backing" not in said.stdout
    assert b"file format: qcow2" in said.stdout


def test_an_older_point_does_not_show_what_came_later(two_points, tmp_path):
    builder, content = two_points
    run(builder.folder.point(P1), tmp_path / "out.raw")
    restored = (tmp_path / "out.raw").read_bytes()
    assert restored != content
    assert restored[:70_000] == b"a" * 70_000


@pytest.mark.parametrize("ending", ["", "/"])
def test_a_folder_gets_every_disk_under_its_name(builder: Builder, tmp_path, ending):
    to = f"{tmp_path}/new{ending}"
    point = builder.point(P1, (disk_entry("vda"), [(0, b"A" * 512)]), (disk_entry("vdb"), [(0, b"B" * 512)]))
    run(point, to, image_format="raw")
    assert (tmp_path / "new/vda.raw").read_bytes()[:512] == b"A" * 512
    assert (tmp_path / "new/vdb.raw").read_bytes()[:512] == b"B" * 512


def test_two_disks_do_not_go_into_one_file(builder: Builder, tmp_path):
    point = builder.point(P1, (disk_entry("vda"), []), (disk_entry("vdb"), []))
    with pytest.raises(UsageError, match="--disk"):
        run(point, tmp_path / "out.raw")
    run(point, tmp_path / "out.raw", disk="vdb")
    assert (tmp_path / "out.raw").stat().st_size == 1 << 20


def test_what_exists_is_replaced_only_by_force(two_points, tmp_path):
    builder, content = two_points
    (tmp_path / "out.raw").write_bytes(b"precious")
    with pytest.raises(TargetExists):
        run(builder.folder.point(P2), tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes() == b"precious"
    run(builder.folder.point(P2), tmp_path / "out.raw", force=True)
    assert (tmp_path / "out.raw").read_bytes() == content


def test_a_file_that_qemu_writes_to_is_not_replaced_even_by_force(two_points, tmp_path):
    """Its VM would go on in a file without a name, and lose all that it writes. One that comes late, too."""
    builder, content = two_points
    point, target = builder.folder.point(P2), tmp_path / "vda.qcow2"
    run(point, target)
    before = target.stat().st_ino
    with images.serve((target,), writable=True):
        with pytest.raises(UsageError, match="in use"):
            run(point, target, force=True)
        with pytest.raises(UsageError, match="in use"):
            thin.restore(
                builder.folder,
                point,
                to=str(target),
                disk=None,
                image_format=None,
                force=True,
                reporter=Silent(),
            )
        with pytest.raises(UsageError, match="in use"), landing.file(target, force=True) as temporary:
            temporary.path.write_bytes(b"restored before it was in use")
        assert target.stat().st_ino == before
    assert [path.name for path in tmp_path.glob(".*")] == []
    run(point, target, force=True)
    assert as_raw(target) == content
    assert target.stat().st_ino != before


def test_one_existing_image_stops_the_whole_folder_before_a_byte_is_written(builder: Builder, tmp_path):
    point = builder.point(P1, (disk_entry("vda"), []), (disk_entry("vdb"), []))
    (tmp_path / "vdb.raw").write_bytes(b"precious")
    with pytest.raises(TargetExists):
        run(point, tmp_path, image_format="raw")
    assert not (tmp_path / "vda.raw").exists()


def test_the_repository_is_never_a_target_even_by_force(two_points):
    builder, _ = two_points
    point = builder.folder.point(P2)
    with pytest.raises(UsageError, match="repository"):
        run(point, point.path / "vda.qcow2", force=True)


def test_a_restored_file_is_sparse(builder: Builder, tmp_path):
    point = builder.point(P1, (disk_entry(size=1 << 30), [(1 << 29, b"x" * 4096)]))
    run(point, tmp_path / "out.raw")
    assert (tmp_path / "out.raw").stat().st_size == 1 << 30
    assert (tmp_path / "out.raw").stat().st_blocks * 512 < 1 << 20


def test_a_stopped_restore_leaves_nothing(two_points, tmp_path):
    builder, _ = two_points

    class StopsLater(Stop):
        calls = 0

        def check(self):
            self.calls += 1
            if self.calls == 2:
                self.request("SIGTERM")
            super().check()

    with pytest.raises(Interrupted):
        run(builder.folder.point(P2), tmp_path / "out.raw", stop=StopsLater())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["repository"]


def test_what_a_dead_restore_left_is_cleared_but_never_written_to(two_points, tmp_path):
    builder, content = two_points
    target = tmp_path / "out.raw"
    target.write_bytes(b"complete")
    leftover = tmp_path / ".out.raw.backupctl-restore"
    os.link(target, leftover)  # died between link and unlink
    held = target.open("rb")
    with held:
        run(builder.folder.point(P2), target, force=True)
        assert held.read() == b"complete"
    assert target.read_bytes() == content
    assert not leftover.exists()


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "out.raw"
    with pytest.raises(TargetExists), landing.file(target, force=False):
        target.write_bytes(b"precious")
    assert target.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_target_file_system_without_hard_links_will_do(tmp_path, monkeypatch, number):
    """FAT, CIFS and many a FUSE say it differently."""

    def link(_source: Path, _target: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    target = tmp_path / "out.raw"
    with landing.file(target, force=False) as temporary:
        temporary.path.write_bytes(b"restored")
    with pytest.raises(TargetExists), landing.file(target, force=False) as temporary:
        temporary.path.write_bytes(b"another")
    assert target.read_bytes() == b"restored"


def test_a_target_file_system_that_fills_up_leaves_nothing(builder: Builder, tmp_path, small_file_system):
    point = builder.point(P1, (disk_entry(size=16 << 20), [(0, os.urandom(8 << 20))]))
    with pytest.raises(WriteFailed, match=r"out\.raw can't be written: .*No space left") as caught:
        run(point, small_file_system / "out.raw")
    assert "nothing of this run is left" in caught.value.state
    assert [path.name for path in small_file_system.iterdir() if path.name != "lost+found"] == []


@pytest.mark.parametrize("force", [False, True], ids=["new", "over an old one"])
def test_a_death_at_any_step_leaves_the_target_as_it_was_or_complete(tmp_path, force):
    target = tmp_path / "out.raw"

    def land():
        with landing.file(target, force=force) as image:
            image.path.write_bytes(b"new" * 100)

    ended = False
    number = 0
    seen = set()
    while not ended:
        if force:
            target.write_bytes(b"old")
        ended = die_at(number, land)
        seen.add(target.read_bytes() if target.exists() else None)
        assert seen <= {b"old" if force else None, b"new" * 100}
        target.unlink(missing_ok=True)
        land()  # and what is left of it is no hindrance
        assert [path.name for path in tmp_path.iterdir()] == ["out.raw"]
        target.unlink()
        number += 1
    assert number > 3
    assert len(seen) == 2


KILLED = """
import os, signal, sys
from pathlib import Path
from backupctl.names import VmName
from backupctl.report import Silent, Stop
from backupctl.repository.layout import Repository
from backupctl.restore import restore
class Dies(Stop):
    calls = 0
    def check(self):
        self.calls += 1
        if self.calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
folder = Repository.open(Path(sys.argv[1])).vm(VmName("vm1"))
restore(folder, folder.point("latest"), to=sys.argv[2], disk=None, image_format=None, force=False,
        reporter=Silent(), stop=Dies())
"""


def users_of(path: Path) -> list[str]:
    """The processes that have a file open."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if entry.readlink() == path:
                found.append(entry.parent.parent.name)
        except OSError:
            continue
    return found


def test_a_killed_restore_leaves_no_target_and_no_process_and_can_be_repeated(two_points, tmp_path):
    builder, content = two_points
    target = tmp_path / "out.raw"
    command = [sys.executable, "-c", KILLED, builder.repository.path, target]
    assert subprocess.run(command, check=False, timeout=60).returncode == -9
    deadline = time.monotonic() + 10
    while users_of(target.with_name(".out.raw.backupctl-restore")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not target.exists()
    run(builder.folder.point(P2), target)
    assert target.read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.raw", "repository"]


def test_two_restores_to_one_file_do_not_mix(tmp_path):
    target = tmp_path / "out.raw"
    with landing.file(target, force=False) as image:
        image.path.write_bytes(b"first")
        with pytest.raises(Locked), landing.file(target, force=False):
            raise AssertionError
    assert target.read_bytes() == b"first"


READ_STDOUT = """
import sys
from pathlib import Path
from backupctl.names import VmName
from backupctl.report import Silent, Stop
from backupctl.repository.layout import Repository
from backupctl.restore import restore
folder = Repository.open(Path(sys.argv[1])).vm(VmName("vm1"))
stop = Stop()
with stop.on_signals():
    restore(folder, folder.point("latest"), to="-", disk=None, image_format=None, force=False,
            reporter=Silent(), stop=stop)
"""


def start_to_stdout(builder, out):
    return subprocess.Popen(
        [sys.executable, "-c", READ_STDOUT, str(builder.repository.path)], stdout=out, stderr=subprocess.PIPE
    )


def test_stdout_gets_the_whole_disk_through_a_pipe(two_points):
    builder, content = two_points
    child = start_to_stdout(builder, subprocess.PIPE)
    found, said = child.communicate(timeout=60)
    assert child.returncode == 0, said
    assert found == content


def test_stdout_gets_the_whole_disk_into_a_file(two_points, tmp_path):
    builder, content = two_points
    with (tmp_path / "out").open("wb") as out:
        child = start_to_stdout(builder, out)
        _, said = child.communicate(timeout=60)
    assert child.returncode == 0, said
    assert (tmp_path / "out").read_bytes() == content


def test_a_reader_that_goes_away_is_an_error(builder: Builder):
    builder.point(P1, (disk_entry(size=64 << 20), [(0, b"x" * (1 << 20))]))
    child = start_to_stdout(builder, subprocess.PIPE)
    child.stdout.read(10)
    child.stdout.close()
    said = child.stderr.read()
    child.stderr.close()
    assert child.wait(30) == 1
    assert b"its reader went away" in said


def test_a_reader_that_sleeps_does_not_make_a_restore_deaf_to_sigterm(builder: Builder):
    builder.point(P1, (disk_entry(size=64 << 20), [(0, b"x" * (1 << 20))]))
    child = start_to_stdout(builder, subprocess.PIPE)
    killer = threading.Timer(15, child.kill)
    killer.start()
    try:
        child.stdout.read(10)
        time.sleep(0.3)
        child.terminate()
        said = child.stderr.read()
    finally:
        killer.cancel()
        child.stdout.close()
        child.stderr.close()
    assert child.wait(10) == 1
    assert b"Interrupted: stopped by SIGTERM" in said


def test_a_block_device_gets_exactly_the_disk(two_points, loop_device):
    builder, content = two_points
    device = loop_device(1 << 20, filled=b"\xff")
    with pytest.raises(TargetExists, match="block device"):
        run(builder.folder.point(P2), device)
    run(builder.folder.point(P2), device, force=True)
    found = Path(device).read_bytes()
    assert found[: len(content)] == content
    assert set(found[len(content) :]) == {0xFF}


def test_a_block_device_in_use_is_refused_even_by_force(two_points, loop_device):
    builder, _ = two_points
    device = loop_device(1 << 20)
    held = os.open(device, os.O_RDONLY | os.O_EXCL)
    try:
        with pytest.raises(UsageError, match="in use"):
            run(builder.folder.point(P2), device, force=True)
    finally:
        os.close(held)


def test_a_block_device_that_is_too_small_is_refused_untouched(two_points, loop_device):
    builder, content = two_points
    device = loop_device(len(content) - 512)
    with pytest.raises(UsageError, match="bytes"):
        run(builder.folder.point(P2), device, force=True)
    assert not any(Path(device).read_bytes())


def test_a_terminal_is_no_place_for_an_image(two_points, monkeypatch):
    builder, _ = two_points
    monkeypatch.setattr(os, "isatty", lambda _descriptor: True)
    with pytest.raises(UsageError, match="terminal"):
        run(builder.folder.point(P2), "-")
