# SPDX-License-Identifier: GPL-2.0-or-later
"""What other programs have made is known by its name, although we do not read it."""

import shutil
from pathlib import Path

import pytest

from backupctl.filesystems import detect
from tests.unit.filesystems.sources import Memory, run

PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
MADE_BY = [
    ("mkfs.btrfs", ("-q",), "btrfs"),
    ("mkntfs", ("-q", "-F", "-f"), "NTFS"),
    ("mkfs.exfat", (), "exFAT"),
    ("mkswap", (), "swap"),
    ("mksquashfs", (), "SquashFS"),
    ("mkfs.f2fs", ("-q",), "F2FS"),
]


@pytest.mark.parametrize(("program", "options", "kind"), MADE_BY)
def test_what_a_program_has_made_is_named(tmp_path, program, options, kind):
    found = shutil.which(program, path=PATH)
    if found is None:
        pytest.skip(f"needs {program}")
    image = tmp_path / "image"
    if program == "mksquashfs":
        (tmp_path / "content").mkdir()
        run(found, str(tmp_path / "content"), str(image), "-quiet", "-no-progress")
    else:
        with image.open("wb") as file:
            file.truncate(256 << 20)
        run(found, *options, str(image))
    assert detect.kind(beginning(image)) == kind


@pytest.mark.parametrize("version", ["luks1", "luks2"])
def test_both_versions_of_luks_are_named(tmp_path, version):
    program = shutil.which("cryptsetup", path=PATH)
    if program is None:
        pytest.skip("needs cryptsetup")
    image, key = tmp_path / "image", tmp_path / "key"
    key.write_text("secret")
    with image.open("wb") as file:
        file.truncate(32 << 20)
    quick = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
    run(program, "luksFormat", "-q", "--type", version, *quick, "--key-file", str(key), str(image))
    assert detect.kind(beginning(image)) == detect.LUKS


def test_zeroes_are_empty_and_anything_else_is_not_known():
    assert detect.kind(Memory(bytes(1 << 20))) == detect.EMPTY
    assert detect.kind(Memory(b"?".ljust(1 << 20, b"\0"))) == ""
    assert detect.kind(Memory(b"")) == detect.EMPTY


def beginning(image: Path) -> Memory:
    with image.open("rb") as file:
        return Memory(file.read(1 << 20))
