# SPDX-License-Identifier: GPL-2.0-or-later
import pytest

from backupctl.transfer.rate_limit import TokenBucket


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_without_a_limit_nobody_waits():
    bucket = TokenBucket(None)
    bucket.spend(1 << 40)
    assert bucket.wait_seconds() == 0


@pytest.mark.parametrize("request_bytes", [100, 1000, 10_000])
def test_over_time_the_rate_is_kept(request_bytes):
    clock = Clock()
    bucket = TokenBucket(1000, clock)
    spent = 0
    while clock.now < 200:
        wait = bucket.wait_seconds()
        if wait:
            clock.now += max(wait, 1e-6)  # less is lost in the clock's rounding
            continue
        bucket.spend(request_bytes)
        spent += request_bytes
    assert 100_000 <= spent <= 100_000 + request_bytes + 250


def test_a_pause_is_not_made_up_for():
    clock = Clock()
    bucket = TokenBucket(1000, clock)
    clock.now += 3600
    bucket.wait_seconds()
    bucket.spend(251)
    assert bucket.wait_seconds() > 0
