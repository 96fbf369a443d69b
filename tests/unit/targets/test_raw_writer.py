# SPDX-License-Identifier: GPL-2.0-or-later
"""Raw bytes at their own place: sparse, cut at the end of the disk, and no byte behind it on a device."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from backupctl.errors import WriteFailed
from backupctl.images.open_image import OpenImage
from backupctl.sizes import CLUSTER_BYTES
from backupctl.system.direct_io import DirectWriter, aligned
from backupctl.targets.raw_writer import RawWriter


def numbers(*these: int) -> np.ndarray:
    return np.array(these, np.uint64)


def clusters(*values: int) -> memoryview:
    content = aligned(len(values) * CLUSTER_BYTES)
    for place, value in enumerate(values):
        content[place * CLUSTER_BYTES : (place + 1) * CLUSTER_BYTES] = bytes([value]) * CLUSTER_BYTES
    return content


def bytes_of(*values: int) -> bytes:
    return b"".join(bytes([value]) * CLUSTER_BYTES for value in values)


def test_a_file_is_sparse_and_ends_where_the_disk_ends(tmp_path):
    size = 900 * CLUSTER_BYTES + 700
    with OpenImage.create(tmp_path / "raw") as image, RawWriter(image, size, onto_device=False) as writer:
        writer.write(numbers(1, 2, 7), [clusters(1, 2), clusters(7)])
        writer.write(numbers(900), [clusters(9)])
        writer.finish()
    content = (tmp_path / "raw").read_bytes()
    wanted = bytes_of(0, 1, 2, 0, 0, 0, 0, 7).ljust(900 * CLUSTER_BYTES, b"\0") + b"\x09" * 700
    assert content == wanted
    assert (tmp_path / "raw").stat().st_blocks * 512 < 8 * CLUSTER_BYTES


def test_a_file_without_any_data_has_the_size_of_the_disk(tmp_path):
    with OpenImage.create(tmp_path / "raw") as image, RawWriter(image, 12345, onto_device=False) as writer:
        writer.finish()
    assert (tmp_path / "raw").read_bytes() == bytes(12345)


@pytest.mark.parametrize("punches", [True, False])
def test_a_device_gets_the_disk_and_keeps_what_is_behind_it(tmp_path: Path, monkeypatch, punches):
    if not punches:
        monkeypatch.setattr(DirectWriter, "punch", lambda *_run: False)
    path = tmp_path / "device"
    path.write_bytes(bytes_of(5, 5, 5, 5))
    path.chmod(0o600)
    size = 3 * CLUSTER_BYTES + 512
    with OpenImage.open(path, writable=True) as image, RawWriter(image, size, onto_device=True) as writer:
        writer.zero(numbers(0, 2))
        writer.write(numbers(1), [clusters(1)])
        writer.write(numbers(3), [clusters(3)])
        writer.finish()
        assert path.read_bytes() == bytes_of(0, 1, 0) + b"\3" * 512 + b"\5" * (CLUSTER_BYTES - 512)
        writer.zero(numbers(3))
    assert path.read_bytes() == bytes_of(0, 1, 0) + bytes(512) + b"\5" * (CLUSTER_BYTES - 512)


def test_a_failed_write_is_told(tmp_path, monkeypatch):
    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with OpenImage.create(tmp_path / "raw") as image, RawWriter(image, 1 << 20, onto_device=False) as writer:
        monkeypatch.setattr(os, "pwritev", full)
        with pytest.raises(WriteFailed, match="No space left"):
            writer.write(numbers(1), [clusters(1)])
