# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether anything in a VM's directory may have changed, by one look at it, however many points it has.

A seal is the inode and both dates of the directory, as they were when its points were compared. Each of these
makes another date, and so breaks the seal: a point or any other entry that is added, removed, renamed or
exchanged; whoever takes the VM's lock; a marker that is set or removed without that lock. What is changed by
other hands inside the directory of a point does not: that is for those who read the points to find.

Two changes in one tick of the kernel's clock leave the same time of change (ctime). So the time of
modification (mtime) is set into the past first: the kernel sets it to the present at each change, and never
to the past.
"""

import os
import stat
import time
from pathlib import Path
from typing import NamedTuple

_BACK_NS = 3_000_000_000
"""Further than two changes can be apart that a file system gives one date; that is 2 s at most."""


class Stamp(NamedTuple):
    """The inode of a directory, and its dates in nanoseconds since 1970."""

    inode: int
    modified_ns: int
    changed_ns: int


def date(path: Path) -> Stamp | None:
    """Give a directory dates that no later change leaves; None if its file system does not keep them.

    What was changed before is not in them: look at it afterwards. Raises OSError.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        now = time.time_ns()
        os.utime(descriptor, ns=(now, now - _BACK_NS))
        found = _stamp(os.fstat(descriptor))
    finally:
        os.close(descriptor)
    return found if found.modified_ns + _BACK_NS // 2 < found.changed_ns else None


def is_whole(path: Path, stamp: Stamp) -> bool:
    """Whether a directory has the dates of a seal. Raises nothing."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and _stamp(found) == stamp


def break_of(path: Path) -> None:
    """Break the seal of a directory, if it has one. Raises OSError."""
    os.utime(path, follow_symlinks=False)


def _stamp(found: os.stat_result) -> Stamp:
    return Stamp(found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
