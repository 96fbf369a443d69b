# SPDX-License-Identifier: GPL-2.0-or-later
"""What is missing is missed: a VM's history, its crashes, and what is found by it."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from backupctl.cancel import Cancellation
from backupctl.errors import DamageFound, NoSuchPoint, RepositoryError
from backupctl.events.repository import NoBackup, NothingToVerify
from backupctl.operations.prune import run as prune
from backupctl.operations.prune.retention import Rules
from backupctl.operations.verify.layer import VerifyScope
from backupctl.operations.verify.run import verify
from backupctl.progress import Silent
from backupctl.repository import audit, chain, history, markers
from backupctl.repository.history import PointEvent
from backupctl.system import durable
from tests.unit.points import P1, P2, P3, Builder, changing_step, die_at, disk_entry
from tests.unit.recording import Recording

MIB = 1 << 20


def commit(builder: Builder, *points: str) -> None:
    """Make points whose manifests are whole; of images nothing is asked here."""
    for point in points:
        partial = builder.begin(point)
        (partial.path / "vda.qcow2").write_bytes(b"a")
        (partial.path / "vda.digests").write_bytes(b"")
        partial.commit(builder.manifest(point, disk_entry("vda")))


def told(builder: Builder) -> list[str]:
    return [one.message for one in audit.problems(builder.directory)]


def reconcile(builder: Builder) -> None:
    with builder.directory.lock():
        for partial in builder.directory.pending_points():
            partial.drop()
        audit.reconcile(builder.directory)


def lines(builder: Builder) -> list[dict[str, str]]:
    return [json.loads(line) for line in path(builder).read_text().splitlines()]


def path(builder: Builder) -> Path:
    return builder.directory.path / "history"


@pytest.mark.parametrize("gone", [[P2], [P3], [P1, P2, P3]], ids=["middle", "newest", "all"])
def test_points_that_were_removed_are_named(builder: Builder, gone):
    commit(builder, P1, P2, P3)
    assert told(builder) == []
    for point in gone:
        shutil.rmtree(builder.directory.path / point)
    assert [one.point for one in audit.problems(builder.directory)] == gone
    assert all("is missing" in text for text in told(builder))
    reconcile(builder)  # what the next run does does not make it good
    assert audit.missing(builder.directory) == tuple(gone)


def test_a_verify_of_a_vm_whose_points_are_all_gone_finds_damage(builder: Builder):
    commit(builder, P1)
    shutil.rmtree(builder.directory.path / P1)
    found = verify(builder.repository, builder.directory.name, None, VerifyScope(), Silent(), Cancellation())
    assert [(one.kind, one.path.name) for one in found.damage] == [("history", P1)]
    for wanted in (P1, "latest"):
        with pytest.raises(DamageFound, match="is missing"):
            verify(
                builder.repository, builder.directory.name, wanted, VerifyScope(), Silent(), Cancellation()
            )


def test_a_verify_of_a_vm_without_any_point_is_an_error(builder: Builder):
    reconcile(builder)
    with pytest.raises(NoSuchPoint, match="no recovery point of vm1"):
        verify(builder.repository, builder.directory.name, None, VerifyScope(), Silent(), Cancellation())


def test_a_verify_of_an_empty_repository_says_that_there_is_nothing(builder: Builder):
    told = Recording()
    verify(builder.repository, None, None, VerifyScope(), told, Cancellation())
    assert told.warnings == [NothingToVerify(builder.repository.path)]
    reconcile(builder)  # a first run of the VM that failed
    verify(builder.repository, None, None, VerifyScope(), told, Cancellation())
    assert told.warnings[1:-1] == [NoBackup(builder.directory.name, builder.repository.path)]


def test_a_point_of_another_content_under_the_same_name_is_found(builder: Builder):
    commit(builder, P1, P2)
    manifest = builder.directory.path / P2 / "manifest.json"
    manifest.write_bytes(builder.manifest(P2, disk_entry("vdb")).to_json())
    assert [one.point for one in audit.problems(builder.directory)] == [P2]
    assert "not the one that was committed" in told(builder)[0]


@pytest.fixture
def pruned(builder: Builder, tmp_path) -> tuple[Builder, Path]:
    """A point dropped, and its layer merged into the next one; and the repository as it was before."""
    builder.point(P1, (disk_entry(size=MIB), [(0, b"a" * 65536)]))
    builder.point(P2, (disk_entry(size=MIB, parent=P1), [(65536, b"b" * 65536)]))
    before = tmp_path / "before"
    shutil.copytree(builder.repository.path, before)
    prune.prune(builder.directory, Rules(last=1), Silent(), Cancellation())
    return builder, before


def test_what_a_prune_drops_and_changes_is_no_problem(pruned):
    builder, _ = pruned
    assert told(builder) == []
    events = [line["event"] for line in lines(builder)]
    assert events.count("dropped") == 1
    assert events.count("changing") == events.count("changed") >= 2
    assert verify(builder.repository, None, None, VerifyScope(), Silent(), Cancellation()).damage == ()


def test_older_copies_that_are_put_back_are_found(pruned):
    builder, before = pruned
    for point in (P1, P2):
        shutil.rmtree(builder.directory.path / point, ignore_errors=True)
        shutil.copytree(before / "vm1" / point, builder.directory.path / point)
    texts = told(builder)
    assert any("was dropped by a prune and is there again" in text for text in texts)
    assert any("replaced by an older copy" in text for text in texts)
    reconcile(builder)
    assert told(builder) == texts


def test_a_repository_without_a_history_is_whole_and_gets_one(builder: Builder):
    commit(builder, P1, P2)
    path(builder).unlink()
    shutil.rmtree(builder.directory.path / P1)
    assert told(builder) == []
    reconcile(builder)
    assert [(line["event"], line["point"]) for line in lines(builder)] == [("begun", None), ("found", P2)]
    shutil.rmtree(builder.directory.path / P2)
    assert audit.missing(builder.directory) == (P2,)


def test_a_point_that_an_older_backupctl_made_is_no_problem_and_written_down(builder: Builder):
    commit(builder, P1)
    kept = path(builder).read_bytes()
    commit(builder, P2)
    path(builder).write_bytes(kept)
    assert told(builder) == []
    reconcile(builder)
    assert lines(builder)[-1]["event"] == "found"


@pytest.mark.parametrize("torn", [b"{", b"\0" * 200, b"\n\n", b'{"format": 1}\n', b"\xff\xfe\nx"])
def test_a_torn_last_line_is_what_a_crash_leaves_and_is_cut_off(builder: Builder, torn):
    commit(builder, P1)
    whole = path(builder).read_bytes()
    path(builder).write_bytes(whole + torn)
    assert told(builder) == []
    commit(builder, P2)
    assert path(builder).read_bytes().startswith(whole + b'{"format": 1, "event": "committed"')
    assert told(builder) == []


def _without(number: int, content: bytes) -> bytes:
    return b"".join(line for at, line in enumerate(content.splitlines(keepends=True)) if at != number)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: _without(1, content),
        lambda content: _without(0, content),
        lambda content: content.replace(P1.encode(), P3.encode(), 1),
        lambda content: content.replace(b"committed", b"commixted", 1),
        lambda _content: b"",
        lambda content: bytes(len(content)),
    ],
    ids=["a line", "the first line", "a point", "a word", "emptied", "zeroes"],
)
def test_a_history_that_was_changed_is_told(builder: Builder, change):
    commit(builder, P1, P2)
    path(builder).write_bytes(change(path(builder).read_bytes()))
    assert [one.point for one in audit.problems(builder.directory)].count(None) == 1
    reconcile(builder)
    commit(builder, P3)
    assert None in [one.point for one in audit.problems(builder.directory)], "and goes on being told"


def test_a_death_at_any_step_raises_no_false_alarm_and_hides_no_loss(builder: Builder):
    commit(builder, P1)
    number, ended = 0, False
    while not ended:
        ended = die_at(number, lambda: commit(builder, P2), changing_step)
        assert told(builder) == [], f"after step {number}"
        reconcile(builder)
        assert told(builder) == [], f"after step {number}, and the next run"
        if builder.directory.is_committed(P2):
            builder.directory.point(P2).path.rename(builder.repository.path / "away")
            assert audit.missing(builder.directory) == (P2,)
            (builder.repository.path / "away").rename(builder.directory.path / f"{P2}.partial")
            reconcile(builder)
        number += 1
    assert number > 15


@pytest.mark.timeout(240)
def test_a_death_at_any_step_of_a_prune_raises_no_false_alarm(builder: Builder, tmp_path):
    builder.point(P1, (disk_entry(size=MIB), [(0, b"a" * 65536)]))
    builder.point(P2, (disk_entry(size=MIB, parent=P1), [(65536, b"b" * 65536)]))
    number, ended = 0, False
    while not ended:
        copy = tmp_path / f"copy{number}"
        shutil.copytree(builder.repository.path, copy)
        other = Builder(type(builder.repository).open(copy))
        ended = die_at(
            number,
            lambda other=other: prune.prune(other.directory, Rules(last=1), Silent(), Cancellation()),
            changing_step,
        )
        assert told(other) == [], f"after step {number}"
        reconcile(other)
        assert told(other) == [], f"after step {number}, and the next run"
        known = history.read(other.directory.path)
        assert known is not None
        for point in other.directory.points():
            assert known.points[point.id].manifests == (point.manifest.checksum,)
        shutil.rmtree(copy)
        number += 9
    assert number > 20


def test_a_hard_linked_copy_keeps_its_own_history(builder: Builder, tmp_path):
    commit(builder, P1)
    os.link(path(builder), tmp_path / "copy")
    before = (tmp_path / "copy").read_bytes()
    commit(builder, P2)
    assert (tmp_path / "copy").read_bytes() == before
    assert path(builder).read_bytes().startswith(before)


def test_a_failed_commit_is_undone_without_room_for_a_line(builder: Builder, monkeypatch):
    commit(builder, P1)
    before = path(builder).read_bytes()
    number, ended = 0, False
    while not ended:
        with monkeypatch.context() as full:
            fail_to_commit(builder, full, errno.ENOSPC)
            (pending,) = builder.directory.pending_points()
            ended = die_at(number, pending.drop, changing_step)
            assert told(builder) == [], f"after step {number}"
            reconcile(builder)
        assert (told(builder), builder.directory.pending_points()) == ([], []), f"after step {number}"
        assert path(builder).read_bytes() == before, f"after step {number}"
        number += 1
    assert number > 4
    commit(builder, P2)
    assert told(builder) == []


@pytest.mark.parametrize("why", ["another error", "another line is the last", "a copy shares the file"])
def test_no_line_is_cut_off_but_ones_own_for_want_of_room(builder: Builder, monkeypatch, tmp_path, why):
    commit(builder, P1)
    with monkeypatch.context() as failing:
        fail_to_commit(builder, failing, errno.ENOSPC)
    if why == "another line is the last":
        history.record(builder.directory.path, PointEvent("undone", P3))
    if why == "a copy shares the file":
        os.link(path(builder), tmp_path / "copy")
    before = path(builder).read_bytes()
    fail_to_commit(builder, monkeypatch, errno.EIO if why == "another error" else errno.ENOSPC, begin=False)
    with pytest.raises(RepositoryError):
        builder.directory.pending_points()[0].drop()
    assert path(builder).read_bytes() == before
    assert told(builder) == []  # its directory is still there, so the next run tries again


def fail_to_commit(
    builder: Builder, monkeypatch: pytest.MonkeyPatch, number: int, begin: bool = True
) -> None:
    """Let the rename of P2 and everything that is appended later fail."""

    def fail(*_arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    def append(path: Path, end: int, content: bytes) -> None:
        if content or number != errno.ENOSPC:
            fail()
        real_append(path, end, content)

    real_append = durable.append
    monkeypatch.setattr(durable, "rename", fail)
    if begin:
        with pytest.raises(RepositoryError, match="cannot commit"):
            commit(builder, P2)
    monkeypatch.setattr(durable, "append", append)
    monkeypatch.setattr(durable, "replace", fail)


def test_a_failed_sync_leaves_no_line_that_counts(builder: Builder, monkeypatch):
    commit(builder, P1)
    before = path(builder).read_bytes()
    real_sync = os.fsync

    def sync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/history"):
            raise OSError(5, "Input/output error")
        real_sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(Exception, match="Input/output error"):
        history.record(builder.directory.path, PointEvent("dropped", P1))
    assert path(builder).read_bytes() == before


def test_a_marker_without_its_line_is_made_good_by_the_next_run(builder: Builder):
    commit(builder, P1, P2)
    markers.put(builder.directory.path / P1, markers.RETIRED)
    assert told(builder) == []
    reconcile(builder)
    assert (lines(builder)[-1]["event"], lines(builder)[-1]["point"]) == ("dropped", P1)


def test_every_point_of_a_damaged_chain_is_named(builder: Builder):
    builder.point(P1, (disk_entry(size=MIB), [(0, b"a" * 65536)]), (disk_entry("vdb"), []))
    builder.point(P2, (disk_entry(size=MIB, parent=P1), []), (disk_entry("vdb"), []))
    builder.point(P3, (disk_entry(size=MIB), []))
    assert chain.damaged(builder.directory) == ()
    (builder.directory.path / P1 / "vda.digests").unlink()
    assert [(one.point, one.disk) for one in chain.damaged(builder.directory)] == [(P1, "vda"), (P2, "vda")]
