# SPDX-License-Identifier: GPL-2.0-or-later
import errno
import fcntl
import os
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from backupctl.cancel import Cancellation
from backupctl.errors import Interrupted, Locked, TargetExists, UsageError, WriteFailed
from backupctl.events.restore import AttributesNotKept
from backupctl.images import nbd_server
from backupctl.operations.restore import overlay
from backupctl.operations.restore.request import RestoreRequest
from backupctl.operations.restore.whole import restore
from backupctl.progress import Silent
from backupctl.repository.vm_directory import VmDirectory
from backupctl.targets import output
from tests.unit.points import P1, P2, Builder, die_at, disk_entry


def request(point, to, **options) -> RestoreRequest:
    directory = VmDirectory(point.path.parent, point.manifest.vm, point.manifest.repository)
    return RestoreRequest(directory=directory, point=point.id, to=str(to), **options)


def run(point, to, *, stop=None, **options):
    return restore(request(point, to, **options), Silent(), stop or Cancellation())


def run_thin(point, to, **options):
    return overlay.restore(request(point, to, **options), Silent())


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
    report = run(builder.directory.point("latest"), tmp_path / "out.IMG", image_format=image_format)
    found = tmp_path / "out.IMG"
    assert (found.read_bytes() if image_format == "raw" else as_raw(found)) == content
    assert tree(builder.repository.path) == before
    assert (report.point, report.images[0].size, report.images[0].format) == (P2, len(content), image_format)
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_restored_qcow2_stands_alone(two_points, tmp_path):
    builder, _ = two_points
    run(builder.directory.point(P2), tmp_path / "out.qcow2")
    said = subprocess.run(
        ["qemu-img", "info", tmp_path / "out.qcow2"], capture_output=True, check=True, timeout=60
    )
    assert b"backing" not in said.stdout
    assert b"file format: qcow2" in said.stdout


def test_an_older_point_does_not_show_what_came_later(two_points, tmp_path):
    builder, content = two_points
    run(builder.directory.point(P1), tmp_path / "out.raw")
    restored = (tmp_path / "out.raw").read_bytes()
    assert restored != content
    assert restored[:70_000] == b"a" * 70_000


