# SPDX-License-Identifier: GPL-2.0-or-later
"""Scratch room: enough, or refused; what may be used up is always given up before."""

from hypothesis import given
from hypothesis import strategies as st

from backupctl.names import DiskName
from backupctl.vm.qmp import scratch_space

MIB = 1 << 20
GIB = 1 << 30
SIZES = st.lists(st.integers(0, 4096 * GIB), min_size=1, max_size=5)


def share(sizes, held, free, wish=None, *, limited=True):
    named = {DiskName(f"vd{number}"): size for number, size in enumerate(sizes)}
    return scratch_space.share(named, held, free, wish, 256 * MIB, limited=limited)


def test_a_small_disk_gets_room_that_can_not_be_used_up():
    (one,) = share([10 * MIB], [10 * MIB], GIB)
    assert (one.size, one.abort_at, one.throttle_at) == (scratch_space.whole(10 * MIB), None, None)


def test_a_large_empty_disk_gets_what_it_holds_and_a_reserve():
    (one,) = share([100 * GIB], [GIB], 100 * GIB)
    assert one.size == one.ideal_bytes == scratch_space.whole(GIB) + 512 * MIB
    assert GIB < one.abort_at < one.throttle_at < one.size


def test_half_of_what_is_free_is_shared_by_what_the_disks_hold():
    small, large = share([100 * GIB, 100 * GIB], [10 * GIB, 50 * GIB], 20 * GIB)
    assert 9.9 * GIB < small.size + large.size <= 10 * GIB
    assert small.size < large.size < large.ideal_bytes


def test_less_than_the_least_is_refused():
    assert share([100 * GIB], [GIB], 511 * MIB) is None
    assert share([100 * GIB], [GIB], 512 * MIB) is not None
    assert share([100 * GIB] * 2, [GIB] * 2, 1023 * MIB) is None


def test_a_wish_that_is_not_free_is_refused():
    assert share([100 * GIB], [GIB], 2 * GIB, 3 * GIB) is None
    assert share([100 * GIB], [50 * GIB], 3 * GIB, 3 * GIB)[0].size == 3 * GIB


def test_without_a_limit_in_qemu_there_is_only_the_threshold():
    (one,) = share([100 * GIB], [GIB], 100 * GIB, limited=False)
    assert one.throttle_at is None
    assert one.abort_at is not None


@given(sizes=SIZES, free=st.integers(0, 8192 * GIB), limited=st.booleans(), full=st.floats(0, 1))
def test_every_share_is_there_and_leaves_its_reserve(sizes, free, limited, full):
    made = share(sizes, [int(size * full) for size in sizes], free, limited=limited)
    if made is None:
        assert sum(min(scratch_space.whole(size), 512 * MIB) for size in sizes) > free
        return
    assert sum(one.size for one in made) <= free
    for size, one in zip(sizes, made, strict=True):
        if one.abort_at is None:
            assert one.size >= scratch_space.whole(size)
        else:
            assert 0 < one.abort_at <= one.size - 256 * MIB
            assert one.throttle_at is None or one.abort_at < one.throttle_at <= one.size - 192 * MIB
