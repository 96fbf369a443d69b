# SPDX-License-Identifier: GPL-2.0-or-later
"""A repository on a file system that maps no file shared: FUSE with direct I/O."""

import mmap

import pytest

from tests.conftest import MIB


def test_a_repository_on_fuse_is_one_like_any_other(any_build, make_lab, fuse_directory):
    (fuse_directory / "file").write_bytes(b"x")
    with (fuse_directory / "file").open("rb") as file, pytest.raises(OSError, match="No such device"):
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    lab = make_lab(any_build, {"vda": 4 * MIB})
    lab.cli.repository = fuse_directory / "repository"
    assert lab.cli.json("doctor", "web")["ok"]
    lab.writer.write(10)
    lab.backup("full")
    lab.writer.write(10)
    report = lab.backup("incremental")
    assert [(disk["kind"], disk["scanned"]) for disk in report["disks"]] == [("incremental", False)]
    found = lab.cli.json("verify", "web", vm=False)
    assert (found["damage"], found["unchecked"]) == ([], [])
    lab.assert_point(report["point"], lab.writer.moment)
    assert {one["verdict"] for one in lab.cli.json("doctor", "web")["findings"]} == {"ok"}
