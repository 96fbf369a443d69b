# SPDX-License-Identifier: GPL-2.0-or-later
"""Who reads a point keeps all that it stands on as it is; a retired point is none any more."""

import errno
import fcntl

import pytest

from backupctl.errors import Locked, NoSuchPoint, RepositoryError
from backupctl.repository import chain, markers, read_locks
from backupctl.system import locks
from tests.unit.points import P1, P2, P3, Builder, disk_entry


@pytest.fixture
def chained(builder: Builder) -> Builder:
    """P2 stands on P1; P3 is a full of its own."""
    builder.point(P1, (disk_entry(), [(0, b"a" * 65536)]))
    builder.point(P2, (disk_entry(parent=P1), [(65536, b"b" * 65536)]))
    builder.point(P3, (disk_entry(), [(0, b"c" * 65536)]))
    return builder


def is_free(builder: Builder, point: str) -> bool:
    try:
        with locks.directory(builder.directory.path / point, 0):
            return True
    except Locked:
        return False


def test_a_reader_holds_its_point_and_all_below_it(chained: Builder):
    with read_locks.reading(chained.directory, P2) as held:
        assert held.id == P2
        assert [is_free(chained, point) for point in (P1, P2, P3)] == [False, False, True]
    assert is_free(chained, P1)


def test_two_readers_do_not_shut_each_other_out(chained: Builder):
    with read_locks.reading(chained.directory, P2), read_locks.reading(chained.directory, P1) as held:
        assert held.id == P1


def test_a_reader_waits_for_a_switch_but_not_for_ever(chained: Builder, monkeypatch):
    monkeypatch.setattr(read_locks, "_PATIENCE_SECONDS", 0.1)
    with (
        locks.directory(chained.directory.path / P1, 0),
        pytest.raises(Locked, match="prune"),
        read_locks.reading(chained.directory, P2),
    ):
        pass


def test_where_directories_cannot_be_locked_reading_goes_on_and_pruning_does_not(
    chained: Builder, monkeypatch
):
    """As on some network file systems."""

    def unable(_descriptor: int, _how: int) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", unable)
    with read_locks.reading(chained.directory, P2) as held:
        assert held.id == P2
    with pytest.raises(RepositoryError, match="cannot lock"), locks.directory(held.path, 0):
        pass


def test_a_damaged_disk_does_not_keep_the_others_from_being_held(builder: Builder):
    builder.point(P1, (disk_entry(), []), (disk_entry("vdb"), []))
    builder.point(P2, (disk_entry(parent=P1), []), (disk_entry("vdb"), []))
    (builder.directory.path / P1 / "manifest.json").write_text("{}")
    with read_locks.reading(builder.directory, P2) as held:
        assert held.id == P2
        assert not is_free(builder, P2)


def test_a_retired_point_is_none_but_its_layers_are_still_read(chained: Builder):
    directory = chained.directory
    markers.put(directory.path / P1, markers.RETIRED)
    assert [point.id for point in directory.points()] == [P2, P3]
    assert not directory.is_committed(P1)
    with pytest.raises(NoSuchPoint):
        directory.point(P1)
    assert [point.id for point in directory.retired().points] == [P1]
    assert [path.parent.name for path in chain.paths(directory, directory.point(P2), "vda")] == [P2, P1]


def test_the_id_of_a_retired_point_still_counts(chained: Builder):
    """Two points of one id would be two bitmaps of one name."""
    markers.put(chained.directory.path / P3, markers.RETIRED)
    assert chained.directory.newest() == P3
    assert chained.directory.point("latest").id == P2


def test_a_marker_is_put_and_taken_away_any_number_of_times(chained: Builder):
    path = chained.directory.path / P1
    for _ in range(2):
        markers.put(path, markers.PROTECTED)
        assert markers.has(path, markers.PROTECTED)
    for _ in range(2):
        markers.remove(path, markers.PROTECTED)
        assert not markers.has(path, markers.PROTECTED)
