# SPDX-License-Identifier: GPL-2.0-or-later
"""What the run that holds a VM's lock is doing: in the lock's own file, behind the process id.

::

    4711
    {"format": 1, "command": "incremental", ..., "checksum": "..."}

The file is there already, belongs to whoever holds the lock, and means nothing without it: nothing is left
behind by a crash. It is never synced. It is written in place, with one call; a reader that meets half of it
sees that by the checksum, and looks again. It is for people who watch: no decision is based on it.
"""

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from backupctl.errors import RepositoryUnreadable
from backupctl.names import DiskName, PointId, disk_name, point_id
from backupctl.repository import strict_json
from backupctl.repository.strict_json import Document, ShortText, Size
from backupctl.repository.vm_directory import LOCK, VmDirectory
from backupctl.system import safe_open

FORMAT = 1
MAX_BYTES = 1 << 18
"""More is neither written nor read: of hundreds of disks, none is listed."""
_TRIES = 5
_PAUSE_SECONDS = 0.02
_STAMP = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True)
class DiskActivity:
    """How far one disk is, in bytes. estimated: its total is not known before its copy begins."""

    name: DiskName
    done_bytes: Size
    total_bytes: Size
    estimated: bool


@dataclass(frozen=True)
class Activity(Document):
    """What a run is doing. started, updated: UTC, like 2026-11-23T04:15:00Z.

    point: None before it is named. rate_bytes: a second; left_seconds: until all disks are copied; None while
    nobody knows.
    """

    command: ShortText
    pid: Size
    step: ShortText
    point: PointId | None
    started: str
    updated: str
    disks: tuple[DiskActivity, ...] = ()
    done_bytes: Size = 0
    total_bytes: Size = 0
    estimated: bool = False
    rate_bytes: Size | None = None
    left_seconds: Size | None = None

    def check(self) -> None:
        """Check what types do not say. Raises ValueError, InvalidName."""
        if self.point is not None:
            point_id(self.point)
        for disk in self.disks:
            disk_name(disk.name)
        moment(self.started)
        moment(self.updated)


def moment(text: str) -> datetime:
    """Read a time of an activity. Raises ValueError."""
    return datetime.strptime(text, _STAMP).replace(tzinfo=UTC)


def stamp(time: datetime) -> str:
    """Write one."""
    return time.astimezone(UTC).strftime(_STAMP)


def write(lock: int, activity: Activity) -> None:
    """Write into the file of a lock that the caller holds. What fails is left out: it is only for people."""
    fields = {"format": FORMAT, **asdict(activity)}
    line = json.dumps({**fields, "checksum": strict_json.checksum(fields)})
    content = f"{activity.pid}\n{line}\n".encode()
    if len(content) > MAX_BYTES:
        return
    with suppress(OSError):
        os.pwrite(lock, content, 0)
        os.ftruncate(lock, len(content))


def read(directory: VmDirectory) -> Activity | None:
    """Return what a run is doing; None if none holds the lock, or does not tell, or its process is gone."""
    for _ in range(_TRIES):
        if directory.lock_holder() is None:
            return None
        found = _read(directory.path)
        if found is not None:
            # A killed run's guard has the lock too: what the run noted last is not going on any more.
            return found if Path("/proc", str(found.pid)).exists() else None
        time.sleep(_PAUSE_SECONDS)
    return None


def _read(path: Path) -> Activity | None:
    try:
        content = safe_open.read(path / LOCK, MAX_BYTES)
    except (safe_open.NotThere, RepositoryUnreadable):
        return None
    if len(content) > MAX_BYTES:
        return None
    first, _, line = content.partition(b"\n")
    try:
        found = strict_json.read(line, Activity, LOCK, FORMAT, signed=True)
    except strict_json.Malformed:
        return None
    return found if first == str(found.pid).encode() else None
