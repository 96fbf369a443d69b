# SPDX-License-Identifier: GPL-2.0-or-later
"""Sizes, rates and durations as people write and read them. All units of size are powers of 1024."""

import re

from backupctl.errors import UsageError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,6})?)\s*([KMGT]?)(?:i?B)?(?:/s)?", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """Parse "100M", "1.5G", "50MiB/s" or plain bytes; return bytes. Raises UsageError."""
    match = _SIZE.fullmatch(text.strip())
    if not match or float(match[1]) == 0:
        raise UsageError(f"{text!r:.60} is not a size or rate; examples: 100M, 1.5G, 50MiB/s")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def size(count: int) -> str:
    """Return a number of bytes as text for people: "1.5 GiB"."""
    if count < 1 << 10:
        return f"{count} B"
    if count < 1 << 20:
        return f"{count / 1024:.1f} KiB"
    if count < 1 << 30:
        return f"{count / 1048576:.1f} MiB"
    if count < 1 << 40:
        return f"{count / 1073741824:.1f} GiB"
    return f"{count / 1099511627776:.1f} TiB"


def duration(seconds: float) -> str:
    """Return a duration as text for people: "0.4 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
