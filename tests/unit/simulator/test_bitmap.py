# SPDX-License-Identifier: GPL-2.0-or-later
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupctl.simulator.bitmap import LEVELS, WORD_BITS, HierarchicalBitmap

BITS = 5000
RANGES = st.tuples(st.integers(0, BITS - 1), st.integers(1, BITS)).map(
    lambda r: (r[0], min(r[1], BITS - r[0]))
)
STEPS = st.lists(st.one_of(RANGES, RANGES, st.just("clear")), max_size=12)


def build(steps):
    """Set and clear a bitmap and a plain array."""
    bitmap, model = HierarchicalBitmap(BITS), np.zeros(BITS, bool)
    for step in steps:
        if step == "clear":
            bitmap.clear()
            model[:] = False
        else:
            start, length = step
            bitmap.set(start, length)
            model[start : start + length] = True
    return bitmap, model


def assert_levels_agree(bitmap):
    """Every bit of a level says whether a word of the next one holds anything."""
    for upper, lower in zip(bitmap.levels, bitmap.levels[1:], strict=False):
        bits = np.unpackbits(upper.view(np.uint8), bitorder="little")[: len(lower)]
        assert (bits.astype(bool) == (lower != 0)).all()


def areas_of(model):
    edges = np.flatnonzero(np.diff(np.concatenate(([0], model.astype(np.int8), [0]))))
    return [(int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def test_one_tebibyte_at_64_kib_has_the_levels_that_qemu_has():
    bitmap = HierarchicalBitmap((1 << 40) // 65536)
    assert bitmap.bits == 16_777_216
    assert [len(words) for words in bitmap.levels] == [1, 1, 1, 1, 64, 4096, 262_144]
    assert (LEVELS, WORD_BITS) == (7, 64)


@given(STEPS)
def test_it_holds_what_a_plain_array_holds(steps):
    bitmap, model = build(steps)
    assert bitmap.count() == model.sum()
    assert list(bitmap.areas()) == areas_of(model)
    assert_levels_agree(bitmap)


@given(STEPS, RANGES)
def test_areas_are_clipped_to_the_range_asked_for(steps, wanted):
    bitmap, model = build(steps)
    start, length = wanted
    model[:start] = False
    model[start + length :] = False
    assert list(bitmap.areas(start, start + length)) == areas_of(model)


@given(STEPS, STEPS)
def test_a_merge_is_the_union(one_steps, other_steps):
    (one, one_model), (other, other_model) = build(one_steps), build(other_steps)
    one.merge(other)
    assert list(one.areas()) == areas_of(one_model | other_model)
    assert list(other.areas()) == areas_of(other_model)
    assert_levels_agree(one)


@given(STEPS, st.integers(1, 2 * BITS))
def test_a_new_size_keeps_what_fits_and_adds_nothing(steps, size):
    bitmap, model = build(steps)
    bitmap.resize(size)
    kept = np.zeros(size, bool)
    kept[: min(size, BITS)] = model[: min(size, BITS)]
    assert list(bitmap.areas()) == areas_of(kept)
    assert_levels_agree(bitmap)


@given(STEPS)
def test_loading_the_lowest_level_makes_the_others(steps):
    bitmap, model = build(steps)
    loaded = HierarchicalBitmap(BITS)
    loaded.load(bitmap.leaves)
    assert list(loaded.areas()) == areas_of(model)
    assert_levels_agree(loaded)


def test_a_copy_is_independent():
    bitmap = HierarchicalBitmap(BITS)
    copy = bitmap.copy()
    bitmap.set(0, BITS)
    assert (copy.count(), bitmap.count()) == (0, BITS)


def test_a_merge_of_another_length_is_refused():
    with pytest.raises(ValueError, match="different length"):
        HierarchicalBitmap(64).merge(HierarchicalBitmap(65))
