# SPDX-License-Identifier: GPL-2.0-or-later
"""The journal of a run under way: `run.json` in its `.partial` folder.

It tells what QEMU can't be asked: whether we froze the guest, and which node a device used before a
filter was put in. It is never believed for anything that would reach outside the run.
"""

import json
from dataclasses import asdict, dataclass

from backupctl.names import DiskName, NodeName, PointId, RepositoryId, VmName, disk_name, point_id, vm_name
from backupctl.repository import strict_json
from backupctl.repository.manifest import repository_id
from backupctl.repository.strict_json import Fields

FORMAT = 1
FILE_NAME = "run.json"


@dataclass(frozen=True)
class JournalDisk:
    """One disk of a run. number: its place in the run; part of the names of all that is made for it."""

    name: DiskName
    node: NodeName
    number: int
    base: PointId | None


@dataclass(frozen=True)
class Journal:
    """What a run noted. step: the last one begun. froze: the guest may be frozen, by us."""

    point: PointId
    vm: VmName
    repository: RepositoryId
    kind: str
    step: str
    started: str
    pid: int
    disks: tuple[JournalDisk, ...]
    froze: bool

    def to_json(self) -> bytes:
        """Return the file's content."""
        return (json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes) -> "Journal":
        """Read a journal. Raises strict.Malformed."""
        fields = Fields(strict_json.parse(content, FILE_NAME), FILE_NAME)
        if fields.number("format") != FORMAT:
            raise strict_json.Malformed(f"{FILE_NAME}: unknown format")
        journal = cls(
            point=fields.text("point", point_id),
            vm=fields.text("vm", vm_name),
            repository=fields.text("repository", repository_id),
            kind=fields.choice("kind", "full", "incremental"),
            step=fields.text("step", strict_json.plain_text(100)),
            started=fields.text("started", strict_json.plain_text(100)),
            pid=fields.number("pid"),
            disks=tuple(_disk(entry) for entry in fields.items("disks")),
            froze=fields.flag("froze"),
        )
        fields.done()
        return journal


def _disk(value: object) -> JournalDisk:
    fields = Fields(value, "a disk of the journal")
    disk = JournalDisk(
        name=fields.text("name", disk_name),
        node=NodeName(fields.text("node", strict_json.plain_text(100))),
        number=fields.number("number", 10_000),
        base=fields.optional("base", point_id),
    )
    fields.done()
    return disk
