# SPDX-License-Identifier: GPL-2.0-or-later
"""The manifest: what a recovery point is. `manifest.json` in the point's directory; only prune changes it.

It has a checksum over all its other fields, so any changed byte is found before a field is believed.
"""

import json
import re
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any, Literal

from backupctl.errors import DamageFound, UnknownFormat
from backupctl.names import DiskName, PointId, VmName, disk_name, point_id, vm_name
from backupctl.repository import stored_files, strict_json
from backupctl.repository.stored_files import StoredFile
from backupctl.repository.strict_json import (
    Document,
    Hex,
    Malformed,
    NewerFormat,
    NodeText,
    RepositoryHex,
    ShortText,
    Size,
    Text,
)

FORMAT = 3
_WITHOUT_OFFLINE = 1
_WITHOUT_DEFINITION = 2
"""The lowest formats of points without what came later: the VM's definition, a VM that is off. A program that
does not know these must not take them for damaged."""
FILE_NAME = "manifest.json"
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")

PointKind = Literal["full", "incremental"]
Consistency = Literal["filesystem", "crash", "offline"]


@dataclass(frozen=True)
class Merged:
    """What a layer is once the one below has been merged into it; sizes in bytes.

    While a prune replaces image and digest map, a disk's entry has both descriptions; the backing file that
    the image names decides which of them is valid.
    """

    parent: PointId | None
    file_bytes: Size
    stored_bytes: Size
    digests: Hex


@dataclass(frozen=True)
class FreezeEntry:
    """asked: auto, require or never. got: frozen or none. milliseconds: how long, None if not frozen."""

    asked: Literal["auto", "require", "never"]
    got: Literal["frozen", "none"]
    milliseconds: Size | None


@dataclass(frozen=True)
class DiskEntry:
    """One disk of a point; sizes in bytes.

    kind: full, or incremental on `parent`'s image of this disk. size: virtual size. node, format: where
    it was read. persistent: whether its bitmap survives a restart of QEMU. reason: why it is full inside
    an incremental point, "" otherwise. file_bytes: the length of its image, which QEMU would read as
    zeroes beyond an end that was cut off. unchanged_bytes: marked dirty, but with the same content as before,
    so not stored. scanned: there was no bitmap; the whole disk was read and compared with the parent.
    digests: the checksum of its digest map, which binds map and layer to this point. merged: what it is
    about to become, None but in the middle of a prune.
    """

    name: DiskName
    kind: PointKind
    parent: PointId | None
    size: Size
    node: NodeText
    format: ShortText
    persistent: bool
    reason: Text
    dirty_bytes: Size
    copied_bytes: Size
    zero_bytes: Size
    stored_bytes: Size
    file_bytes: Size
    unchanged_bytes: Size
    scanned: bool
    digests: Hex
    merged: Merged | None = None

    def after_merge(self) -> "DiskEntry":
        """Return the entry of what `merged` describes; this one if there is none."""
        if self.merged is None:
            return self
        kind: PointKind = "incremental" if self.merged.parent else "full"
        return replace(self, kind=kind, merged=None, **vars(self.merged))

    def check(self, point: PointId) -> None:
        """Check the entry of a disk of that point. Raises ValueError, InvalidName."""
        disk_name(self.name)
        _check_parent(self.kind, self.parent, point)
        after = self.after_merge()
        _check_parent(after.kind, after.parent, point)


@dataclass(frozen=True)
class Manifest(Document):
    """One recovery point. start, end: UTC, like 2026-11-23T04:15:00Z.

    consistency: filesystem if the guest's file systems were frozen; offline if the VM was off; otherwise
    crash. checkpoints: how many bitmaps of older points the VM was asked to keep for differentials.
    definition: the files that describe the VM, none in points of older versions.
    """

    point: PointId
    kind: PointKind
    parent: PointId | None
    vm: VmName
    repository: RepositoryHex
    disks: tuple[DiskEntry, ...]
    freeze: FreezeEntry
    consistency: Consistency
    qemu: ShortText
    backupctl: ShortText
    start: str
    end: str
    checkpoints: Size
    definition: tuple[StoredFile, ...] = field(default=(), metadata={strict_json.LEFT_OUT: True})

    def check(self) -> None:
        """Check what types do not say. Raises ValueError, InvalidName."""
        vm_name(self.vm)
        _check_parent(self.kind, self.parent, point_id(self.point))
        for entry in self.disks:
            entry.check(self.point)
        names = [entry.name for entry in self.disks]
        if not names or len(set(names)) != len(names):
            raise ValueError("no disk, or one of them twice")
        stored_files.check(self.definition)
        _moment(self.start)
        _moment(self.end)

    @cached_property
    def checksum(self) -> str:
        """The checksum over all its fields, as it stands in the file."""
        return strict_json.checksum(self.to_dict())

    @property
    def started(self) -> datetime:
        """The time when the run began, by its clock."""
        return _moment(self.start)

    @property
    def ended(self) -> datetime:
        """The time when the run was about to commit, by its clock."""
        return _moment(self.end)

    def disk(self, name: str) -> DiskEntry | None:
        """Return the entry of a disk."""
        return next((entry for entry in self.disks if entry.name == name), None)

    def with_disk(self, changed: DiskEntry) -> "Manifest":
        """Return the manifest with another entry for the disk of that name."""
        entries = tuple(changed if entry.name == changed.name else entry for entry in self.disks)
        return replace(self, disks=entries)

    def to_dict(self) -> dict[str, Any]:
        """Return the document, without its checksum."""
        document = {"format": self.format, **asdict(self), "disks": [asdict(entry) for entry in self.disks]}
        return strict_json.without_left_out(document, self)

    @property
    def format(self) -> int:
        """The lowest format version that has all values of this manifest: older programs read that."""
        if self.definition:
            return FORMAT
        return _WITHOUT_DEFINITION if self.consistency == "offline" else _WITHOUT_OFFLINE

    def to_json(self) -> bytes:
        """Return the file's content."""
        return (json.dumps({**self.to_dict(), "checksum": self.checksum}, indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes) -> "Manifest":
        """Read a manifest. Raises UnknownFormat, DamageFound."""
        return _read_once(content)


@lru_cache(1 << 14)
def _read_once(content: bytes) -> Manifest:
    """Read a manifest, one of each content: a prune looks at all of them after every step."""
    try:
        return strict_json.read(content, Manifest, FILE_NAME, FORMAT, signed=True)
    except NewerFormat as err:
        raise UnknownFormat(str(err)) from err
    except Malformed as err:
        raise DamageFound(str(err)) from err


def _check_parent(kind: PointKind, parent: PointId | None, point: PointId) -> None:
    """Check that an incremental, and nothing else, has a parent, and that it is older. Raises ValueError."""
    if (kind == "incremental") != (parent is not None):
        raise ValueError(f"kind {kind} does not go with the parent {parent}")
    # Chains are followed from parent to parent: were one not older, that would never end.
    if parent is not None and point_id(parent) >= point:
        raise ValueError(f"the parent {parent} is not older than the point")


def _moment(text: str) -> datetime:
    # What we write is read without strptime, whose first call loads two modules, and each takes 0.1 ms.
    if _TIME.fullmatch(text):
        return datetime.fromisoformat(text)
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z")
