# SPDX-License-Identifier: GPL-2.0-or-later
"""ext2, ext3 and ext4: what their own tools wrote is read, and what a malicious guest wrote has an end."""

import random
import re
import struct
import time

import pytest

from backupctl.errors import FilesystemError, UsageError
from backupctl.filesystems import detect, tree
from backupctl.filesystems.ext import ExtFileSystem
from tests.unit.filesystems.sources import (
    Memory,
    content_of,
    everything,
    make_ext,
    make_tree,
    of_directory,
    run,
)

SHAPES = {
    "ext2": ("-t", "ext2"),
    "ext2 of 1 KiB blocks": ("-t", "ext2", "-b", "1024"),
    "ext3": ("-t", "ext3", "-b", "4096"),
    "ext4": ("-t", "ext4"),
    "meta_bg": ("-t", "ext4", "-b", "1024", "-O", "meta_bg,^resize_inode", "-g", "1024"),
    "inline_data": ("-t", "ext4", "-O", "inline_data", "-I", "256"),
    "bigalloc": ("-t", "ext4", "-O", "bigalloc"),
    "32bit": ("-t", "ext4", "-O", "^64bit,^metadata_csum"),
}
INODE_SIZE, ROOT_INODE_INDEX = 256, 1


@pytest.fixture
def source(tmp_path):
    return make_tree(tmp_path / "source")


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_every_file_of_a_file_system_is_read_as_it_was_written(options, source, tmp_path):
    if "inline_data" in options:
        (source / "sparse").unlink()  # mke2fs 1.47 writes a wrong size for it
    image = make_ext(tmp_path / "image", *options, content=source)
    filesystem = detect.open_file_system(Memory(image))
    found = everything(filesystem)
    assert found.pop("lost+found") == "directory"
    assert found == of_directory(source)
    assert filesystem.warnings == ()


def journalled(tmp_path, *options: str) -> tuple[bytes, bytes]:
    """Make a file system whose journal holds a newer block of /file; returns it and the new content."""
    (tmp_path / "s").mkdir()
    (tmp_path / "s/file").write_bytes(b"old" * 1365 + b"!")
    image = tmp_path / "image"
    make_ext(image, "-t", "ext4", "-b", "4096", *options, content=tmp_path / "s")
    block = int(run("/sbin/debugfs", "-R", "bmap /file 0", str(image)))
    # The journal's own magic number at the start of a block must be escaped in the journal.
    new = struct.pack(">I", 0xC03B3998) + b"new" * 1364
    (tmp_path / "block").write_bytes(new)
    script = f"jo\njw -b {block} {tmp_path}/block\njc\n"
    run("/sbin/debugfs", "-w", str(image), given=script)
    return image.read_bytes(), new


@pytest.mark.parametrize("options", [(), ("-O", "^64bit,^metadata_csum")], ids=["64bit", "32bit"])
def test_what_the_journal_has_committed_is_read(tmp_path, options):
    image, new = journalled(tmp_path, *options)
    filesystem = ExtFileSystem(Memory(image))
    assert content_of(filesystem, b"/file") == new
    assert filesystem.warnings == ()
    run("/sbin/e2fsck", "-fp", str(tmp_path / "image"))
    assert content_of(ExtFileSystem(Memory((tmp_path / "image").read_bytes())), b"file") == new


def test_a_transaction_without_a_commit_is_not_read(tmp_path):
    image, new = journalled(tmp_path)
    at = image.rindex(struct.pack(">II", 0xC03B3998, 2))
    cut = image[:at] + bytes(4096) + image[at + 4096 :]
    assert content_of(ExtFileSystem(Memory(cut)), b"/file") != new


def test_a_revoked_block_is_read_from_its_place(tmp_path):
    image, new = journalled(tmp_path)
    block = run("/sbin/debugfs", "-R", "bmap /file 0", str(tmp_path / "image")).strip()
    run("/sbin/debugfs", "-w", str(tmp_path / "image"), given=f"jo\njw -r {block}\njc\n")
    assert content_of(ExtFileSystem(Memory(image)), b"/file") == new
    revoked = (tmp_path / "image").read_bytes()
    assert content_of(ExtFileSystem(Memory(revoked)), b"/file") == b"old" * 1365 + b"!"


