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


def write(transcript: Iterable[str] = ()) -> str:
    """Write down log lines and the exception that is being handled.

    Returns the path of the file, "" if it could not be written.
    """
    with suppress(OSError):
        _make_room(Path(tempfile.gettempdir()))
        descriptor, path = tempfile.mkstemp(prefix=_PREFIX, suffix=_SUFFIX)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as log:
            log.write(f"backupctl {__version__}, Python {sys.version.split()[0]}\n")
            log.writelines(f"{line}\n" for line in transcript)
            traceback.print_exc(file=log)
        return path
    return ""


def of(err: BackupctlError, *, bug: bool = False) -> str:
    """Return the file that has the details of a failure; "" for errors that are wholly told by their text."""
    found = logs.current()
    if err.exit_code not in _WORTH_A_LOG or isinstance(err, Interrupted):
        return ""
    if found.file and not bug:  # it has all but a traceback
        return str(found.file)
    return write(found.transcript) if found.transcript or bug else ""


def _make_room(directory: Path) -> None:
    """Remove the oldest of our own logs; links and those of other users are left alone."""
    ours = []
    for path in directory.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(FileNotFoundError):
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
                ours.append((found.st_mtime_ns, path))
    for _, path in sorted(ours)[: max(0, len(ours) - MOST + 1)]:
        path.unlink(missing_ok=True)
