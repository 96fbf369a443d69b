# SPDX-License-Identifier: GPL-2.0-or-later
"""Small files of the host are read whole or not at all, and no link or device is followed."""

import os
from pathlib import Path

import pytest

from backupctl.system import bounded_read
from backupctl.system.bounded_read import Unusable


def test_a_plain_file_is_read_whole(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 100)
    assert bounded_read.read(tmp_path / "f", 100) == b"x" * 100


def test_a_file_that_is_too_large_is_refused(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 101)
    with pytest.raises(Unusable, match="too large"):
        bounded_read.read(tmp_path / "f", 100)


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(b"x")
    real = os.pread

    def growing(descriptor, length, offset):
        with (tmp_path / "f").open("ab") as file:
            file.write(b"y")
        return real(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", growing)
    with pytest.raises(Unusable, match="changed"):
        bounded_read.read(tmp_path / "f", 100)


@pytest.mark.parametrize("kind", ["link", "pipe", "directory", "device", "missing"])
def test_what_is_not_a_plain_file_is_refused_without_waiting(tmp_path, kind):
    path = tmp_path / "f"
    if kind == "link":
        (tmp_path / "g").write_bytes(b"secret")
        path.symlink_to("g")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/zero")
    with pytest.raises(Unusable):
        bounded_read.read(path, 100)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make links of other users")
def test_a_link_of_another_user_on_the_way_is_refused_and_one_of_root_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/f").write_bytes(b"x")
    (tmp_path / "link").symlink_to("real")
    assert bounded_read.read(tmp_path / "link/f", 100) == b"x"
    os.chown(tmp_path / "link", 64055, 64055, follow_symlinks=False)
    with pytest.raises(Unusable, match="symbolic link of user 64055"):
        bounded_read.read(tmp_path / "link/f", 100)


def test_no_descriptor_stays_open(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 101)
    before = len(os.listdir("/proc/self/fd"))
    for most in (100, 101):
        try:
            bounded_read.read(tmp_path / "f", most)
        except Unusable:
            continue
    assert len(os.listdir("/proc/self/fd")) == before
