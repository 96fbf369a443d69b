# SPDX-License-Identifier: GPL-2.0-or-later
"""The backup of a VM that is running now, in words: its step, how far it is, when it ends."""

from dataclasses import dataclass
from datetime import UTC, datetime

from backupctl.names import PointId
from backupctl.repository import activity
from backupctl.repository.activity import DiskActivity
from backupctl.repository.vm_directory import VmDirectory

STEPS = 10
_STEPS: dict[str, tuple[int | None, str]] = {
    "prepare": (1, "checking the VM, the repository and the space"),
    "attach": (2, "creating scratch files"),
    "freeze": (3, "freezing the guest's file systems, taking the point in time, thawing"),
    "transaction": (4, "taking the point in time"),
    "thaw": (5, "thawing the guest's file systems"),
    "export": (6, "exporting the disks"),
    "copy": (7, "copying"),
    "dismantle": (8, "removing exports, jobs and scratch files"),
    "commit": (9, "committing the recovery point"),
    "settle": (10, "removing bitmaps that are not needed any more"),
    "roll back": (None, "undoing the run, which has failed"),
}


@dataclass(frozen=True)
class Running:
    """A backup that is running. command: full or incremental. point: None before it is named.

    number: of the step, of `steps`; None while the run is undone. description: the step in words. started,
    updated: UTC. estimated: total_bytes is, since some disks are not begun. rate_bytes: a second.
    """

    command: str
    pid: int
    point: PointId | None
    step: str
    number: int | None
    steps: int
    description: str
    started: str
    updated: str
    elapsed_seconds: int
    disks: tuple[DiskActivity, ...]
    done_bytes: int
    total_bytes: int
    estimated: bool
    rate_bytes: int | None
    left_seconds: int | None


def running(directory: VmDirectory, now: datetime | None = None) -> Running | None:
    """Return the backup of a VM that is running; None if there is none. Changes nothing."""
    found = activity.read(directory)
    if found is None:
        return None
    number, description = _STEPS.get(found.step, (None, found.step))
    elapsed = (now or datetime.now(UTC)) - activity.moment(found.started)
    return Running(
        command=found.command,
        pid=found.pid,
        point=found.point,
        step=found.step,
        number=number,
        steps=STEPS,
        description=description,
        started=found.started,
        updated=found.updated,
        elapsed_seconds=max(0, round(elapsed.total_seconds())),
        disks=found.disks,
        done_bytes=found.done_bytes,
        total_bytes=found.total_bytes,
        estimated=found.estimated,
        rate_bytes=found.rate_bytes,
        left_seconds=found.left_seconds,
    )
