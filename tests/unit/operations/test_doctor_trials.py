# SPDX-License-Identifier: GPL-2.0-or-later
"""File systems that can't do what a run does: `doctor` says so beforehand, a run with clear words."""

import errno
import fcntl
import mmap
import os
import stat
import tempfile
from pathlib import Path

import pytest

from backupctl.errors import Failed, RepositoryError
from backupctl.finding import Finding
from backupctl.images import nbd_server
from backupctl.names import VmName
from backupctl.operations.doctor import trials
from backupctl.repository.repository import Repository
from backupctl.system import durable, private_dir
from backupctl.targets import output
from backupctl.vm import scratch_directory


def refuse(number: int):
    def refused(*_arguments, **_options):
        raise OSError(number, os.strerror(number))

    return refused


@pytest.fixture
def no_directory_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)


def told(findings, verdict: str) -> list[str]:
    return [one.said for one in findings if one.verdict == verdict]


def test_a_directory_that_can_all_is_told_in_a_line_and_left_as_it_was(tmp_path):
    for found in (trials.of_repository(tmp_path), trials.of_scratch(tmp_path), trials.of_temporary()):
        (one,) = found
        assert isinstance(one, Finding)
        assert (one.verdict, one.subject) == ("ok", "directories")
    assert list(tmp_path.iterdir()) == []


def test_only_a_repository_or_the_directory_it_would_be_made_in_is_tried(tmp_path):
    (one,) = trials.of_repository(tmp_path / "new")
    assert str(tmp_path) in one.said
    assert list(trials.of_repository(tmp_path / "not" / "there")) == []
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_never_synced_is_refused_before_anything_is_begun(tmp_path, no_directory_syncs):
    assert any("fsync" in said for said in told(trials.of_repository(tmp_path), "bad"))
    with pytest.raises(RepositoryError, match="does not support fsync of directories"):
        Repository.create(tmp_path / "r")
    durable.sync_directory_if_it_can(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_a_restore_does_without_a_sync_of_the_directory(tmp_path, no_directory_syncs):
    with output.file(tmp_path / "out.raw", force=False) as made:
        os.write(made.descriptor, b"whole")
    assert (tmp_path / "out.raw").read_bytes() == b"whole"


def test_locks_that_are_not_to_be_had_are_told_as_that(tmp_path, monkeypatch):
    repository = Repository.create(tmp_path / "r")
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    assert len(told(trials.of_repository(tmp_path / "r"), "bad")) == 1
    assert len(told(trials.of_repository(tmp_path / "r"), "warning")) == 1
    with (
        pytest.raises(RepositoryError, match="cannot lock the repository: No locks available"),
        repository.vm(VmName("web")).lock(),
    ):
        pass
    with (
        pytest.raises(Failed, match="cannot use a temporary directory: No locks available"),
        private_dir.directory(),
    ):
        pass


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP])
def test_without_links_a_file_gets_its_name_all_the_same_and_replaces_nothing(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "link", refuse(number))
    assert told(trials.of_repository(tmp_path), "bad") == []
    (tmp_path / "made").write_text("new")
    durable.place(tmp_path / "made", tmp_path / "placed")
    assert (tmp_path / "placed").read_text() == "new"
    (tmp_path / "made").write_text("newer")
    with pytest.raises(FileExistsError):
        durable.place(tmp_path / "made", tmp_path / "placed")
    assert (tmp_path / "placed").read_text() == "new"


def test_a_file_system_without_mappings_costs_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(mmap, "mmap", refuse(errno.ENODEV))
    (said,) = told(trials.of_repository(tmp_path), "warning")
    assert "held in memory" in said


def test_a_socket_that_can_not_be_made_is_told(monkeypatch):
    monkeypatch.setattr(private_dir, "_ELSEWHERE", ())
    monkeypatch.setattr(private_dir, "_SOCKET_BYTES", 20)
    (said,) = told(trials.of_temporary(), "bad")
    assert "cannot use the temporary directory" in said


def test_a_temporary_directory_that_can_not_be_written_to_is_no_bug_of_ours(monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse(errno.ENOSPC))
    with pytest.raises(Failed, match="No space left"), nbd_server.served({}, writable=False):
        pass


def test_a_path_that_is_no_utf_8_is_refused_before_anything_is_begun(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xff"))
    with pytest.raises(RepositoryError, match="not UTF-8"):
        Repository.open_or_create(path)
    assert list(tmp_path.iterdir()) == []
    path.mkdir()
    (bad,) = trials.of_repository(path)
    assert bad.verdict == "bad"


def test_a_scratch_directory_that_can_not_be_looked_at_is_no_bug_of_ours(tmp_path, monkeypatch):
    owner = Repository.create(tmp_path / "r").owner
    assert scratch_directory.sweep(owner, VmName("web"), tmp_path / "none") == []
    monkeypatch.setattr(os, "scandir", refuse(errno.EACCES))
    with pytest.raises(Failed, match=r"cannot read the scratch directory .*: Permission denied"):
        scratch_directory.sweep(owner, VmName("web"), tmp_path)
