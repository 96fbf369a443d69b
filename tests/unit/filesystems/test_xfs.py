# SPDX-License-Identifier: GPL-2.0-or-later
"""XFS: what its own tools wrote is read, and what a malicious guest wrote has an end."""

import random
import struct
import time
from contextlib import suppress
from pathlib import Path

import pytest

from backupctl.errors import FilesystemError
from backupctl.filesystems import detect, tree
from backupctl.filesystems.xfs import XfsFileSystem
from tests.unit.filesystems.sources import (
    Memory,
    content_of,
    everything,
    make_tree,
    make_xfs,
    of_directory,
)

pytestmark = pytest.mark.skipif(not Path("/sbin/mkfs.xfs").exists(), reason="needs xfsprogs")
SHAPES = {
    "default": (),
    "1 KiB blocks": ("-b", "size=1024"),
    "version 4": ("-m", "crc=0"),
    "large directory blocks": ("-n", "size=16384"),
}
BLOCK, CORE = 4096, 176


class Sparse(Memory):
    """A device of which only what is not zero is kept, so that changed copies of it are cheap."""

    def __init__(self, content: bytes, changes: dict[int, int] | None = None) -> None:
        super().__init__(content)
        self.changes = changes or {}

    def read(self, offset: int, length: int) -> bytes:
        found = bytearray(super().read(offset, length))
        for at, value in self.changes.items():
            if offset <= at < offset + length:
                found[at - offset] = value
        return bytes(found)


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_every_file_of_a_file_system_is_read_as_it_was_written(options, tmp_path):
    source = make_tree(tmp_path / "source")
    filesystem = detect.open_file_system(Memory(make_xfs(tmp_path / "image", source, *options)))
    assert everything(filesystem) == of_directory(source)
    assert "its log is not read" in filesystem.warnings[0]


def test_the_blocks_of_a_file_with_many_extents_are_found_through_their_tree(tmp_path):
    """mkfs writes no file with so many: the extents of one are moved into a block of a tree."""
    source = make_tree(tmp_path / "source")
    image = bytearray(make_xfs(tmp_path / "image", source))
    filesystem = XfsFileSystem(Memory(bytes(image)))
    inode = filesystem._inode(tree.find(filesystem, b"large").number)
    assert inode.extents == 1
    logical, block, blocks, _ = next(iter(filesystem._extents(inode)))
    halves = [(logical, block, 100), (logical + 100, block + 100, blocks - 100)]
    leaf = struct.pack(">4sHHQQ", b"BMA3", 0, 2, 2**64 - 1, 2**64 - 1) + bytes(48)
    for first, place, count in halves:
        leaf += struct.pack(">QQ", first << 9 | place >> 43, (place << 21 | count) & 2**64 - 1)
    free = filesystem._super.group_blocks - 1
    image[free * BLOCK : free * BLOCK + len(leaf)] = leaf
    begin = filesystem._super.inode_offset(inode.number)
    most = (len(inode.fork) - 4) // 16
    root = struct.pack(">HHQ", 1, 1, 0).ljust(4 + 8 * most, b"\0") + struct.pack(">Q", free)
    image[begin + 5] = 3
    image[begin + CORE : begin + CORE + len(root)] = root
    changed = XfsFileSystem(Memory(bytes(image)))
    assert content_of(changed, b"large") == (source / "large").read_bytes()
    # The same child twice, as a tree would have that has no end.
    twice = struct.pack(">HHQQ", 1, 2, 0, 9).ljust(4 + 8 * most, b"\0") + struct.pack(">QQ", free, free)
    image[begin + CORE : begin + CORE + len(twice)] = twice
    with pytest.raises(FilesystemError, match="not where they can be"):
        content_of(XfsFileSystem(Memory(bytes(image))), b"large")


@pytest.mark.parametrize("seed", range(4))
def test_whatever_a_guest_writes_the_walk_ends_with_an_error_of_ours_or_none(seed, tmp_path):
    source = make_tree(tmp_path / "source")
    for path in (source / "many").iterdir():
        path.unlink()
    image = make_xfs(tmp_path / "image", source)
    rng = random.Random(seed)
    used = [at for at in range(0, 4 << 20, 64) if any(image[at : at + 64])]
    used = [at for at in used if at < 512 or image[at : at + 64].strip(b"\0")][:4000]
    for _ in range(30):
        changes = {rng.choice(used) + rng.randrange(64): rng.randrange(256) for _ in range(60)}
        device = Sparse(image, changes)
        begun = time.monotonic()
        with suppress(FilesystemError):
            filesystem = detect.open_file_system(device)
            for _, node in tree.walk(filesystem, filesystem.root()):
                if node.kind == "file":
                    for _piece in filesystem.content(node):
                        pass
                elif node.kind == "link":
                    filesystem.target(node)
        assert time.monotonic() - begun < 20
        assert device.read_bytes < 1 << 30
