# SPDX-License-Identifier: GPL-2.0-or-later
import os
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from backupctl.errors import (
    DamageFound,
    InvalidName,
    Locked,
    NoSuchPoint,
    NotARepository,
    RepositoryError,
    UnknownFormat,
)
from backupctl.names import VmName, disk_name, point_time, vm_name
from backupctl.repository.pending_point import PendingPoint
from backupctl.repository.repository import Repository
from backupctl.system import durable, safe_open
from tests.unit.points import P1, P2, P3, Builder, disk_entry


def plain_point(builder: Builder, point):
    partial = builder.begin(point)
    (partial.path / "vda.qcow2").write_bytes(b"image")
    (partial.path / "vda.digests").write_bytes(b"")
    return partial.commit(builder.manifest(point, disk_entry()))


def test_a_repository_keeps_its_id(tmp_path):
    made = Repository.create(tmp_path / "a" / "b")
    assert Repository.open(tmp_path / "a" / "b") == made
    assert Repository.open_or_create(tmp_path / "a" / "b") == made
    assert made.owner.tag == made.id[:8]


def test_the_name_of_each_directory_that_is_made_for_it_is_durable(tmp_path, monkeypatch):
    synced = []
    real = durable.sync_directory
    monkeypatch.setattr(durable, "sync_directory", lambda path: (synced.append(path), real(path)))
    Repository.create(tmp_path / "a" / "b" / "c")
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"} <= set(synced)


