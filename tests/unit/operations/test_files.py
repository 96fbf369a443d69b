# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl files`: which file systems a point holds, and single files out of them."""

import json
import os
import subprocess
import sys
import time

import pytest

from backupctl.cancel import Cancellation
from backupctl.errors import (
    DamageFound,
    FilesystemError,
    Interrupted,
    NoSuchPoint,
    TargetExists,
    UsageError,
    WriteFailed,
)
from backupctl.operations.files import extract as copying
from backupctl.operations.files import run as files
from backupctl.operations.files.run import Selection
from backupctl.repository import read_locks
from backupctl.system import locks
from backupctl.vm import filling
from backupctl.vm.filling import Filling
from backupctl.vm.scratch_directory import LOW_BYTES
from tests.unit.filesystems.sources import make_ext, make_tree, of_directory
from tests.unit.filesystems.test_lvm import IDS as LVM_IDS
from tests.unit.filesystems.test_lvm import physical_volume
from tests.unit.filesystems.test_partitions import mbr
from tests.unit.points import P1, P2, disk_entry

MIB = 1 << 20
ALL = Selection()


@pytest.fixture
def source(tmp_path):
    return make_tree(tmp_path / "source")


@pytest.fixture
def point(builder, source, tmp_path):
    """Two points with a partitioned disk; in the second one /etc/hostname is another one."""
    first = make_ext(tmp_path / "first", "-t", "ext4", content=source)
    (source / "etc/hostname").write_text("renamed\n")
    second = make_ext(tmp_path / "second", "-t", "ext4", content=source)
    table = mbr((0x83, 2048, 24 * MIB // 512)).ljust(MIB, b"\0")
    size = 26 * MIB
    builder.point(P1, (disk_entry(size=size), [(0, table), (MIB, first)]))
    return builder.point(P2, (disk_entry(parent=P1, size=size), [(MIB, second)]))


def located(builder, path: bytes, wanted: str = "latest", selection: Selection = ALL):
    with files.open_places(builder.directory, wanted, selection, Cancellation()) as places:
        found = files.locate(places, path)
        listed = list(files.listing(found, recursive=False))
        content = b"".join(
            piece if isinstance(piece, bytes) else bytes(piece)
            for piece in (found.filesystem.content(found.node) if found.node.kind == "file" else ())
        )
    return listed, content


def test_a_file_is_what_it_was_at_each_point(builder, point):
    assert located(builder, b"/etc/hostname")[1] == b"renamed\n"
    assert located(builder, b"etc/hostname", P1)[1] == b"web\n"
    assert [name for name, _ in located(builder, b"/etc")[0]] == [b"hostname"]


def test_all_of_a_file_system_is_copied_except_links(builder, point, source, tmp_path):
    target = tmp_path / "out"
    with files.open_places(builder.directory, "latest", Selection(), Cancellation()) as places:
        found = (files.locate(places, b"/"),)
        report = copying.extract(found, target, builder.repository.path)
    wanted = {name: what for name, what in of_directory(source).items() if "link" not in name}
    copied = of_directory(target)
    assert copied.pop("lost+found") == "directory"
    assert copied == wanted
    assert (report.files, report.directories) == (404, 3)
    assert {(one.path, one.why) for one in report.skipped} == {
        ("/link", "a symbolic link"),
        ("/long-link", "a symbolic link"),
    }


def test_a_copy_ends_before_it_takes_the_room_of_vms(builder, point, tmp_path, monkeypatch):
    monkeypatch.setattr(filling, "free_bytes", lambda _: LOW_BYTES - 1)
    monkeypatch.setattr(Filling, "who", lambda one: f"a.qcow2 is on {one.directory} too")
    target = tmp_path / "out"
    with files.open_places(builder.directory, "latest", Selection(), Cancellation()) as places:
        found = (files.locate(places, b"/etc"),)
        with pytest.raises(WriteFailed, match=rf"255 MiB left\), and a\.qcow2 is on {target} too"):
            copying.extract(found, target, builder.repository.path)
    assert [path.name for path in target.rglob("*")] == ["etc"]


def test_nothing_that_exists_is_overwritten(builder, point, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/hostname").write_text("mine")
    with files.open_places(builder.directory, "latest", Selection(), Cancellation()) as places:
        found = (files.locate(places, b"/etc/hostname"),)
        with pytest.raises(TargetExists):
            copying.extract(found, tmp_path / "out", builder.repository.path)
    assert (tmp_path / "out/hostname").read_text() == "mine"


def test_what_does_not_match_its_digest_is_not_used(builder, point):
    image = point.path / "vda.qcow2"
    content = bytearray(image.read_bytes())
    at = content.index(b"renamed\n")
    content[at] ^= 1
    image.write_bytes(content)
    with pytest.raises(DamageFound, match="vda of"):
        located(builder, b"/etc/hostname")


def test_a_prune_waits_while_files_are_read(builder, point):
    with files.open_places(builder.directory, "latest", Selection(), Cancellation()):
        for path in (builder.directory.path / P1, builder.directory.path / P2):
            descriptor = os.open(path, os.O_RDONLY)
            assert not locks.take(descriptor, 0)
            os.close(descriptor)
    with read_locks.reading(builder.directory, "latest"):
        pass


def test_a_path_on_two_file_systems_must_be_chosen(builder, source, tmp_path):
    image = make_ext(tmp_path / "i", "-t", "ext4", content=source, size="8M")
    disks = [(disk_entry(name, size=8 * MIB), [(0, image)]) for name in ("vda", "vdb")]
    builder.point(P1, *disks)
    with pytest.raises(UsageError, match="on several file systems: vda, vdb"):
        located(builder, b"/etc/hostname")
    assert located(builder, b"/etc/hostname", selection=Selection("vdb"))[1] == b"web\n"
    with pytest.raises(UsageError, match="no such partition or volume, but vdb"):
        located(builder, b"/", selection=Selection("vdb", 3))
    with pytest.raises(NoSuchPoint):
        located(builder, b"/", selection=Selection("vdz"))


@pytest.mark.parametrize(
    ("magic", "kind", "hint"),
    [
        ((0, b"LUKS\xba\xbe"), "LUKS", "passphrase"),
        ((3, b"NTFS    "), "NTFS", "guestmount"),
        ((3, b"-FVE-FS-"), "BitLocker", "its key"),
        ((4096, b"\xfc\x4e\x2b\xa9"), r"RAID of Linux \(md\)", "-a for each disk of the array"),
        ((16384 + 24, b"version\0"), "ZFS", "--thin"),
        ((4086, b"SWAPSPACE2"), "swap", "it has no files"),
        ((32769, b"CD001"), "ISO 9660", "guestmount"),
    ],
)
def test_what_is_not_supported_is_named_and_so_is_what_reads_it(builder, magic, kind, hint):
    offset, content = magic
    disk = (bytes(offset) + content).ljust(-(-(offset + len(content)) // 512) * 512, b"\0")
    builder.point(P1, (disk_entry(), [(0, disk)]))
    with pytest.raises(FilesystemError, match=f"vda: {kind} is not supported") as caught:
        located(builder, b"/")
    assert hint in caught.value.hint
    shown = " ".join(cli(builder).stdout.split())
    assert hint in shown


def test_an_empty_disk_is_called_so(builder):
    builder.point(P1, (disk_entry(), []))
    with pytest.raises(FilesystemError, match="vda: empty: it begins with 128 KiB of zeroes") as caught:
        located(builder, b"/")
    assert caught.value.hint == "empty: it has no files"


def test_the_newest_point_is_meant_where_none_is_named(builder, point):
    assert json.loads(cli(builder, "/etc", "--json").stdout)["paths"][0]["path"] == "/etc"
    assert "hostname" in cli(builder, P1, "/etc").stdout
    at = cli(
        builder,
        "--at",
        "2026-01-01 00:00:00 UTC",
        "/etc/hostname",
        "--to",
        point.path.parent.parent.parent / "o",
    )
    assert at.returncode == 0, at.stderr
    assert (point.path.parent.parent.parent / "o/hostname").read_text() == "web\n"


def test_a_stop_ends_the_reading(builder, point):
    stop = Cancellation()
    with files.open_places(builder.directory, "latest", Selection(), stop) as places:
        found = files.locate(places, b"/large")
        stop.request("stopped")
        with pytest.raises(Interrupted):
            list(found.filesystem.content(found.node))


def cli(builder, *words: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "backupctl", "files", "vm1", *map(str, words)]
    command += ["--repository", str(builder.repository.path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_lists_and_copies(builder, point, tmp_path):
    shown = cli(builder, "latest").stdout
    assert "vda" in shown
    assert "ext2/3/4" in shown
    listed = json.loads(cli(builder, "latest", "/etc", "--json").stdout)
    assert listed["paths"][0]["entries"][0]["name"] == "hostname"
    done = cli(builder, P1, "/etc", "/large", "--to", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == 2
    assert (tmp_path / "out/etc/hostname").read_text() == "web\n"
    wrong = cli(builder, "latest", "/nowhere", "--to", tmp_path / "out2")
    assert wrong.returncode == 2
    assert "/nowhere: no such file or directory" in wrong.stderr
    assert not (tmp_path / "out2").exists()


def test_a_name_with_escape_sequences_cannot_move_the_cursor(builder, tmp_path):
    source = tmp_path / "s"
    source.mkdir()
    (source / "\x1b[2Jname").touch()
    builder.point(P1, (disk_entry(size=8 * MIB), [(0, make_ext(tmp_path / "i", content=source, size="8M"))]))
    shown = cli(builder, "latest", "/").stdout
    assert "\x1b" not in shown
    assert "\\x1b[2Jname" in shown


def test_a_thousand_files_are_listed_in_little_time(builder, point):
    begun = time.monotonic()
    assert len(located(builder, b"/many")[0]) == 400
    assert time.monotonic() - begun < 30


def test_files_on_a_logical_volume_are_read(builder, source, tmp_path):
    text = """vg { seqno = 1 extent_size = 2048 physical_volumes { pv0 { id = "%s" pe_start = 2048 } }
        logical_volumes { root { status = ["VISIBLE"] segment_count = 1 segment1 { start_extent = 0
        extent_count = 24 type = "striped" stripe_count = 1 stripes = ["pv0", 0] } } } }"""
    image = make_ext(tmp_path / "i", "-t", "ext4", content=source)
    size = 26 * MIB
    disk = physical_volume(text % LVM_IDS[0], size, LVM_IDS[0])
    builder.point(P1, (disk_entry(size=size), [(0, bytes(disk[:MIB])), (MIB, image)]))
    assert located(builder, b"/etc/hostname")[1] == b"web\n"
    assert located(builder, b"/etc/hostname", selection=Selection(volume="vg/root"))[1] == b"web\n"
    listed = json.loads(cli(builder, "latest", "--json").stdout)["file_systems"]
    assert [(one["disk"], one["volume"], one["kind"]) for one in listed] == [
        ("vda", None, "LVM"),
        (None, "vg/root", "ext2/3/4"),
    ]
