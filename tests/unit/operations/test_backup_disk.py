# SPDX-License-Identifier: GPL-2.0-or-later
"""What of a disk is looked at: pure, so every shape of changes can be tried."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from backupctl.digests import clusters
from backupctl.digests.clusters import CLUSTER_BYTES, EffectiveContent
from backupctl.names import BitmapName, DiskName, NodeName, PointId
from backupctl.operations.backup.disk import _find_clusters
from backupctl.operations.backup.plan import DiskPlan
from backupctl.transfer.extents import DIRTY, ZERO, Extents
from backupctl.vm.disk import Disk

POINT = PointId("20261123T041500Z")
UNIT = CLUSTER_BYTES // 4  # four places in a cluster


def plan_of(how: str, size: int) -> DiskPlan:
    disk = Disk(
        name=DiskName("vda"),
        node=NodeName("n"),
        size=size,
        driver="qcow2",
        persistent=True,
        qdev="vda",
        filename="",
        bitmaps=(),
    )
    bitmaps = (BitmapName("b"),) if how == "bitmap" else ()
    return DiskPlan(disk, "incremental", None if how == "full" else POINT, "", bitmaps)


@given(
    st.sampled_from(["full", "scan", "bitmap"]),
    st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40),
    st.sets(st.integers(0, 10)),
    st.integers(0, 40),
    st.integers(0, 40),
)
@example("bitmap", [(False, True)] * 8, {0, 1}, 40, 5)
def test_nothing_that_may_differ_from_the_parent_is_left_out(how, places, held, known, cut):
    """places: dirty?, zero? held: clusters in which the parent has something else than zeroes.

    known: so many places the disk had at the parent. cut: where a second reply begins.
    """
    size = len(places) * UNIT
    below_records = clusters.blank(0, 11)
    below_records["low"] = [number in held for number in range(11)]
    below = EffectiveContent([] if how == "full" else [(below_records, 11 * CLUSTER_BYTES)], size)
    dirty_flags = np.array([DIRTY * dirty for dirty, _ in places], np.int64)
    zero_flags = np.array([ZERO * zero for _, zero in places], np.int64)
    flags = (zero_flags, dirty_flags) if how == "bitmap" else (zero_flags,)
    offsets = np.arange(len(places)) * UNIT
    statuses = [
        Extents(offsets[some], np.full(len(offsets[some]), UNIT), tuple(one[some] for one in flags))
        for some in (slice(0, cut), slice(cut, None))
        if len(offsets[some])
    ]
    marks, named_bytes = _find_clusters(plan_of(how, size), statuses, below, known * UNIT)
    found = {number: part.zero for part in marks.parts() for number in part.numbers.tolist()}
    assert named_bytes == UNIT * sum(dirty if how == "bitmap" else not zero for dirty, zero in places)
    looked_at = {place: found[place // 4] for place in range(len(places)) if place // 4 in found}
    for at, (dirty, zero) in enumerate(places):
        held_here = how != "full" and at // 4 in held
        new = not zero and at >= known
        must = (dirty or new or (zero and held_here)) if how == "bitmap" else (not zero or held_here)
        assert at in looked_at or not must or (zero and not held_here)
        assert not (looked_at.get(at) and not zero), "data would be overwritten by zeroes"
    if how == "bitmap" and size % CLUSTER_BYTES:
        last = len(places) - 1
        assert last in looked_at or (places[last][1] and last // 4 not in held)