def test_a_directory_with_other_things_is_not_made_a_repository(tmp_path):
    (tmp_path / "letters").mkdir()
    with pytest.raises(NotARepository):
        Repository.open_or_create(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["letters"]


def test_a_repository_is_not_made_twice(tmp_path):
    made = Repository.create(tmp_path)
    with pytest.raises(RepositoryError, match="already"):
        Repository.create(tmp_path)
    assert Repository.open(tmp_path) == made


def test_the_root_of_a_new_file_system_can_be_a_repository(tmp_path):
    (tmp_path / "lost+found").mkdir()
    assert Repository.open_or_create(tmp_path).vms() == []


def test_a_death_while_a_repository_was_made_needs_no_hand(tmp_path):
    (tmp_path / ".repository.json.0123abcd.new").write_bytes(b"{")
    assert Repository.open_or_create(tmp_path) == Repository.open(tmp_path)


def test_two_that_make_a_repository_at_once_agree_on_its_id(tmp_path):
    for number in range(30):
        found: list[Repository] = []
        path = tmp_path / str(number)
        path.mkdir()
        barrier = threading.Barrier(4)

        def make(path=path, barrier=barrier, found=found):
            barrier.wait(60)
            found.append(Repository.open_or_create(path))

        threads = [threading.Thread(target=make) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len({repository.id for repository in found}) == 1
        assert len(found) == 4
        assert [entry.name for entry in path.iterdir()] == ["repository.json"]


def test_a_newer_repository_is_refused(tmp_path):
    (tmp_path / "repository.json").write_text('{"format": 2, "id": "x", "new": 1}')
    with pytest.raises(UnknownFormat):
        Repository.open(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", '{"format": 1, "id": "../../../../etc/aaaaaaaaaaaaaaaaaa"}'])
def test_a_damaged_repository_file_is_damage(tmp_path, content):
    (tmp_path / "repository.json").write_text(content)
    with pytest.raises(DamageFound):
        Repository.open_or_create(tmp_path)


def test_what_is_no_directory_is_no_repository(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotARepository):
        Repository.open(tmp_path / "file")
    with pytest.raises(RepositoryError):
        Repository.open_or_create(tmp_path / "file")


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/etc", ".hidden", "x.partial", "a\0b", "a\nb"])
def test_a_vm_name_can_not_leave_the_repository(tmp_path, name):
    with pytest.raises(InvalidName):
        Repository.create(tmp_path / "r").vm(VmName(name))


@pytest.mark.parametrize("name", ["lost+found", "repository.json"])
def test_names_that_a_repository_has_already_are_refused(name):
    for check in (vm_name, disk_name):
        with pytest.raises(InvalidName, match="uses this name already"):
            check(name)


def test_points_come_oldest_first_and_latest_is_the_last(builder: Builder):
    for point in (P2, P1, P3):
        plain_point(builder, point)
    assert [point.id for point in builder.directory.points()] == [P1, P2, P3]
    assert builder.directory.point("latest").id == P3
    assert builder.directory.point(P1).id == P1
    assert builder.repository.vms() == ["vm1"]


def test_a_point_that_is_not_there_is_told(builder: Builder):
    with pytest.raises(NoSuchPoint):
        builder.directory.point("latest")
    with pytest.raises(NoSuchPoint):
        builder.directory.point(P1)
    with pytest.raises(InvalidName):
        builder.directory.point("../vm1")


def test_a_point_that_a_prune_removes_meanwhile_is_none_and_not_damaged(builder: Builder, monkeypatch):
    """Whoever lists points takes no lock."""
    plain_point(builder, P1)
    plain_point(builder, P2)
    real = safe_open.read

    def too_late(path: Path, most_bytes: int) -> bytes:
        if path.parent.name == P1:
            PendingPoint(builder.directory.path, builder.directory.name, P1).uncommit()
        return real(path, most_bytes)

    monkeypatch.setattr(safe_open, "read", too_late)
    survey = builder.directory.scan_points()
    assert ([point.id for point in survey.points], survey.damaged) == ([P2], ())
    PendingPoint(builder.directory.path, builder.directory.name, P1).path.rename(builder.directory.path / P1)
    with pytest.raises(NoSuchPoint):
        builder.directory.point(P1)


def test_a_partial_is_no_point_but_its_id_is_in_use(builder: Builder):
    plain_point(builder, P1)
    partial = builder.begin(P2)
    assert not builder.directory.is_committed(P2)
    assert [point.id for point in builder.directory.points()] == [P1]
    assert builder.directory.newest() == P2
    assert builder.directory.pending_points() == [partial]


def test_one_damaged_point_does_not_hide_the_others(builder: Builder):
    for point in (P1, P2, P3):
        plain_point(builder, point)
    (builder.directory.path / P2 / "manifest.json").write_text("{}")
    survey = builder.directory.scan_points()
    assert [point.id for point in survey.points] == [P1, P3]
    ((path, error),) = survey.damaged
    assert path == builder.directory.path / P2
    assert str(path) in error.message
    with pytest.raises(DamageFound):
        builder.directory.points()


def test_a_point_in_another_ones_directory_is_damage(builder: Builder):
    plain_point(builder, P1).path.rename(builder.directory.path / P2)
    with pytest.raises(DamageFound, match="another point"):
        builder.directory.point(P2)


def test_a_manifest_behind_a_symbolic_link_is_not_read(builder: Builder, tmp_path):
    path = plain_point(builder, P1).path / "manifest.json"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamageFound):
        builder.directory.point(P1)


def test_a_manifest_that_is_a_pipe_does_not_hang(builder: Builder):
    path = plain_point(builder, P1).path / "manifest.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DamageFound):
        builder.directory.point(P1)


def test_a_linked_directory_is_no_point(builder: Builder, tmp_path):
    plain_point(builder, P1).path.rename(tmp_path / "elsewhere")
    (builder.directory.path / P1).symlink_to(tmp_path / "elsewhere")
    assert not builder.directory.is_committed(P1)
    assert builder.directory.points() == ()


def test_a_second_run_is_locked_out_and_told_by_whom(builder: Builder):
    with builder.directory.lock(), pytest.raises(Locked, match=str(os.getpid())), builder.directory.lock():
        raise AssertionError
    with builder.directory.lock():
        pass


HOLD = """
import sys, time
from pathlib import Path
from backupctl.names import VmName, point_time
from backupctl.repository.repository import Repository
with Repository.open(Path(sys.argv[1])).vm(VmName("vm1")).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_dead_run_leaves_no_lock(builder: Builder):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(builder.repository.path)], stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(Locked, match=str(holder.pid)), builder.directory.lock():
            raise AssertionError
    finally:
        holder.kill()
        holder.wait(60)
        holder.stdout.close()
    with builder.directory.lock():
        assert builder.directory.exists()


def test_a_lock_behind_a_symbolic_link_is_refused(builder: Builder, tmp_path):
    builder.directory.path.mkdir()
    (builder.directory.path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(RepositoryError), builder.directory.lock():
        raise AssertionError
    assert not (tmp_path / "precious").exists()


def test_a_note_is_read_back_and_a_damaged_journal_is_none(builder: Builder):
    partial = builder.begin(P1)
    partial.note("freeze", froze=True)
    assert partial.journal() == replace(builder.journal(P1), step="freeze", froze=True)
    (partial.path / "run.json").write_text("{")
    assert partial.journal() is None
    (partial.path / "run.json").unlink()
    assert partial.journal() is None


def test_a_journal_of_another_point_is_not_believed(builder: Builder):
    partial = builder.begin(P1)
    (partial.path / "run.json").write_bytes(builder.journal(P2).to_json())
    assert partial.journal() is None


def test_dropping_leaves_nothing_and_may_be_repeated(builder: Builder):
    partial = builder.begin(P1)
    (partial.path / "vda.qcow2").write_bytes(b"x")
    (partial.path / "vda.digests").write_bytes(b"")
    (partial.path / "deep").mkdir()
    partial.drop()
    partial.drop()
    assert builder.directory.pending_points() == []
    assert not partial.path.exists()


def test_dropping_does_not_follow_links_out_of_the_directory(builder: Builder, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    partial = builder.begin(P1)
    (partial.path / "link").symlink_to(precious)
    partial.drop()
    assert (precious / "file").exists()
    partial.path.symlink_to(precious)
    assert builder.directory.pending_points() == []
    with pytest.raises(RepositoryError):
        partial.drop()
    assert (precious / "file").exists()


def test_a_committed_point_holds_no_journal_and_only_what_it_should(builder: Builder):
    path = plain_point(builder, P1).path
    assert sorted(entry.name for entry in Path(path).iterdir()) == [
        "manifest.json",
        "vda.digests",
        "vda.qcow2",
    ]


def test_no_two_vms_of_a_repository_ever_have_a_point_of_one_id(builder: Builder):
    """A disk that moves takes its bitmap along, which must not look like one of the other VM's points."""
    builder.begin(P1)
    now = point_time(P1)
    second, third = builder.repository.vm(VmName("vm2")), builder.repository.vm(VmName("vm3"))
    with builder.repository.next_point(second, now) as point:
        assert point > P1
    with builder.repository.next_point(third, now - timedelta(days=1)) as point:
        assert point < P1


def test_choosing_an_id_waits_for_others_who_choose_but_not_for_ever(builder: Builder, monkeypatch):
    monkeypatch.setattr("backupctl.repository.repository._NAMING_SECONDS", 0.2)
    choose = builder.repository.next_point
    with (
        choose(builder.directory, point_time(P1)),
        pytest.raises(Locked),
        choose(builder.directory, point_time(P1)),
    ):
        pass
