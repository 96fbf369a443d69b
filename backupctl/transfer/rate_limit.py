# SPDX-License-Identifier: GPL-2.0-or-later
"""A rate limit: one token bucket for all disks of a run."""

import threading
import time
from collections.abc import Callable


class TokenBucket:
    """Limits how many bytes are requested per second, by all threads together.

    bytes_per_second: None for no limit. The bucket holds what a quarter of a second allows, so that no burst
    follows a pause; one request may overdraw it, and the next ones then wait.
    """

    def __init__(self, bytes_per_second: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = bytes_per_second
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens = 0.0
        self._filled = clock()

    def wait_seconds(self) -> float:
        """Return the seconds to wait before the next request may be sent; 0 if it may be sent now."""
        if self._rate is None:
            return 0.0
        with self._lock:
            now = self._clock()
            self._tokens = min(self._tokens + (now - self._filled) * self._rate, self._rate / 4)
            self._filled = now
            return max(0.0, -self._tokens / self._rate)

    def spend(self, length: int) -> None:
        """Account for a request that is sent. length: in bytes."""
        if self._rate is not None:
            with self._lock:
                self._tokens -= length
