# SPDX-License-Identifier: GPL-2.0-or-later
"""What points take, and what removing them frees: beside what a prune then frees, and the file system."""

import os
import subprocess

import pytest

from backupctl.digests import digest_map
from backupctl.digests.clusters import CLUSTER_BYTES
from backupctl.operations import usage
from backupctl.operations.prune import retention
from backupctl.operations.prune import run as prune
from backupctl.operations.prune.retention import Rules
from backupctl.repository import markers
from backupctl.repository.pending_point import PendingPoint
from tests.unit.operations.test_prune import history_of, pruned
from tests.unit.points import P1, P2, P3, disk_entry

SIZE = 64 * CLUSTER_BYTES
SLACK = 3 * CLUSTER_BYTES
"""What the estimate may be off for each layer that is merged: the tables of the image."""


def written(first: int, count: int, value: bytes) -> tuple[int, bytes]:
    return first * CLUSTER_BYTES, value * (count * CLUSTER_BYTES)


@pytest.fixture
def three(builder):
    """A full of 20 clusters; 10 of them again; 5 of these and 5 new ones."""
    builder.point(P1, (disk_entry(size=SIZE), [written(0, 20, b"a")]))
    builder.point(P2, (disk_entry(size=SIZE, parent=P1), [written(0, 10, b"b")]))
    builder.point(P3, (disk_entry(size=SIZE, parent=P2), [written(5, 5, b"c"), written(30, 5, b"c")]))
    return builder


def test_all_that_is_stored_is_counted_once(three):
    found = usage.measure(three.directory)
    seen = int(subprocess.check_output(["du", "-s", "--block-size=1", three.directory.path]).split()[0])
    assert found.stored_bytes == seen
    assert found.stored_bytes == found.other_bytes + sum(one.stored_bytes for one in found.points)
    assert all(one.metadata_bytes > 0 for one in found.points)


def test_a_chain_is_its_images_down_to_the_full(three):
    points = {point.id: point.manifest.disks[0].stored_bytes for point in three.directory.points()}
    found = usage.chain_bytes(three.directory.points())
    assert found == {P1: points[P1], P2: points[P1] + points[P2], P3: sum(points.values())}
    assert usage.chain_bytes(three.directory.points()[1:])[P3] is None
    (chain,) = usage.measure(three.directory).chains
    assert (chain.disk, chain.root, chain.points) == ("vda", P1, (P1, P2, P3))


def test_alone_a_point_frees_what_those_above_hide_of_it(three):
    found = {one.point.id: one for one in usage.measure(three.directory).points}
    assert found[P3].alone_bytes == found[P3].stored_bytes
    # 10 clusters of P1 are hidden by P2, 5 of P2 by P3.
    assert 10 * CLUSTER_BYTES <= found[P1].alone_bytes <= 10 * CLUSTER_BYTES + SLACK * 3
    assert 5 * CLUSTER_BYTES <= found[P2].alone_bytes <= 5 * CLUSTER_BYTES + SLACK * 3


def test_what_two_points_depend_on_frees_nothing_of_its_layer(three):
    three.point(point := prune.PointId("20260104T000000Z"), (disk_entry(size=SIZE, parent=P1), []))
    found = {one.point.id: one for one in usage.measure(three.directory).points}
    assert found[P1].alone_bytes == 0
    assert usage.freed_by(three.directory, {P1}) == {P1: 0}
    assert usage.freed_by(three.directory, {P1, point})[P1] > 0  # then only one is left


def test_a_damaged_map_is_told_as_not_known(three):
    path = digest_map.path_of(three.directory.path / P2 / "vda.qcow2")
    path.write_bytes(path.read_bytes()[:-1])
    found = {one.point.id: one for one in usage.measure(three.directory).points}
    assert (found[P1].alone_bytes, found[P2].alone_bytes) == (None, None)
    assert found[P3].alone_bytes == found[P3].stored_bytes
    assert usage.freed_by(three.directory, {P1}) is None


@pytest.mark.parametrize("seed", range(4))
def test_a_dry_run_foretells_what_a_prune_frees(builder, seed):
    history = history_of(builder, seed)
    history.take("vda", "vdb", full=True, size=40 * CLUSTER_BYTES)
    for number in range(5):
        history.take(*(("vda", "vdb") if number % 2 else ("vda",)))
    history.take("vda", "vdb")
    foretold = usage.freed_by(
        builder.directory, retention.dropped(prune.plan(builder.directory, Rules(last=2)))
    )
    before = usage.tree_bytes(builder.directory.path)
    report = pruned(builder, Rules(last=2))
    grown = (builder.directory.path / "history").stat().st_size  # each drop is recorded
    assert abs(before - usage.tree_bytes(builder.directory.path) - report.freed_bytes) <= grown + 8192
    assert set(report.freed) == set(report.dropped) == set(foretold)
    assert abs(report.freed_bytes - sum(foretold.values())) <= SLACK * len(report.merged) + 65536


def test_a_prune_counts_what_a_killed_one_left(three):
    markers.put(three.directory.path / P3, markers.RETIRED)
    PendingPoint(three.directory.path, three.directory.name, P3).uncommit()
    size = usage.tree_bytes(three.directory.path / f"{P3}.partial")
    assert pruned(three, Rules(last=9)).freed[P3] == size


def test_a_link_is_not_followed(three, tmp_path):
    os.symlink("/usr", three.directory.path / P1 / "link")
    assert usage.measure(three.directory).points[0].metadata_bytes < 1 << 20
