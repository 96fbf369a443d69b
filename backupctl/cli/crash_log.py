# SPDX-License-Identifier: GPL-2.0-or-later
"""Tracebacks of errors in backupctl itself: kept in the temporary folder for a report, and only a few."""

import os
import stat
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path

MOST = 10
_PREFIX, _SUFFIX = "backupctl-error-", ".log"


def write() -> str:
    """Write down the exception that is being handled; returns the file, "" if there is no room for it."""
    with suppress(OSError):
        _make_room(Path(tempfile.gettempdir()))
        descriptor, path = tempfile.mkstemp(prefix=_PREFIX, suffix=_SUFFIX)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as log:
            traceback.print_exc(file=log)
        return path
    return ""


def _make_room(folder: Path) -> None:
    """Remove the oldest of our own logs; links and those of other users are left alone."""
    ours = []
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(FileNotFoundError):
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
                ours.append((found.st_mtime_ns, path))
    for _, path in sorted(ours)[: max(0, len(ours) - MOST + 1)]:
        path.unlink(missing_ok=True)
