# SPDX-License-Identifier: GPL-2.0-or-later
"""Deleting points by name: all that stay keep their bytes, after a kill at any step too."""

import shutil

import pytest

from backupctl.cancel import Cancellation
from backupctl.errors import AmbiguousPoint, Interrupted, Locked, NoSuchPoint, UsageError
from backupctl.events import Event
from backupctl.events.prune import NextRunReadsAll
from backupctl.names import PointId
from backupctl.operations import delete
from backupctl.operations.delete import Deletion, Permissions
from backupctl.operations.prune import run as prune
from backupctl.progress import Silent
from backupctl.repository import history, markers, read_locks
from tests.unit.operations.test_prune import history_of
from tests.unit.points import P1, P2, P3, Builder, changing_step, die_at, disk_entry

NOTHING = Permissions()
ALL = Permissions(protected=True, newest=True)


class Recorder(Silent):
    def __init__(self) -> None:
        self.events: list[Event] = []

    def event(self, event: Event) -> None:
        self.events.append(event)


def deleted(builder: Builder, *wanted: str, may=NOTHING, reporter=None) -> Deletion:
    return delete.delete(builder.directory, wanted, may, reporter or Silent(), Cancellation())


def ids(builder: Builder) -> list[PointId]:
    return [point.id for point in builder.directory.points()]


@pytest.fixture
def told(builder):
    """Five points of vda, the fourth of which holds vdb as well."""
    found = history_of(builder, 3)
    points = [found.take("vda", full=True, size=1 << 20)]
    points += [found.take("vda") for _ in range(2)]
    found.content["vdb"] = b""
    points.append(found.take("vda", "vdb", size=1 << 20))
    points.append(found.take("vda"))
    return found, points


@pytest.mark.parametrize("numbers", [(0,), (1,), (0, 1, 2), (1, 2)])
def test_points_that_stay_keep_their_bytes(builder, told, numbers):
    found, points = told
    chosen = [points[number] for number in numbers]
    done = deleted(builder, *chosen)
    assert done.points == tuple(chosen)
    assert ids(builder) == [point for point in points if point not in chosen]
    assert (done.left, done.newest) == ((), ())
    found.check()


def test_a_dry_run_tells_what_would_go_and_changes_nothing(builder, told):
    _, points = told
    before = sorted(builder.directory.path.rglob("*"))
    planned = delete.plan(builder.directory, (points[1],), Permissions())
    assert (planned.points, planned.newest) == ((points[1],), ())
    assert planned.freed_bytes is not None
    assert sorted(builder.directory.path.rglob("*")) == before
    done = deleted(builder, points[1])
    assert abs(done.freed_bytes - planned.freed_bytes) <= 4 * 65536


def test_a_protected_point_needs_a_word(builder, told):
    _, points = told
    prune.protect(builder.directory, points[1])
    with pytest.raises(UsageError, match="protected"):
        deleted(builder, points[0], points[1])
    assert ids(builder) == points
    deleted(builder, points[1], may=Permissions(protected=True))
    assert ids(builder) == [points[0], *points[2:]]


def test_the_newest_point_of_each_disk_needs_a_word(builder, told):
    found, points = told
    for number in (3, 4):  # of vdb, of vda
        with pytest.raises(UsageError, match="the newest point would be deleted"):
            deleted(builder, points[number])
    assert ids(builder) == points
    reporter = Recorder()
    done = deleted(builder, points[3], may=Permissions(newest=True), reporter=reporter)
    assert done.newest == (("vdb", points[3]),)
    assert NextRunReadsAll("vdb", points[3]) in reporter.events
    found.check()


def test_an_id_that_was_deleted_is_not_used_again(builder, told):
    _, points = told
    deleted(builder, points[4], may=ALL)
    assert points[4] not in builder.directory.all_points()
    assert builder.directory.newest() == points[4]


def test_what_is_deleted_already_is_no_error(builder, told):
    found, points = told
    with builder.directory.lock():
        markers.put(builder.directory.path / points[1], markers.RETIRED)  # killed before the history's line
    done = deleted(builder, points[1])
    assert (done.points, done.already) == ((), (points[1],))
    done = deleted(builder, points[1], points[0])
    assert (done.points, done.already) == ((points[0],), (points[1],))
    found.check()


def test_a_dropped_point_still_makes_a_beginning_ambiguous(builder):
    """Else a command that is repeated after a kill would delete the other one."""
    other = PointId("20260102T120000Z")
    for point in (P1, P2, other, P3):
        builder.point(point, (disk_entry(), [(0, b"x")]))
    with builder.directory.lock():
        markers.put(builder.directory.path / P2, markers.RETIRED)
        history.record(builder.directory.path, history.PointEvent("dropped", P2))
    with pytest.raises(AmbiguousPoint):
        deleted(builder, "20260102")
    with pytest.raises(NoSuchPoint):
        deleted(builder, "20260105")
    assert ids(builder) == [P1, other, P3]


def test_a_point_that_is_read_is_not_deleted(builder, told, monkeypatch):
    _, points = told
    monkeypatch.setattr(prune, "_LOCK_SECONDS", 0.05)
    with read_locks.reading(builder.directory, points[2]), pytest.raises(Locked, match=points[1]):
        deleted(builder, points[1])
    assert ids(builder) == points


def test_an_interrupted_deletion_names_the_command_that_continues(builder, told, monkeypatch):
    found, points = told
    stop = Cancellation()

    def interrupt(*_arguments, **_options):
        raise Interrupted("SIGTERM")

    monkeypatch.setattr(prune.copy_layer, "copy_layer", interrupt)
    with pytest.raises(Interrupted) as caught:
        delete.delete(builder.directory, (points[0], points[1]), Permissions(), Silent(), stop)
    assert caught.value.next_command == f"backupctl delete vm1 {points[0]} {points[1]}"
    monkeypatch.undo()
    assert deleted(builder, points[0], points[1]).left == ()
    found.check()


def killed_at_each_step(builder: Builder, tmp_path, wanted, may, stride: int) -> int:
    """Delete, killed before every `stride`th step; check all; delete again. Returns the cases."""
    path, kept = builder.repository.path, tmp_path / "kept"
    shutil.copytree(path, kept)
    found, points = wanted
    chosen = (points[0], points[2], points[4])
    whole, number = False, -stride
    while not whole:
        number += stride
        shutil.rmtree(path)
        shutil.copytree(kept, path)
        whole = die_at(number, lambda: deleted(builder, *chosen, may=may), changing_step)
        found.check()
        for partial in builder.directory.pending_points():
            partial.drop()  # as each run's recovery does
        done = deleted(builder, *chosen, may=may)
        assert {*done.points, *done.already} == set(chosen), f"step {number}"
        assert ids(builder) == [points[1], points[3]], f"step {number}"
        found.check()
    return number // stride


def test_a_kill_loses_nothing_and_the_same_command_finishes(builder, told, tmp_path):
    assert killed_at_each_step(builder, tmp_path, told, ALL, 11) > 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kill_at_every_step_loses_nothing_and_the_same_command_finishes(builder, told, tmp_path):
    assert killed_at_each_step(builder, tmp_path, told, ALL, 1) > 20
