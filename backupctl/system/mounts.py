# SPDX-License-Identifier: GPL-2.0-or-later
"""On which mounted file system a path is, from the kernel's list.

The path itself is not looked at: on a file system whose server does not answer, that might never return.
"""

import os
import re
from pathlib import Path

_LIST = Path("/proc/self/mountinfo")
_ESCAPED = re.compile(rb"\\([0-7]{3})")


def device(path: Path, mounts: Path = _LIST) -> str:
    """Return the number of a file system, "8:1"; the path if it is not known. Links are not followed.

    mounts: in the format of proc(5), "/proc/pid/mountinfo".
    """
    wanted = os.fsencode(os.path.normpath(path))
    best, found = b"", ""
    try:
        lines = mounts.read_bytes().splitlines()
    except OSError:
        return str(path)
    for line in lines:
        _, _, number, _, point, *_ = line.split()
        place = _ESCAPED.sub(lambda match: bytes([int(match[1], 8)]), point)
        inside = wanted == place or wanted.startswith(place.rstrip(b"/") + b"/")
        if inside and len(place) >= len(best):  # of two at one place, the later one is on top
            best, found = place, number.decode()
    return found or str(path)
