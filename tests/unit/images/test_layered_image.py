# SPDX-License-Identifier: GPL-2.0-or-later
"""A chain that is read by its tables holds what QEMU reads in it."""

import os
import random
import struct
import subprocess
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from backupctl.digests.clusters import count
from backupctl.errors import ReadFailed, RepositoryUnreadable
from backupctl.images.layered_image import LayeredImage
from backupctl.images.open_image import OpenImage
from backupctl.sizes import CLUSTER_BYTES
from backupctl.system import direct_io
from backupctl.system.direct_io import aligned


def tool(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def chain(directory: Path, seed: int, clusters: int = 40) -> list[Path]:
    """Make layers of any sizes, newest first, with writes of any length, and zeroes."""
    rand, made = random.Random(seed), []
    for number in range(5):
        path, size = directory / f"{number}.qcow2", 512 * rand.randrange(1, clusters * 128)
        backing = ["-b", made[0], "-F", "qcow2"] if made else []
        tool("qemu-img", "create", "-q", "-f", "qcow2", *backing, path, str(size))
        words = []
        for _ in range(rand.randint(0, 8)):
            begin = 512 * rand.randrange(size // 512)
            length = min(512 * rand.randint(1, 600), size - begin)
            zero = rand.random() < 0.3
            words += ["-c", f"write -q {'-z' if zero else f'-P {rand.randint(1, 255)}'} {begin} {length}"]
        if words:
            tool("qemu-io", "-f", "qcow2", *words, path)
        made.insert(0, path)
    return made


def read_all(disk: LayeredImage, rand: random.Random) -> bytes:
    """Read what is data, in pieces of any clusters, and leave the rest zeroes."""
    found = np.zeros(count(disk.size) * CLUSTER_BYTES, np.uint8)
    numbers = [
        first + place for first, places in disk.windows() for place in np.flatnonzero(places.data).tolist()
    ]
    rand.shuffle(numbers)
    buffer = aligned(16 * CLUSTER_BYTES)
    while numbers:
        piece = sorted(numbers[: (length := rand.randint(1, 16))])
        numbers = numbers[length:]
        buffer[:] = b"\xaa" * buffer.nbytes
        disk.read(np.array(piece, np.uint64), buffer)
        for place, number in enumerate(piece):
            content = np.frombuffer(buffer[place * CLUSTER_BYTES : (place + 1) * CLUSTER_BYTES], np.uint8)
            found[number * CLUSTER_BYTES : (number + 1) * CLUSTER_BYTES] = content
    assert not found[disk.size :].any()
    return found[: disk.size].tobytes()


def opened(held: ExitStack, layers: list[Path]) -> LayeredImage:
    images = [held.enter_context(OpenImage.open(path)) for path in layers]
    return held.enter_context(LayeredImage(images))


@pytest.mark.parametrize("seed", range(12))
def test_any_chain_is_read_as_qemu_reads_it(tmp_path, seed):
    layers = chain(tmp_path, seed)
    tool("qemu-img", "convert", "-O", "raw", layers[0], tmp_path / "raw")
    with ExitStack() as held:
        assert read_all(opened(held, layers), random.Random(seed)) == (tmp_path / "raw").read_bytes()


def test_clusters_of_two_windows_are_read_at_once(tmp_path):
    path = tmp_path / "large.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", path, "3G")
    tool("qemu-io", "-f", "qcow2", "-c", f"write -q -P 7 {8191 * CLUSTER_BYTES} 128k", path)
    with ExitStack() as held:
        disk = opened(held, [path])
        assert disk.stored_windows() == [0, 1]
        buffer = aligned(4 * CLUSTER_BYTES)
        disk.read(np.array([8190, 8191, 8192, 8193], np.uint64), buffer)
    assert bytes(buffer) == bytes(CLUSTER_BYTES) + b"\7" * 2 * CLUSTER_BYTES + bytes(CLUSTER_BYTES)


@pytest.fixture
def full(tmp_path) -> Path:
    path = tmp_path / "full.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
    tool("qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 4M", path)
    return path


def test_an_entry_that_leads_nowhere_fails_its_cluster_and_no_other(full):
    content = bytearray(full.read_bytes())
    (first,) = struct.unpack_from(">Q", content, 40)
    second = struct.unpack_from(">Q", content, first)[0] & (1 << 56) - 512
    content[second + 8 * 12 + 6] ^= 2
    full.write_bytes(content)
    with ExitStack() as held:
        disk, buffer = opened(held, [full]), aligned(2 * CLUSTER_BYTES)
        disk.read(np.array([11, 13], np.uint64), buffer)
        assert bytes(buffer) == b"\7" * 2 * CLUSTER_BYTES
        with pytest.raises(ReadFailed):
            disk.read(np.array([11, 12], np.uint64), buffer)
        assert disk.refused is None


def test_what_the_operating_system_refuses_is_not_taken_for_damage(full, monkeypatch):
    def broken(*_arguments):
        raise OSError(5, os.strerror(5))

    with ExitStack() as held:
        disk = opened(held, [full])
        assert len(list(disk.windows())) == 1  # the tables are known
        monkeypatch.setattr(direct_io.os, "preadv", broken)
        with pytest.raises(ReadFailed):
            disk.read(np.array([3], np.uint64), aligned(CLUSTER_BYTES))
    assert isinstance(disk.refused, RepositoryUnreadable)
    assert str(full) in disk.refused.message
