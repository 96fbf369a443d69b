# SPDX-License-Identifier: GPL-2.0-or-later
"""What works on a VM now, and whether points have come or gone: what a page that is watched asks often."""

from datetime import datetime

from backupctl.operations import running
from backupctl.operations.report.facts import RunFacts
from backupctl.repository import history
from backupctl.repository.vm_directory import VmDirectory


def of(directory: VmDirectory, now: datetime) -> RunFacts | None:
    """Return what works on a VM now, None if nothing does. Changes nothing."""
    found = running.running(directory, now)
    if found is None:
        return None if directory.lock_holder() is None else RunFacts("other")
    return RunFacts(
        found.command,
        found.point,
        found.elapsed_seconds,
        found.number,
        found.description,
        found.done_bytes,
        found.total_bytes,
        found.estimated,
        found.left_seconds,
    )


def version(directory: VmDirectory) -> str:
    """Return a text that changes when points of a VM come or go. Raises RepositoryError."""
    return f"{directory.name} {history.end(directory.path)} {','.join(directory.all_points()[-1:])}"
