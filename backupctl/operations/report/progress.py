# SPDX-License-Identifier: GPL-2.0-or-later
"""What a command that works on a VM now has done so far, by what can be seen in the repository.

How much there is still to do is known to the run alone.
"""

import os
from contextlib import suppress
from datetime import UTC, datetime

from backupctl.errors import BackupctlError
from backupctl.operations.report.facts import RunFacts
from backupctl.repository import history, markers
from backupctl.repository.pending_point import PendingPoint
from backupctl.repository.vm_directory import VmDirectory


def of(directory: VmDirectory) -> RunFacts | None:
    """Return what works on a VM now, None if nothing does. Changes nothing. Raises BackupctlError."""
    if directory.lock_holder() is None:
        return None
    for pending in directory.pending_points():
        with suppress(BackupctlError):  # it has just been committed or dropped
            journal = pending.journal()
            if journal is not None and not markers.has(pending.path, markers.RETIRED):
                return RunFacts(journal.kind, pending.point, _time(journal.started), _written(pending))
    return RunFacts("other")


def version(directory: VmDirectory) -> str:
    """Return a text that changes when points of a VM come or go. Raises RepositoryError."""
    return f"{directory.name} {history.end(directory.path)} {','.join(directory.all_points()[-1:])}"


def _written(pending: PendingPoint) -> int:
    """Return how many bytes of the file system a point takes so far."""
    written = 0
    with suppress(OSError), os.scandir(pending.path) as entries:
        for entry in entries:
            with suppress(OSError):
                written += entry.stat(follow_symlinks=False).st_blocks * 512
    return written


def _time(text: str) -> datetime | None:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found.astimezone(UTC)
