# SPDX-License-Identifier: GPL-2.0-or-later
"""The strict parser of users' qcow2 headers, held against what qemu-img makes."""

import os
import struct
import subprocess
from pathlib import Path

import pytest

from backupctl.images import foreign_header
from backupctl.images.foreign_header import ForeignHeader

SECRET = ["--object", "secret,id=key,data=geheim"]


def made(directory: Path, *arguments: str) -> ForeignHeader:
    path = directory / "image"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *arguments, str(path), "1M"]
    subprocess.run(command, check=True, timeout=60, cwd=directory)
    return foreign_header.parse(path.read_bytes())


@pytest.mark.parametrize(
    ("options", "features"),
    [
        ([], set()),
        (["-o", "compat=0.10"], set()),
        (["-o", "cluster_size=512"], set()),
        (["-o", "cluster_size=2M,extended_l2=on"], set()),
        (["-o", "lazy_refcounts=on,compression_type=zstd"], set()),
        (["-u", "-b", "below.qcow2", "-F", "qcow2"], {"backing"}),
        (["-o", "compat=0.10", "-u", "-b", "nbd://host/x", "-F", "raw"], {"backing"}),
        (["-o", "data_file=data.raw,data_file_raw=on"], {"data-file"}),
        (["-o", "data_file=data.raw", "-u", "-b", "below.raw", "-F", "raw"], {"backing", "data-file"}),
        ([*SECRET, "-o", "encrypt.format=aes,encrypt.key-secret=key"], {"encryption"}),
    ],
)
def test_it_tells_what_each_kind_of_image_leads_to(tmp_path, options, features):
    found = made(tmp_path, *options)
    assert found.features == features
    assert found.size == 1 << 20
    assert not found.corrupt
    assert found.data_file == ("data.raw" if "data-file" in features else "")


def test_it_names_the_backing_file_whole(tmp_path):
    name = "n" * 1000
    assert made(tmp_path, "-u", "-b", name, "-F", "raw").backing == name


def header(tmp_path: Path) -> bytearray:
    made(tmp_path)
    return bytearray((tmp_path / "image").read_bytes())


@pytest.mark.parametrize(
    ("at", "form", "value", "match"),
    [
        (0, ">I", 0, "no qcow2 magic"),
        (4, ">I", 1, "version 1"),
        (4, ">I", 4, "version 4"),
        (20, ">I", 8, "invalid size"),
        (20, ">I", 22, "invalid size"),
        (8, ">Q", 1 << 40, "outside"),
        (72, ">Q", 1 << 5, "0x20"),
        (72, ">Q", 1 << 63, "unknown incompatible"),
        (100, ">I", 72, "only 72 bytes"),
        (100, ">I", 1 << 20, "invalid size"),
        (116, ">I", 1 << 20, "longer than the header"),
    ],
)
def test_what_qemu_would_not_open_is_refused(tmp_path, at, form, value, match):
    content = header(tmp_path)
    struct.pack_into(form, content, at, value)
    if at == 8:
        struct.pack_into(">I", content, 16, 10)
    with pytest.raises(ValueError, match=match):
        foreign_header.parse(bytes(content))


def test_a_header_cut_off_anywhere_is_refused_or_leads_nowhere(tmp_path):
    content = bytes(header(tmp_path))
    for length in range(600):
        try:
            found = foreign_header.parse(content[:length])
        except ValueError:
            continue
        assert found.features == set()


def test_the_name_of_a_data_file_without_its_bit_counts_too(tmp_path):
    """QEMU passes over it; a strict reader does not."""
    made(tmp_path, "-o", "data_file=data.raw")
    content = bytearray((tmp_path / "image").read_bytes())
    content[79] &= ~4
    assert foreign_header.parse(bytes(content)).features == {"data-file"}


def test_an_image_that_qemu_marked_corrupt_is_told(tmp_path):
    content = header(tmp_path)
    content[79] |= 2
    assert foreign_header.parse(bytes(content)).corrupt


def test_random_bytes_are_refused():
    for _ in range(200):
        with pytest.raises(ValueError, match=r"magic number|truncated"):
            foreign_header.parse(os.urandom(300))