@pytest.mark.parametrize("ending", ["", "/"])
def test_a_directory_gets_every_disk_under_its_name(builder: Builder, tmp_path, ending):
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
        run(builder.directory.point(P2), tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes() == b"precious"
    run(builder.directory.point(P2), tmp_path / "out.raw", overwrite=True)
    assert (tmp_path / "out.raw").read_bytes() == content


def test_a_file_that_qemu_writes_to_is_not_replaced_even_by_force(two_points, tmp_path):
    """Its VM would go on in a file without a name, and lose all that it writes. One that comes late, too."""
    builder, content = two_points
    point, target = builder.directory.point(P2), tmp_path / "vda.qcow2"
    run(point, target)
    before = target.stat().st_ino
    with nbd_server.serve((target,), writable=True):
        with pytest.raises(UsageError, match="in use"):
            run(point, target, overwrite=True)
        with pytest.raises(UsageError, match="in use"):
            run_thin(point, target, overwrite=True)
        with pytest.raises(UsageError, match="in use"), output.file(target, force=True) as temporary:
            temporary.path.write_bytes(b"restored before it was in use")
        assert target.stat().st_ino == before
    assert [path.name for path in tmp_path.glob(".*")] == []
    run(point, target, overwrite=True)
    assert as_raw(target) == content
    assert target.stat().st_ino != before


def acl(user: int) -> bytes:
    """An ACL as the kernel stores it: rw for owner and a user, r for the group and the mask's rw."""
    entries = [(1, 6, -1), (2, 6, user), (4, 4, -1), (0x10, 6, -1), (0x20, 0, -1)]
    packed = (struct.pack("<HHI", tag, rights, number & 0xFFFFFFFF) for tag, rights, number in entries)
    return struct.pack("<I", 2) + b"".join(packed)


def test_a_replaced_file_hands_on_owner_mode_acl_and_labels(tmp_path):
    """Its VM's QEMU may open the new one as it could the old one, and nobody else can."""
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    target, told = tmp_path / "out.raw", []
    target.write_bytes(b"old")
    os.chown(target, 4711, 4712)
    target.chmod(0o4640)
    given = {
        "security.selinux": b"system_u:object_r:svirt_image_t:s0:c1,c2",
        "system.posix_acl_access": acl(64055),
    }
    try:
        for name, value in given.items():
            os.setxattr(target, name, value)
    except OSError as err:
        pytest.skip(f"no ACLs or labels here: {err}")
    os.setxattr(tmp_path, "system.posix_acl_default", acl(12345))  # what new files here would get
    with output.file(target, force=True, warn=told.append) as temporary:
        temporary.path.write_bytes(b"new")
        assert not temporary.path.stat().st_mode & 0o007
    found = target.stat()
    assert target.read_bytes() == b"new"
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (4711, 4712, 0o660)
    assert {name: os.getxattr(target, name) for name in given} == given
    assert told == []
    os.removexattr(target, "system.posix_acl_access")
    with output.file(target, force=True, warn=told.append) as temporary:
        temporary.path.write_bytes(b"newer")
    assert "system.posix_acl_access" not in os.listxattr(target)


def test_what_a_replaced_file_can_not_hand_on_is_told_and_no_other_group_gets_its_rights(
    tmp_path, monkeypatch
):
    target, told = tmp_path / "out.raw", []
    target.write_bytes(b"old")
    target.chmod(0o664)
    if os.geteuid() == 0:
        os.chown(target, 4711, 4712)

    def refused(*_arguments: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "fchown", refused)
    with output.file(target, force=True, warn=told.append) as temporary:
        temporary.path.write_bytes(b"new")
    if os.geteuid() != 0:
        return
    assert stat.S_IMODE(target.stat().st_mode) == 0o604
    lost = "group 4712 (Operation not permitted)", "owner 4711 (Operation not permitted)"
    assert told == [AttributesNotKept(target, lost)]


@pytest.mark.parametrize(
    ("feature", "options", "words"),
    [
        (
            "backing",
            ["-u", "-b", "/no/such/base", "-F", "raw"],
            "overlay on the backing file '/no/such/base'",
        ),
        ("data-file", ["-o", "data_file=data.raw"], "external file 'data.raw'"),
        (
            "encryption",
            [
                "--object",
                "secret,id=key,data=x",
                "-o",
                "encrypt.format=aes,encrypt.key-secret=key",
            ],
            "is encrypted",
        ),
    ],
)
def test_an_image_that_is_more_than_its_bytes_is_not_replaced_unasked(
    two_points, tmp_path, feature, options, words
):
    """Its VM is configured for a key, or for the file beside it, and could not use a plain image."""
    builder, content = two_points
    target, point = tmp_path / "vda.qcow2", builder.directory.point(P2)
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *options, str(target), "1M"]
    subprocess.run(command, check=True, timeout=60, cwd=tmp_path)
    before = target.read_bytes()
    with pytest.raises(UsageError, match=words) as caught:
        run(point, target, overwrite=True)
    assert f"--allow-image-feature {feature}" in caught.value.next_command
    assert target.read_bytes() == before
    run(point, target, overwrite=True, allowed=[feature])
    assert as_raw(target) == content


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "directory"])
def test_what_is_no_plain_file_is_refused_before_anything_is_read(two_points, tmp_path, kind, monkeypatch):
    builder, _ = two_points
    target = tmp_path / "to" / "vda.qcow2"
    target.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(target)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(target))
    elif kind == "directory":
        target.mkdir()
    else:
        target.symlink_to("/dev/null")

    def served(*_arguments: object, **_options: object) -> None:
        raise AssertionError

    monkeypatch.setattr(nbd_server, "served", served)
    for way in (run, run_thin):
        with pytest.raises(TargetExists, match="not replaced, even with --force"):
            way(builder.directory.point(P2), target.parent if kind == "directory" else target, overwrite=True)


def test_a_file_that_can_not_be_looked_at_is_not_taken_for_unused(two_points, tmp_path, monkeypatch):
    builder, _ = two_points
    target, real = tmp_path / "vda.qcow2", os.open
    target.write_bytes(b"old")

    def opened(path, flags, *rest, **more):
        if path == target.resolve():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(UsageError, match="whether it is in use: Permission denied"):
        run(builder.directory.point(P2), target, overwrite=True)
    assert target.read_bytes() == b"old"


def test_one_existing_image_stops_the_whole_directory_before_a_byte_is_written(builder: Builder, tmp_path):
    point = builder.point(P1, (disk_entry("vda"), []), (disk_entry("vdb"), []))
    (tmp_path / "vdb.raw").write_bytes(b"precious")
    with pytest.raises(TargetExists):
        run(point, tmp_path, image_format="raw")
    assert not (tmp_path / "vda.raw").exists()


