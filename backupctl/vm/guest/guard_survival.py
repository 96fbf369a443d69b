# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guard asks of the kernel so as to be there, and awake, when the host is out of memory.

As far as it is allowed: each of these needs rights that an ordinary user has not.
"""

import ctypes
import resource
from contextlib import suppress

NEVER_KILLED = -1000
_MCL_CURRENT, _MCL_FUTURE = 1, 2
_CAP_IPC_LOCK = 1 << 14
_SCORE = "/proc/self/oom_score_adj"


def outlive() -> None:
    """Ask not to be killed for memory, nor to be swapped out. Never raises."""
    for score in (NEVER_KILLED, 0):
        with suppress(OSError, ValueError):
            if int(_read(_SCORE)) > score:
                with open(_SCORE, "w", encoding="ascii") as file:  # noqa: PTH123 - as in `_read`
                    file.write(str(score))
            break
    _lock_memory()


def _lock_memory() -> None:
    # Not within a limit: memory that is locked can't grow past it, and then we would die of that.
    with suppress(OSError, ValueError, AttributeError):
        _lift_limit()
        ctypes.CDLL(None).mlockall(_MCL_CURRENT | _MCL_FUTURE)


def _lift_limit() -> None:
    """Let any amount of memory be locked. Raises OSError or ValueError if that is not allowed."""
    status = _read("/proc/self/status")
    if not int(status.partition("CapEff:")[2].split()[0], 16) & _CAP_IPC_LOCK:  # which knows no limit
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - pathlib loads slowly
        return file.read()
