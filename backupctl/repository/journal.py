# SPDX-License-Identifier: GPL-2.0-or-later
"""The journal of a run under way: `run.json` in its `.partial` directory.

It says what QEMU cannot be asked: whether we froze the guest, and which node a device used before a
filter was inserted. It is never believed for anything outside the run.
"""

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from msgspec import Meta

from backupctl.names import DiskName, PointId, VmName, disk_name, point_id, vm_name
from backupctl.repository import strict_json
from backupctl.repository.strict_json import Document, NodeText, RepositoryHex, ShortText, Size

FORMAT = 1
FILE_NAME = "run.json"


@dataclass(frozen=True)
class JournalDisk:
    """One disk of a run. number: its place in the run; part of the names of all that is made for it."""

    name: DiskName
    node: NodeText
    number: Annotated[int, Meta(ge=0, le=10_000)]
    base: PointId | None


@dataclass(frozen=True)
class Journal(Document):
    """What a run noted. step: the last one begun. froze: the guest may be frozen, by us."""

    point: PointId
    vm: VmName
    repository: RepositoryHex
    kind: Literal["full", "incremental"]
    step: ShortText
    started: ShortText
    pid: Size
    disks: tuple[JournalDisk, ...]
    froze: bool

    def check(self) -> None:
        """Check what types do not say. Raises InvalidName."""
        point_id(self.point)
        vm_name(self.vm)
        for disk in self.disks:
            disk_name(disk.name)
            if disk.base is not None:
                point_id(disk.base)

    def to_json(self) -> bytes:
        """Return the file's content."""
        return (json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes) -> "Journal":
        """Read a journal. Raises strict_json.Malformed."""
        return strict_json.read(content, cls, FILE_NAME, FORMAT)