def test_the_repository_is_never_a_target_even_by_force(two_points):
    builder, _ = two_points
    point = builder.directory.point(P2)
    with pytest.raises(UsageError, match="repository"):
        run(point, point.path / "vda.qcow2", overwrite=True)


def test_a_restored_file_is_sparse(builder: Builder, tmp_path):
    point = builder.point(P1, (disk_entry(size=1 << 30), [(1 << 29, b"x" * 4096)]))
    run(point, tmp_path / "out.raw")
    assert (tmp_path / "out.raw").stat().st_size == 1 << 30
    assert (tmp_path / "out.raw").stat().st_blocks * 512 < 1 << 20


def test_a_stopped_restore_leaves_nothing(two_points, tmp_path):
    builder, _ = two_points

    class StopsLater(Cancellation):
        calls = 0

        def check(self):
            self.calls += 1
            if self.calls == 2:
                self.request("SIGTERM")
            super().check()

    with pytest.raises(Interrupted):
        run(builder.directory.point(P2), tmp_path / "out.raw", stop=StopsLater())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["repository"]


@pytest.mark.parametrize(
    "name", [".out.raw.backupctl-restore", ".out.raw.backupctl-restore.0123456789abcdef"]
)
def test_what_a_dead_restore_left_is_cleared_but_never_written_to(two_points, tmp_path, name):
    builder, content = two_points
    target = tmp_path / "out.raw"
    target.write_bytes(b"complete")
    leftover = tmp_path / name
    os.link(target, leftover)  # died between link and unlink
    held = target.open("rb")
    with held:
        run(builder.directory.point(P2), target, overwrite=True)
        assert held.read() == b"complete"
    assert target.read_bytes() == content
    assert not leftover.exists()


