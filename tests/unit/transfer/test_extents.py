# SPDX-License-Identifier: GPL-2.0-or-later
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupctl.transfer import extents
from backupctl.transfer.extents import BadReply

HOLE_AND_ZERO = 3


def ask_of(*replies):
    """An `ask` that gives these replies in turn, and a list of what was asked."""
    waiting = list(replies)
    asked = []

    def ask(offset, length):
        asked.append((offset, length))
        return waiting.pop(0)

    return ask, asked


def listed(found):
    """Offset, length and flags of each extent."""
    return [
        (offset, length, flags)
        for one in found
        for offset, length, *flags in zip(
            *(part.tolist() for part in (one.offsets, one.lengths, *one.flags)), strict=True
        )
    ]


def survey(size, *replies, contexts=("a",)):
    ask, asked = ask_of(*replies)
    return listed(extents.query_extents(ask, size, contexts)), asked


# One test for each picture in the module's docstring.


def test_exact():
    found, asked = survey(100, {"a": [30, 0, 70, 1]})
    assert found == [(0, 30, [0]), (30, 70, [1])]
    assert asked == [(0, 100)]


def test_short_is_asked_again_and_not_taken_for_the_end():
    found, asked = survey(100, {"a": [30, 0, 20, 1]}, {"a": [50, 0]})
    assert found == [(0, 30, [0]), (30, 20, [1]), (50, 50, [0])]
    assert asked == [(0, 100), (50, 50)]


def test_long_is_clipped():
    found, asked = survey(100, {"a": [30, 0, 900, 1]})
    assert found == [(0, 30, [0]), (30, 70, [1])]
    assert asked == [(0, 100)]


def test_contexts_of_different_reach_give_what_both_cover():
    found, asked = survey(
        100, {"a": [100, 1], "b": [10, 0, 20, 1]}, {"a": [70, 0], "b": [500, 1]}, contexts=("a", "b")
    )
    assert found == [(0, 10, [1, 0]), (10, 20, [1, 1]), (30, 70, [0, 1])]
    assert asked == [(0, 100), (30, 70)]


@pytest.mark.parametrize(
    "reply",
    [{}, {"b": [100, 0]}, {"a": []}, {"a": [100]}, {"a": [0, 0, 100, 0]}, {"a": [100, 0, 1, 0]}],
    ids=["nothing", "another context", "empty", "odd", "of no length", "beyond what was asked"],
)
def test_a_reply_that_lies_is_an_error(reply):
    with pytest.raises(BadReply):
        survey(100, reply)


def test_questions_are_of_32_bits_and_the_offsets_are_not():
    size = (9 << 30) + 512
    found, asked = survey(size, *[{"a": [1 << 30, 0]}] * 9, {"a": [512, 1]})
    assert all(length < 1 << 32 for _, length in asked)
    assert found[-1] == (9 << 30, 512, [1])
    assert sum(length for _, length, _ in found) == size


def test_an_empty_disk_is_not_asked_about():
    assert survey(0) == ([], [])


def test_a_reply_of_very_many_extents_takes_no_time_to_speak_of():
    many = 200_000
    replies = [[1, 0, 1, 1] * (many // 2), [1, 1, 1, 0] * (many // 2)]
    begun = time.thread_time()
    found = extents.intersect(0, many, replies)
    assert len(found.offsets) == many
    assert time.thread_time() - begun < 1


@st.composite
def disks(draw):
    """Flags of each unit of a small disk in two contexts, and a seed for how a server cuts its replies."""
    size = draw(st.integers(1, 40))
    flags = st.lists(st.integers(0, 3), min_size=size, max_size=size)
    return draw(flags), draw(flags), draw(st.integers(0, 1 << 30))


@given(disks())
def test_however_a_server_cuts_its_replies_each_unit_comes_once_with_its_flags(disk):
    first, second, seed = disk
    rng = random.Random(seed)

    def reply(flags, offset, length):
        runs = []
        until = offset + rng.randint(1, length)
        while offset < until:
            end = offset + 1
            while end < len(flags) and flags[end] == flags[offset] and rng.random() < 0.8:
                end += 1
            runs += [end - offset, flags[offset]]
            offset = end
        return runs

    def ask(offset, length):
        return {"a": reply(first, offset, length), "b": reply(second, offset, length)}

    found = listed(extents.query_extents(ask, len(first), ("a", "b")))
    assert [tuple(flags) for _, length, flags in found for _ in range(length)] == list(
        zip(first, second, strict=True)
    )
    assert [offset for offset, _, _ in found] == [
        sum(length for _, length, _ in found[:number]) for number in range(len(found))
    ]


def test_crumbs_without_end_are_an_error_and_a_few_are_not():
    def crumb(_offset: int, _length: int) -> dict[str, list[int]]:
        return {"c": [1, 0]}

    assert len(listed(extents.query_extents(crumb, extents.MAX_SHORT_REPLIES, ("c",)))) == 10_000
    with pytest.raises(extents.BadReply, match="too many short replies"):
        list(extents.query_extents(crumb, 1 << 40, ("c",)))