def test_a_damaged_journal_is_a_warning_and_the_rest_is_read(tmp_path):
    image, _ = journalled(tmp_path)
    at = image.index(struct.pack(">II", 0xC03B3998, 4))
    filesystem = ExtFileSystem(Memory(image[:at] + bytes(64) + image[at + 64 :]))
    assert "its journal cannot be read" in filesystem.warnings[0]
    assert content_of(filesystem, b"/file") == b"old" * 1365 + b"!"


def test_a_path_that_is_not_there_is_wrong_use(source, tmp_path):
    filesystem = ExtFileSystem(Memory(make_ext(tmp_path / "image", content=source)))
    for path, why in (
        (b"/no", "no such file or directory"),
        (b"/empty/no", "not a directory"),
        (b"/etc/../etc", "not supported"),
        (b"/link/x", "not a directory"),
    ):
        with pytest.raises(UsageError, match=why):
            tree.find(filesystem, path)


def test_a_directory_within_itself_is_damage_and_no_endless_walk(tmp_path):
    (tmp_path / "s/below").mkdir(parents=True)
    image = bytearray(make_ext(tmp_path / "image", "-t", "ext2", content=tmp_path / "s"))
    at = image.index(b"below") - 8
    image[at : at + 4] = struct.pack("<I", 2)
    filesystem = ExtFileSystem(Memory(bytes(image)))
    with pytest.raises(FilesystemError, match="is there twice"):
        list(tree.walk(filesystem, filesystem.root()))


def test_a_file_that_claims_all_blocks_many_times_is_damage(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/bomb").write_bytes(b"x" * 4096)
    image = bytearray(make_ext(tmp_path / "image", "-b", "4096", "-t", "ext4", content=tmp_path / "s"))
    node = tree.find(ExtFileSystem(Memory(bytes(image))), b"bomb")
    shown = run("/sbin/debugfs", "-R", "imap /bomb", str(tmp_path / "image"))
    block, offset = re.findall(r"block (\d+), offset (\w+)", shown)[0]
    place = int(block) * 4096 + int(offset, 16)
    extents = b"".join(struct.pack("<IHHI", number * 5000, 5000, 0, 1) for number in range(4))
    image[place + 40 : place + 100] = struct.pack("<HHHHI", 0xF30A, 4, 4, 0, 0) + extents
    image[place + 4 : place + 8] = struct.pack("<I", 20_000 * 4096)
    filesystem = ExtFileSystem(Memory(bytes(image)))
    with pytest.raises(FilesystemError, match="not where they can be"):
        list(filesystem.content(node))


@pytest.mark.parametrize("shape", ["ext2 of 1 KiB blocks", "ext4", "inline_data"])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_a_guest_writes_the_walk_ends_with_an_error_of_ours_or_none(shape, seed, tmp_path):
    (tmp_path / "s/a/b").mkdir(parents=True)
    (tmp_path / "s/a/file").write_bytes(b"y" * 50_000)
    (tmp_path / "s/a/b/link").symlink_to("b" * 100)
    image = make_ext(tmp_path / "image", *SHAPES[shape], content=tmp_path / "s", size="4M")
    rng = random.Random(seed)
    used = [at for at in range(0, len(image), 64) if any(image[at : at + 64])]
    for _ in range(30):
        changed = bytearray(image)
        for _ in range(rng.randrange(1, 40)):
            at = rng.choice(used) + rng.randrange(64)
            changed[at] = rng.choice((0, 0xFF, rng.randrange(256)))
        begun = time.monotonic()
        device = Memory(bytes(changed))
        try:
            filesystem = detect.open_file_system(device)
            for _, node in tree.walk(filesystem, filesystem.root()):
                if node.kind == "file":
                    for _piece in filesystem.content(node):
                        pass
                elif node.kind == "link":
                    filesystem.target(node)
        except FilesystemError:
            pass
        assert time.monotonic() - begun < 20
        assert device.read_bytes < 1 << 30
