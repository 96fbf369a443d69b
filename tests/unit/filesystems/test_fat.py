# SPDX-License-Identifier: GPL-2.0-or-later
"""FAT of all three widths, as the distribution's own tools write it."""

import os
import random
import shutil
import time
from pathlib import Path

import pytest

from backupctl.errors import FilesystemError
from backupctl.filesystems import detect, tree
from tests.unit.filesystems.sources import Memory, everything, of_directory, run

MKFS = shutil.which("mkfs.vfat", path=f"{os.environ['PATH']}:/sbin:/usr/sbin")
MCOPY = shutil.which("mcopy")
pytestmark = pytest.mark.skipif(not (MKFS and MCOPY), reason="needs dosfstools and mtools")


def make(image: Path, source: Path, width: str, size: int) -> bytes:
    assert MKFS
    assert MCOPY
    with image.open("wb") as file:
        file.truncate(size)
    run(MKFS, "-F", width, "-s", "1", str(image))
    run(MCOPY, "-s", "-i", str(image), *map(str, source.iterdir()), "::/")
    return image.read_bytes()


def files(directory: Path) -> Path:
    (directory / "EFI/BOOT").mkdir(parents=True)
    (directory / "EFI/BOOT/BOOTX64.EFI").write_bytes(os.urandom(100_001))
    (directory / "a name that is longer than eight.text").write_text("long")
    (directory / "empty").touch()
    for number in range(60):
        (directory / f"EFI/file {number}").write_text(str(number))
    return directory


@pytest.mark.parametrize(("width", "size"), [("12", 1 << 21), ("16", 1 << 23), ("32", 1 << 26)])
def test_every_file_is_read_as_it_was_written(tmp_path, width, size):
    source = files(tmp_path / "source")
    device = Memory(make(tmp_path / "image", source, width, size))
    assert detect.kind(device) == "FAT"
    assert everything(detect.open_file_system(device)) == of_directory(source)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_a_guest_writes_the_walk_ends_with_an_error_of_ours_or_none(tmp_path, seed):
    image = make(tmp_path / "image", files(tmp_path / "source"), "16", 1 << 23)
    rng = random.Random(seed)
    used = [at for at in range(0, len(image), 64) if any(image[at : at + 64])]
    for _ in range(30):
        changed = bytearray(image)
        for _ in range(rng.randrange(1, 40)):
            changed[rng.choice(used) + rng.randrange(64)] = rng.randrange(256)
        begun = time.monotonic()
        try:
            filesystem = detect.open_file_system(Memory(bytes(changed)))
            for _, node in tree.walk(filesystem, filesystem.root()):
                for _piece in filesystem.content(node) if node.kind == "file" else ():
                    pass
        except FilesystemError:
            pass
        assert time.monotonic() - begun < 20
