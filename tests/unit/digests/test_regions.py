# SPDX-License-Identifier: GPL-2.0-or-later
"""The parts of a disk that a layer stores, counted for a map."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupctl.digests import regions
from backupctl.digests.clusters import CLUSTER_BYTES, RECORD


def records(*numbers: int):
    found = np.ones(len(numbers), RECORD)
    found["cluster"] = numbers
    return found


def test_each_part_has_the_share_of_its_clusters_that_is_stored():
    found = regions.shares(records(0, 1, 2, 3, 8), 16 * CLUSTER_BYTES, 4)
    assert list(found) == [255, 0, 63, 0]


def test_a_single_cluster_of_a_large_part_is_still_shown():
    assert regions.shares(records(5_000_000), 10_000_000 * CLUSTER_BYTES, 4) == bytes([0, 0, 1, 0])


def test_what_lies_beyond_the_disk_as_it_is_now_is_not_counted():
    assert regions.shares(records(1, 9), 4 * CLUSTER_BYTES, 2) == bytes([127, 0])


@pytest.mark.parametrize(("size", "columns"), [(0, 1), (1, 1), (3 * CLUSTER_BYTES, 3), (1 << 40, 256)])
def test_a_small_disk_has_one_part_for_each_cluster(size, columns):
    assert regions.columns_of(size, 256) == columns


@given(st.integers(1, 5000), st.integers(1, 300), st.data())
def test_a_part_is_empty_exactly_if_none_of_its_clusters_is_stored(clusters, columns, data):
    columns = min(columns, clusters)
    numbers = sorted(data.draw(st.sets(st.integers(0, clusters - 1), max_size=30)))
    found = regions.shares(records(*numbers), clusters * CLUSTER_BYTES, columns)
    assert {part for part, share in enumerate(found) if share} == {n * columns // clusters for n in numbers}
    everything = regions.shares(records(*range(clusters)), clusters * CLUSTER_BYTES, columns)
    assert everything == bytes([255]) * columns
