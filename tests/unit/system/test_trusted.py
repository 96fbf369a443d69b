# SPDX-License-Identifier: GPL-2.0-or-later
"""What may be believed: what root, or we, alone could have written."""

import os

import pytest

from backupctl.errors import UsageError
from backupctl.system import trusted

SOMEBODY = 12345


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a" / "b" / "backupctl.toml"
    path.parent.mkdir(parents=True)
    path.write_text("believed")
    path.chmod(0o644)
    return path


def refused(path) -> UsageError:
    with pytest.raises(UsageError) as caught:
        trusted.read(path, 100)
    return caught.value


def test_a_file_of_ours_is_read_and_no_more_of_it_than_asked_for(file):
    assert trusted.read(file, 100) == b"believed"
    assert trusted.read(file, 3) == b"beli"


@pytest.mark.parametrize("mode", [0o666, 0o664, 0o646])
def test_a_file_that_others_may_write_is_not_believed(file, mode):
    file.chmod(mode)
    err = refused(file)
    assert f"{mode:04o}" in err.message
    os.system(err.next_command)
    assert trusted.read(file, 100) == b"believed"


@pytest.mark.parametrize("above", [0, 1])
def test_nor_is_one_below_a_directory_that_others_may_write(file, above):
    directory = file.parents[above]
    directory.chmod(0o777)
    assert f"{directory} is not trusted" in refused(file).message
    directory.chmod(0o1777)  # sticky, as /tmp
    assert trusted.read(file, 100) == b"believed"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize("what", ["file", "directory", "a directory above", "link", "sticky directory"])
def test_what_belongs_to_somebody_else_is_not_believed(file, tmp_path, what):
    link = tmp_path / "link"
    link.symlink_to(file)
    given = {"file": file, "link": link, "a directory above": file.parent.parent}.get(what, file.parent)
    os.chown(given, SOMEBODY, 0, follow_symlinks=False)
    if what == "sticky directory":  # whose owner may rename all that is in it
        file.parent.chmod(0o1755)
    err = refused(link if what == "link" else file)
    assert f"{given} is not trusted: it belongs to user {SOMEBODY}" in err.message
    assert err.state == "nothing was touched"


def test_links_are_followed_where_each_step_may_be_believed(file, tmp_path):
    (tmp_path / "to").symlink_to("a/../a")
    (tmp_path / "link").symlink_to(tmp_path / "to/b/backupctl.toml")
    assert trusted.read(tmp_path / "link", 100) == b"believed"
    file.parent.chmod(0o777)
    assert "is not trusted" in refused(tmp_path / "link").message
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        trusted.read(tmp_path / "loop", 100)


def test_a_link_in_a_sticky_directory_that_leads_out_of_it_must_be_ours(file, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "link").symlink_to(file)
    assert trusted.read(shared / "link", 100) == b"believed"


def test_a_relative_path_is_looked_at_from_the_root(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert trusted.read(file.relative_to(file.parent), 100) == b"believed"
    file.parent.chmod(0o777)
    assert "is not trusted" in refused(file.relative_to(file.parent)).message


def test_only_a_plain_file_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # at which an open would wait for ever
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "..", "/dev/null", "/"):
        assert "not a regular file" in refused(type(tmp_path)(path)).message
    with pytest.raises(FileNotFoundError):
        trusted.read(tmp_path / "none", 100)
    with pytest.raises(NotADirectoryError):
        trusted.read(tmp_path / "pipe" / "x", 100)


def test_no_descriptor_is_left_open(file, tmp_path):
    (tmp_path / "link").symlink_to(file)
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        trusted.read(tmp_path / "link", 100)
        assert trusted.objection(tmp_path)
    assert os.listdir("/proc/self/fd") == before
