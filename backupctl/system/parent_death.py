# SPDX-License-Identifier: GPL-2.0-or-later
"""A signal that the kernel sends to a child when its parent ends, by whatever cause (prctl(2))."""

import ctypes
import os
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def signalled(number: signal.Signals) -> Callable[[], None]:
    """Return what a child is to call before it executes a program (`preexec_fn`).

    The parent's death is that of the thread that started the child, so only the main thread may start one.
    """
    parent = os.getpid()

    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it ended before the call, which then has no effect
            os.kill(os.getpid(), number)

    return prepare