def test_what_a_restore_left_that_had_given_it_away_already_is_cleared(tmp_path):
    """As root: it dies when the new file has the owner of the old one, and not yet its name."""
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    target, leftover = tmp_path / "out.raw", tmp_path / ".out.raw.backupctl-restore.0123456789abcdef"
    for path in (target, leftover):
        path.write_bytes(b"old")
        os.chown(path, 4711, 4711)
    with output.file(target, force=True) as temporary:
        temporary.path.write_bytes(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["out.raw"]


def test_nobody_else_holds_up_a_restore_with_a_file_of_that_name(tmp_path):
    """Somebody's locked file, link, pipe or directory in a sticky one is neither waited for nor touched."""
    if os.geteuid() != 0:
        pytest.skip("only root makes files of somebody else's")
    theirs = [
        tmp_path / f".out.raw.backupctl-restore{end}" for end in ("", *(f".{n:016x}" for n in range(4)))
    ]
    theirs[0].write_bytes(b"theirs")
    theirs[1].write_bytes(b"ours, but open to all")
    theirs[1].chmod(0o666)
    theirs[2].symlink_to("/etc/passwd")
    os.mkfifo(theirs[3])
    theirs[4].mkdir()
    os.chown(theirs[0], 4711, 4711)
    with theirs[0].open("rb") as one, theirs[1].open("rb") as other:
        fcntl.flock(one, fcntl.LOCK_EX)
        fcntl.flock(other, fcntl.LOCK_EX)
        with output.file(tmp_path / "out.raw", force=False) as temporary:
            assert temporary.path not in theirs
            temporary.path.write_bytes(b"restored")
    assert (tmp_path / "out.raw").read_bytes() == b"restored"
    assert set(tmp_path.iterdir()) == {*theirs, tmp_path / "out.raw"}


def test_a_name_as_long_as_may_be_has_a_temporary_one(tmp_path):
    target = tmp_path / ("ü" * 125 + ".raw")
    with output.file(target, force=False) as temporary:
        temporary.path.write_bytes(b"restored")
    assert target.read_bytes() == b"restored"


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "out.raw"
    with pytest.raises(TargetExists), output.file(target, force=False):
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
    with output.file(target, force=False) as temporary:
        temporary.path.write_bytes(b"restored")
    with pytest.raises(TargetExists), output.file(target, force=False) as temporary:
        temporary.path.write_bytes(b"another")
    assert target.read_bytes() == b"restored"


def test_a_target_file_system_that_fills_up_leaves_nothing(builder: Builder, tmp_path, small_file_system):
    point = builder.point(P1, (disk_entry(size=16 << 20), [(0, os.urandom(8 << 20))]))
    with pytest.raises(WriteFailed, match=r"cannot write .*out\.raw: .*No space left") as caught:
        run(point, small_file_system / "out.raw")
    assert "nothing of this run is left" in caught.value.state
    assert [path.name for path in small_file_system.iterdir() if path.name != "lost+found"] == []


@pytest.mark.parametrize("force", [False, True], ids=["new", "over an old one"])
def test_a_death_at_any_step_leaves_the_target_as_it_was_or_complete(tmp_path, force):
    target = tmp_path / "out.raw"

    def land():
        with output.file(target, force=force) as image:
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
from backupctl.cancel import Cancellation
from backupctl.progress import Silent
from backupctl.repository.repository import Repository
from backupctl.operations.restore.request import RestoreRequest
from backupctl.operations.restore.whole import restore
class Dies(Cancellation):
    calls = 0
    def check(self):
        self.calls += 1
        if self.calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
directory = Repository.open(Path(sys.argv[1])).vm(VmName("vm1"))
request = RestoreRequest(directory=directory, point=directory.point("latest").id, to=sys.argv[2])
restore(request, Silent(), Dies())
"""


def users_of(path: Path) -> list[str]:
    """The processes that have a file open whose name begins so."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(entry.readlink()).startswith(str(path)):
                found.append(entry.parent.parent.name)
        except OSError:
            continue
    return found


def test_a_killed_restore_leaves_no_target_and_no_process_and_can_be_repeated(two_points, tmp_path):
    builder, content = two_points
    target = tmp_path / "out.raw"
    command = [sys.executable, "-c", KILLED, builder.repository.path, target]
    assert subprocess.run(command, check=False, timeout=60).returncode == -9
    deadline = time.monotonic() + 60
    while users_of(target.with_name(".out.raw.backupctl-restore")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not target.exists()
    run(builder.directory.point(P2), target)
    assert target.read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.raw", "repository"]


def test_two_restores_to_one_file_do_not_mix(tmp_path):
    target = tmp_path / "out.raw"
    with output.file(target, force=False) as image:
        image.path.write_bytes(b"first")
        with pytest.raises(Locked), output.file(target, force=False):
            raise AssertionError
    assert target.read_bytes() == b"first"


READ_STDOUT = """
import sys
from pathlib import Path
from backupctl.names import VmName
from backupctl.cancel import Cancellation
from backupctl.progress import Silent
from backupctl.repository.repository import Repository
from backupctl.operations.restore.request import RestoreRequest
from backupctl.operations.restore.whole import restore
directory = Repository.open(Path(sys.argv[1])).vm(VmName("vm1"))
stop = Cancellation()
with stop.on_signals():
    restore(RestoreRequest(directory=directory, point=directory.point("latest").id, to="-"), Silent(), stop)
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
    assert child.wait(60) == 1
    assert b"the reader closed it" in said


def test_a_reader_that_sleeps_does_not_make_a_restore_deaf_to_sigterm(builder: Builder):
    builder.point(P1, (disk_entry(size=64 << 20), [(0, b"x" * (1 << 20))]))
    child = start_to_stdout(builder, subprocess.PIPE)
    killer = threading.Timer(60, child.kill)
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
    assert child.wait(60) == 1
    assert b"Interrupted: stopped by SIGTERM" in said


def test_a_block_device_gets_exactly_the_disk(two_points, loop_device):
    builder, content = two_points
    device = loop_device(1 << 20, filled=b"\xff")
    with pytest.raises(TargetExists, match="block device"):
        run(builder.directory.point(P2), device)
    run(builder.directory.point(P2), device, overwrite=True)
    found = Path(device).read_bytes()
    assert found[: len(content)] == content
    assert set(found[len(content) :]) == {0xFF}


def test_a_block_device_in_use_is_refused_even_by_force(two_points, loop_device):
    builder, _ = two_points
    device = loop_device(1 << 20)
    held = os.open(device, os.O_RDONLY | os.O_EXCL)
    try:
        with pytest.raises(UsageError, match="in use"):
            run(builder.directory.point(P2), device, overwrite=True)
    finally:
        os.close(held)


def test_a_block_device_that_is_too_small_is_refused_untouched(two_points, loop_device):
    builder, content = two_points
    device = loop_device(len(content) - 512)
    with pytest.raises(UsageError, match="bytes"):
        run(builder.directory.point(P2), device, overwrite=True)
    assert not any(Path(device).read_bytes())


def test_a_terminal_is_no_place_for_an_image(two_points, monkeypatch):
    builder, _ = two_points
    monkeypatch.setattr(os, "isatty", lambda _descriptor: True)
    with pytest.raises(UsageError, match="terminal"):
        run(builder.directory.point(P2), "-")
