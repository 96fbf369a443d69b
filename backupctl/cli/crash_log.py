# SPDX-License-Identifier: GPL-2.0-or-later
"""What a failed run leaves for whoever looks into it: its last log lines, and the traceback of a bug.

They are kept in the temporary directory, for us alone, and only a few.
"""

import os
import stat
import sys
import tempfile
import traceback
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from backupctl import __version__
from backupctl.cli import logs
from backupctl.errors import BackupctlError, Failed, Interrupted, NeedsRecovery

MOST = 10
_WORTH_A_LOG = (Failed.exit_code, NeedsRecovery.exit_code)
_PREFIX, _SUFFIX = "backupctl-error-", ".log"
_HEAD = "backupctl "
_MOST_BYTES = 1 << 20
"""More than 2000 lines of a transcript usually have."""


def write(transcript: Iterable[str] = ()) -> str:
    """Write down log lines and the exception that is being handled.

    Returns the path of the file, "" if it could not be written.
    """
    with suppress(OSError):
        descriptor, path = new_file(_PREFIX)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as log:
            log.write(f"{_HEAD}{__version__}, Python {sys.version.split()[0]}\n")
            log.writelines(f"{line}\n" for line in transcript)
            traceback.print_exc(file=log)
        return path
    return ""


def new_file(prefix: str) -> tuple[int, str]:
    """Create a log whose name begins so; of those there were, remove the oldest. Raises OSError.

    Returns its descriptor and its path.
    """
    _make_room(prefix)
    return tempfile.mkstemp(prefix=prefix, suffix=_SUFFIX)


def of(err: BackupctlError, *, bug: bool = False) -> str:
    """Return the file that has the details of a failure; "" for errors that are wholly told by their text."""
    found = logs.current()
    if err.exit_code not in _WORTH_A_LOG or isinstance(err, Interrupted):
        return ""
    if found.file and not bug:  # it has all but a traceback
        return str(found.file)
    return write(found.transcript) if found.transcript or bug else ""


def ours(prefix: str = _PREFIX) -> list[Path]:
    """Return our own logs, oldest first; not links, nor those of other users."""
    found = []
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*{_SUFFIX}"):
        with suppress(FileNotFoundError):
            status = path.lstat()
            if _is_ours(status):
                found.append((status.st_mtime_ns, path))
    return [path for _, path in sorted(found)]


def read(path: Path) -> str | None:
    """Return the end of one of our logs; None if it cannot be read, or is not one."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            # Anybody may put a name into the temporary directory, also for a file that root alone may read.
            if _is_ours(os.fstat(descriptor)) and file.read(len(_HEAD)) == _HEAD.encode():
                file.seek(max(0, os.fstat(descriptor).st_size - _MOST_BYTES))
                return file.read(_MOST_BYTES).decode(errors="backslashreplace")
    return None


def _is_ours(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1


def _make_room(prefix: str) -> None:
    """Remove the oldest of our own logs; links and those of other users are left alone."""
    found = ours(prefix)
    for path in found[: max(0, len(found) - MOST + 1)]:
        path.unlink(missing_ok=True)
