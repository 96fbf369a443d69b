# SPDX-License-Identifier: GPL-2.0-or-later
"""What a report gathers of a repository, whatever state that is in, and the file it is written into."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from backupctl.cancel import Cancellation
from backupctl.errors import Interrupted, TargetExists, UsageError
from backupctl.names import point_time
from backupctl.operations.check import Level, Limits
from backupctl.operations.prune.retention import Rules
from backupctl.operations.report import gather, write
from backupctl.operations.report.facts import RunFacts
from backupctl.operations.report.gather import VmRequest
from backupctl.repository import activity, markers
from backupctl.repository.activity import Activity
from tests.unit.points import P1, P2, P3

LIMITS = Limits(timedelta(hours=26))
NOW = point_time(P2).replace(tzinfo=UTC) + timedelta(hours=3)
MARK = b"<!doctype html> report"


@pytest.fixture
def chain(two_points):
    """A repository with a full and an incremental that builds on it."""
    return two_points[0]


def facts(chain, rules=None, maps=30, now=NOW):
    asked = VmRequest(chain.directory, LIMITS, rules or Rules(), maps=maps)
    return gather.repository(chain.repository.path, [asked], now, Cancellation()).vms[0]


def test_points_have_kind_parent_and_length_of_their_chain(chain):
    found = facts(chain)
    assert found.verdict.level is Level.OK
    assert [(one.id, one.kind, one.parent, one.layers) for one in found.points] == [
        (P1, "full", None, 1),
        (P2, "incremental", P1, 2),
    ]


def test_the_map_shows_the_clusters_that_each_point_stores(chain):
    """The disk has five clusters: the full stores the first two and the last, the incremental two."""
    (one,) = facts(chain).maps
    assert one.columns == 5
    assert [[bool(share) for share in row.shares] for row in one.rows] == [
        [True, True, False, False, True],
        [True, True, False, False, False],
    ]
    assert one.chain_bytes == sum(path.stat().st_size for path in chain.directory.path.glob("*/*.qcow2"))


def test_only_the_newest_points_get_a_map_and_none_if_none_is_wanted(chain):
    assert [row.point for row in facts(chain, maps=1).maps[0].rows] == [P2]
    assert facts(chain, maps=0).maps == ()


def test_what_the_next_prune_drops_is_what_a_prune_drops(chain):
    found = facts(chain, Rules(last=1))
    assert list(found.dropped) == [P1]
    assert found.points[1].decision.reasons == ("the newest", "last 1 of 1")
    markers.put(chain.directory.path / P1, markers.PROTECTED)
    found = facts(chain, Rules(last=1))
    assert found.dropped == ()
    assert found.points[0].protected


def test_a_damaged_manifest_hides_no_other_point_and_is_named(chain):
    (chain.directory.path / P2 / "manifest.json").write_text("{}")
    found = facts(chain, Rules(last=1))
    assert [one.id for one in found.points] == [P1]
    assert [(one.id, one.unreadable) for one in found.bad] == [(P2, False)]
    assert found.verdict.level is Level.CRITICAL
    assert "nothing is pruned while it is not known" in found.pruning_problem


def test_a_damaged_layer_is_marked_at_every_point_that_needs_it(chain):
    (chain.directory.path / P1 / "vda.digests").write_bytes(b"lost")
    found = facts(chain)
    assert all("vda" in one.broken[0] for one in found.points)
    rows = found.maps[0].rows
    assert "truncated" in rows[0].problem
    assert rows[0].shares == b""
    assert any(rows[1].shares)


def test_a_missing_layer_below_leaves_the_length_of_the_chain_unknown(chain):
    (chain.directory.path / P1).rename(chain.repository.path / "moved-away")
    (one,) = facts(chain).points
    assert one.layers is None
    assert one.broken


def test_a_vm_that_was_never_backed_up_is_reported_without_points(builder):
    found = facts(builder)
    assert (found.points, found.maps, found.verdict.level) == ((), (), Level.CRITICAL)


def test_a_run_in_progress_is_seen_and_not_disturbed(chain):
    stamp = "2026-01-01T00:00:00Z"
    with chain.directory.lock() as lock:
        chain.directory.begin(P3, chain.journal(P3))
        assert facts(chain).run == RunFacts("other")
        activity.write(lock, Activity("full", os.getpid(), "copy", P3, stamp, stamp, (), 5, 10))
        found = facts(chain, now=datetime(2026, 1, 1, 0, 1, tzinfo=UTC)).run
        assert (found.kind, found.point, found.step, found.elapsed_seconds) == ("full", P3, 7, 60)
        assert (found.done_bytes, found.total_bytes) == (5, 10)
    assert facts(chain).run is None
    assert [one.point for one in chain.directory.pending_points()] == [P3]


def test_a_report_changes_nothing(chain):
    before = {path: path.stat().st_mtime_ns for path in chain.repository.path.rglob("*")}
    facts(chain, Rules(last=1))
    assert {path: path.stat().st_mtime_ns for path in chain.repository.path.rglob("*")} == before


def test_a_request_to_end_is_heard_even_at_a_digest_map(chain):
    stop = Cancellation()
    stop.request("SIGTERM")
    row = gather._Vm(VmRequest(chain.directory, LIMITS), NOW, stop)
    with pytest.raises(Interrupted):
        row.facts()


def into(path: Path, content: bytes = MARK + b" new", *, force: bool = False) -> None:
    write.write(path, content, MARK, force=force, warn=lambda _event: None)


def test_a_new_report_belongs_to_its_owner_alone(tmp_path):
    into(tmp_path / "r.html")
    assert (tmp_path / "r.html").read_bytes() == MARK + b" new"
    assert (tmp_path / "r.html").stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["r.html"]


def test_an_earlier_report_is_replaced_and_keeps_its_mode(tmp_path):
    path = tmp_path / "r.html"
    path.write_bytes(MARK + b" old")
    path.chmod(0o644)
    into(path)
    assert path.read_bytes() == MARK + b" new"
    assert path.stat().st_mode & 0o777 == 0o644


def test_any_other_file_is_replaced_only_if_that_is_asked_for(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(b"a disk")
    with pytest.raises(TargetExists, match="is not a report"):
        into(path)
    with pytest.raises(TargetExists, match="is not a report"):
        write.destination(path, [], MARK, force=False)
    assert path.read_bytes() == b"a disk"
    into(path, force=True)
    assert path.read_bytes().startswith(MARK)


@pytest.mark.parametrize("force", [False, True])
def test_a_pipe_or_a_directory_is_never_replaced(tmp_path, force):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    for name in ("pipe", "directory"):
        with pytest.raises(TargetExists, match="not a regular file"):
            into(tmp_path / name, force=force)


def test_a_report_is_not_written_into_a_repository(tmp_path):
    with pytest.raises(UsageError, match="inside the repository"):
        write.destination(tmp_path / "repository" / "r.html", [tmp_path / "repository"], MARK, force=False)


def test_a_missing_directory_is_not_made(tmp_path):
    with pytest.raises(UsageError, match="there is no directory"):
        write.destination(tmp_path / "no" / "r.html", [], MARK, force=False)


def test_root_writes_to_no_directory_that_others_may_write_to(tmp_path):
    if os.geteuid():
        pytest.skip("only root is at risk")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UsageError, match="not safe for root"):
        write.destination(tmp_path / "open" / "r.html", [], MARK, force=False)


def test_a_link_is_followed_only_to_where_root_may_write(tmp_path):
    if os.geteuid():
        pytest.skip("only root is at risk")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "r.html").symlink_to(tmp_path / "open" / "r.html")
    with pytest.raises(UsageError, match="not safe for root"):
        write.destination(tmp_path / "r.html", [], MARK, force=False)


def test_the_time_of_the_report_is_the_time_that_ages_are_measured_by(chain):
    assert facts(chain, now=NOW + timedelta(days=9)).verdict.level is Level.CRITICAL
