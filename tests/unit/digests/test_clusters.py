# SPDX-License-Identifier: GPL-2.0-or-later
import itertools
import weakref

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from backupctl.digests import clusters
from backupctl.digests.clusters import CLUSTER_BYTES, EffectiveContent

SIZES = st.integers(1, 41 * CLUSTER_BYTES)
Layer = tuple[dict[int, int], int]
layers = st.lists(
    st.tuples(st.dictionaries(st.integers(0, 40), st.integers(0, 3), max_size=30), SIZES), max_size=5
)


def records(layer: dict[int, int]) -> clusters.Records:
    found = clusters.blank(0, len(layer))
    found["cluster"] = sorted(layer)
    found["low"] = [layer[number] for number in sorted(layer)]
    return found


def merged(layers: list[Layer], size: int) -> dict[int, int]:
    """Lay the layers, newest first, over each other, as images would be read: the model."""
    found: dict[int, int] = {}
    for layer, layer_size in [*reversed(layers), ({}, size)]:
        found = {
            number: digest
            for number, digest in (found | layer).items()
            if number < clusters.count(layer_size)
        }
    return found


@given(layers, SIZES, st.integers(0, 45), st.integers(0, 45))
def test_a_window_shows_the_newest_layer_and_zeroes_where_there_is_none(given_layers, size, first, length):
    logical = EffectiveContent([(records(layer), layer_size) for layer, layer_size in given_layers], size)
    window = logical.window(first, length)
    model = merged(given_layers, size)
    assert window["cluster"].tolist() == list(range(first, first + length))
    assert window["low"].tolist() == [model.get(number, 0) for number in range(first, first + length)]


def test_the_maps_that_it_shows_are_let_go_with_it_at_once():
    """Each keeps its file open."""
    found = records({1: 1})
    let_go = weakref.ref(found)
    logical = EffectiveContent([(found, 2 * CLUSTER_BYTES)], 2 * CLUSTER_BYTES)
    assert logical.window(0, 2)["low"].tolist() == [0, 1]
    del found, logical
    assert let_go() is None


@given(layers)
def test_overlaying_layer_by_layer_gives_what_the_whole_chain_shows(given_layers):
    lower, size = records({}), 41 * CLUSTER_BYTES
    for layer, size in reversed(given_layers):
        lower = clusters.overlay(lower, records(layer), size)
    assert dict(zip(lower["cluster"].tolist(), lower["low"].tolist(), strict=True)) == merged(
        given_layers, size
    )
    assert np.all(lower["cluster"][1:] > lower["cluster"][:-1])


@given(st.sets(st.integers(0, 40), min_size=0), st.integers(0, CLUSTER_BYTES - 1))
def test_ranges_cover_just_the_clusters_that_were_named(named, short):
    size = 41 * CLUSTER_BYTES - short
    found = clusters.ranges(np.array(sorted(named), np.uint64), size)
    covered = {byte // CLUSTER_BYTES for at, length in found for byte in range(at, at + length, 4096)}
    assert covered == named
    assert all(at + length <= size for at, length in found)
    assert all(one[0] + one[1] < two[0] for one, two in itertools.pairwise(found))
