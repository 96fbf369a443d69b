# SPDX-License-Identifier: GPL-2.0-or-later
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupctl.digests import clusters
from backupctl.digests.clusters import CLUSTER_BYTES, EffectiveContent
from backupctl.sizes import WINDOW_CLUSTERS
from backupctl.transfer import cluster_map
from backupctl.transfer.cluster_map import ClusterMap

UNIT = CLUSTER_BYTES // 4
PIECES = st.lists(st.tuples(st.integers(0, 9 * UNIT), st.integers(1, 40 * UNIT), st.booleans()), max_size=12)


@pytest.mark.parametrize("window", [4, WINDOW_CLUSTERS])
@given(PIECES, st.integers(1, 60 * CLUSTER_BYTES), st.booleans())
def test_a_map_covers_all_that_was_named_and_calls_zero_only_what_is(window, ranges, size, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster_map, "WINDOW_CLUSTERS", window)
        found, named, zero, offset = ClusterMap(size), set(), set(), 0
        marked = {True: [], False: []}
        for gap, length, is_zero in ranges:
            offset += gap
            end = min(offset + length, size)
            if offset >= end:
                break
            marked[is_zero].append((offset, end - offset))
            named |= set(range(offset // CLUSTER_BYTES, -(-end // CLUSTER_BYTES)))
            stop = -(-end // CLUSTER_BYTES) if end == size else end // CLUSTER_BYTES
            if is_zero:
                zero |= set(range(-(-offset // CLUSTER_BYTES), stop))
            offset = end
        for is_zero, pieces in marked.items():
            for some in [pieces] if at_once else [[one] for one in pieces]:
                offsets, lengths = np.array(some, np.int64).reshape(-1, 2).T
                (found.zero if is_zero else found.data)(offsets, lengths)
        parts = list(found.parts())
        numbers = [number for part in parts for number in part.numbers.tolist()]
        assert len(numbers) == len(set(numbers))
        assert set(numbers) == named
        assert {number for part in parts if part.zero for number in part.numbers.tolist()} == zero
        assert found.marked_bytes() == clusters.bytes_of(np.array(sorted(numbers), np.uint64), size)


def test_a_disk_of_a_tebibyte_in_fragments_costs_two_bits_for_each_cluster():
    size = 1 << 40
    tracemalloc.start()
    try:
        found = ClusterMap(size)
        for first in range(0, size, 1 << 30):
            offsets = np.arange(first, first + (1 << 30), 1 << 20)
            found.data(offsets, np.full(len(offsets), 4096))
        assert found.marked_bytes() == (size >> 20) * CLUSTER_BYTES
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_64_tebibytes_of_one_kind_cost_nearly_nothing():
    size = 64 << 40
    tracemalloc.start()
    try:
        found = ClusterMap(size)
        for first in range(0, size, 64 << 30):
            found.zero(np.array([first]), np.array([64 << 30]))
        assert found.marked_bytes() == size
        found.drop_unneeded_zeroes(EffectiveContent([], size))
        assert list(found.parts()) == []
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
