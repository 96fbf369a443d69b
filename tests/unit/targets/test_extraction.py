# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of a guest on the host: no name, kind or mode of theirs leads anywhere or grants anything."""

import os
import stat

import pytest

from backupctl.errors import FilesystemError, TargetExists, UsageError, WriteFailed
from backupctl.targets import extraction
from backupctl.targets.extraction import UnsafeName


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "repository").mkdir()
    return tmp_path / "repository"


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/etc/passwd", b"../x", b"a\0b", b"n" * 256])
def test_a_name_that_is_not_one_plain_component_is_refused(name, tmp_path, repository):
    with extraction.into(tmp_path / "out", repository) as out:
        with pytest.raises(UnsafeName):
            out.file(name, [b"x"], executable=False, modified=0)
        with pytest.raises(UnsafeName), out.directory(name):
            pass
    assert sorted(os.listdir(tmp_path)) == ["out", "repository"]
    assert os.listdir(tmp_path / "out") == []


def test_a_link_that_is_in_the_way_is_neither_followed_nor_replaced(tmp_path, repository):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").symlink_to(outside / "file")
    (tmp_path / "out/new").symlink_to(outside / "new")
    (tmp_path / "out/directory").symlink_to(outside)
    with extraction.into(tmp_path / "out", repository) as out:
        for name in (b"file", b"new"):
            with pytest.raises(TargetExists):
                out.file(name, [b"theirs"], executable=False, modified=0)
        with pytest.raises(TargetExists), out.directory(b"directory"):
            pass
    assert (outside / "file").read_text() == "mine"
    assert os.listdir(outside) == ["file"]


def test_a_directory_that_is_exchanged_for_a_link_meanwhile_is_still_the_one_written_to(tmp_path, repository):
    outside = tmp_path / "outside"
    outside.mkdir()
    with extraction.into(tmp_path / "out", repository) as out, out.directory(b"d") as below:
        (tmp_path / "out/d").rename(tmp_path / "moved")
        (tmp_path / "out/d").symlink_to(outside)
        below.file(b"file", [b"x"], executable=False, modified=0)
    assert os.listdir(outside) == []
    assert (tmp_path / "moved/file").read_bytes() == b"x"


def test_files_are_private_sparse_and_have_their_time(tmp_path, repository):
    with extraction.into(tmp_path / "out", repository) as out:
        out.file(b"a", [b"head", 1 << 30, b"tail", 1 << 20], executable=False, modified=1_000_000_000)
        out.file(b"b", [], executable=True, modified=1 << 62)
        with out.directory(b"d"):
            pass
        assert (out.files, out.directories, out.data_bytes) == (2, 1, 8)
    found = (tmp_path / "out/a").stat()
    assert (found.st_size, found.st_mtime) == (8 + (1 << 30) + (1 << 20), 1_000_000_000)
    assert found.st_blocks * 512 < 1 << 20
    modes = {name: stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) for name in "abd"}
    assert modes == {"a": 0o600, "b": 0o700, "d": 0o700}


def test_a_file_whose_content_cannot_be_read_to_its_end_is_removed(tmp_path, repository):
    def content():
        yield b"half"
        raise FilesystemError("damaged")

    with extraction.into(tmp_path / "out", repository) as out:
        with pytest.raises(FilesystemError):
            out.file(b"a", content(), executable=False, modified=0)
        with pytest.raises(WriteFailed):
            out.file(b"b", [(1 << 63) - 1, b"x"], executable=False, modified=0)
    assert os.listdir(tmp_path / "out") == []


def test_a_target_inside_the_repository_or_that_is_a_file_is_refused(tmp_path, repository):
    (tmp_path / "file").touch()
    for target in (repository / "out", tmp_path / "file"):
        with pytest.raises(UsageError), extraction.into(target, repository):
            pass
    assert os.listdir(repository) == []
