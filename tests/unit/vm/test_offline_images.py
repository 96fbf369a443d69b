# SPDX-License-Identifier: GPL-2.0-or-later
"""The images of a VM that is off: what is opened, with which options, and what is refused. No QEMU is run."""

import os
import struct
from pathlib import Path

import pytest

from backupctl.errors import MonitorUnreachable, Refused
from backupctl.names import DiskName
from backupctl.options import ImageFile, VmImage
from backupctl.vm.offline import images


def qcow2(path: Path, backing: str = "", incompatible: int = 0) -> Path:
    """Write the first cluster of a qcow2 image."""
    at, name = (512 if backing else 0), backing.encode()
    head = struct.pack(">IIQIIQI", 0x514649FB, 3, at, len(name), 16, 1 << 20, 0)
    head += b"\0" * (72 - len(head)) + struct.pack(">QQQII", incompatible, 0, 0, 4, 104)
    path.write_bytes((head.ljust(512, b"\0") + name).ljust(65536, b"\0"))
    return path


def image(*files: tuple[Path, str], disk: str = "vda") -> VmImage:
    return VmImage(DiskName(disk), tuple(ImageFile(path, kind) for path, kind in files))


def test_nothing_is_opened_that_was_not_opened_here(tmp_path):
    base = tmp_path / "base.raw"
    base.write_bytes(b"\0" * 512)
    top = qcow2(tmp_path / "top", backing="base.raw")
    with images.opened([image((top, "qcow2"), (base, "raw"))]) as (disk,):
        nodes = {one["node-name"]: one for one in disk.nodes()}
        assert nodes[disk.node]["backing"] == "image0-node1"
        files = [one["filename"] for one in nodes.values() if "filename" in one]
        assert files == [f"/proc/self/fd/{one.image.descriptor}" for one in reversed(disk.files)]
        assert all(one["read-only"] for one in nodes.values())
        assert all(one["locking"] == "on" for one in nodes.values() if "filename" in one)
        seen = set()
        for name, node in nodes.items():
            assert {node.get("file"), node.get("backing")} - {None} <= seen
            seen.add(name)


def test_an_image_without_backing_file_gets_none(tmp_path):
    top = qcow2(tmp_path / "top")
    with images.opened([image((top, "qcow2"))]) as (disk,):
        assert disk.nodes()[-1]["backing"] is None
        assert [one["read-only"] for one in disk.reopened(read_only=False)] == [False, False]


@pytest.mark.parametrize(
    ("backing", "incompatible", "why"),
    [
        ("/etc/shadow", 0, "which the configuration does not name"),
        ('json:{"driver":"file","filename":"/etc/shadow"}', 0, "which the configuration does not name"),
        ("", 1 << 2, "external file"),
        ("", 1 << 1, "corrupt"),
        ("", 1 << 0, "was not closed"),
    ],
)
def test_a_header_that_leads_elsewhere_or_cannot_be_trusted_is_refused(tmp_path, backing, incompatible, why):
    top = qcow2(tmp_path / "top", backing, incompatible)
    with pytest.raises(Refused, match=why), images.opened([image((top, "qcow2"))]):
        pass


def test_a_backing_file_must_be_the_one_that_the_header_names(tmp_path):
    other = qcow2(tmp_path / "other")
    for backing in ("", "/etc/shadow", "missing", "nbd://x/y"):
        top = qcow2(tmp_path / "top", backing)
        chain = image((top, "qcow2"), (other, "qcow2"))
        with pytest.raises(Refused, match="does not have the backing file"), images.opened([chain]):
            pass


def test_a_raw_image_with_a_backing_file_is_refused(tmp_path):
    base = qcow2(tmp_path / "base")
    with pytest.raises(Refused, match="raw"), images.opened([image((base, "raw"), (base, "qcow2"))]):
        pass


def test_a_link_a_pipe_and_a_missing_file_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Refused, match="neither"), images.opened([image((tmp_path / "pipe", "raw"))]):
        pass
    with pytest.raises(MonitorUnreachable), images.opened([image((tmp_path / "none", "raw"))]):
        pass


def test_two_disks_with_one_image_are_refused(tmp_path):
    top = qcow2(tmp_path / "top")
    os.link(top, tmp_path / "same")
    pair = [image((top, "qcow2")), image((tmp_path / "same", "qcow2"), disk="vdb")]
    with pytest.raises(Refused, match="both vda and vdb"), images.opened(pair):
        pass


def test_a_raw_image_that_somebody_writes_to_is_refused(tmp_path, monkeypatch):
    raw = tmp_path / "raw"
    raw.write_bytes(b"\0" * 512)

    def in_use(_descriptor):
        raise images.image_lock.InUse

    monkeypatch.setattr(images.image_lock, "keep_from_writers", in_use)
    with pytest.raises(MonitorUnreachable, match="in use"), images.opened([image((raw, "raw"))]):
        pass
