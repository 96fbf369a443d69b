# SPDX-License-Identifier: GPL-2.0-or-later
"""The manifest: what a recovery point is. `manifest.json` in the point's folder; only prune changes it.

It carries a checksum over all its other fields, so that any changed byte is found before a word of it
is believed.
"""

import json
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal, cast

from blake3 import blake3

from backupctl.errors import DamageFound, UnknownFormat
from backupctl.names import DiskName, NodeName, PointId, RepositoryId, VmName, disk_name, point_id, vm_name
from backupctl.repository import strict_json
from backupctl.repository.strict_json import Fields, Malformed

FORMAT = 1
FILE_NAME = "manifest.json"

PointKind = Literal["full", "incremental"]


@dataclass(frozen=True)
class Merged:
    """What a layer is once the one below has been merged into it; sizes in bytes.

    While a prune exchanges image and digest map a disk's entry has both descriptions; the image's own
    backing link tells which of them holds.
    """

    parent: PointId | None
    file_bytes: int
    stored_bytes: int
    digests: str


@dataclass(frozen=True)
class FreezeEntry:
    """asked: auto, require or never. got: frozen or none. milliseconds: how long, None if not frozen."""

    asked: str
    got: str
    milliseconds: int | None


@dataclass(frozen=True)
class DiskEntry:
    """One disk of a point; sizes in bytes.

    kind: full, or incremental on `parent`'s image of this disk. size: virtual size. node, format: where
    it was read. persistent: whether its bitmap survives a restart of QEMU. reason: why it is full inside
    an incremental point, "" otherwise. file_bytes: the length of its image, which QEMU would read as
    zeroes behind an end that was cut off. unchanged_bytes: named dirty, but the content was as before, so
    not stored. scanned: no bitmap told what changed; the whole disk was read and compared with the parent.
    digests: the checksum of its digest map, which binds map and layer to this point. merged: what it is
    about to become, None but in the middle of a prune.
    """

    name: DiskName
    kind: PointKind
    parent: PointId | None
    size: int
    node: NodeName
    format: str
    persistent: bool
    reason: str
    dirty_bytes: int
    copied_bytes: int
    zero_bytes: int
    stored_bytes: int
    file_bytes: int
    unchanged_bytes: int
    scanned: bool
    digests: str
    merged: Merged | None = None

    def after_merge(self) -> "DiskEntry":
        """Return the entry of what `merged` describes; this one if there is none."""
        if self.merged is None:
            return self
        kind: PointKind = "incremental" if self.merged.parent else "full"
        return replace(self, kind=kind, merged=None, **vars(self.merged))


@dataclass(frozen=True)
class Manifest:
    """One recovery point. start, end: UTC, like 2026-11-23T04:15:00Z.

    checkpoints: how many bitmaps of older points the VM was asked to keep for differentials.
    """

    point: PointId
    kind: PointKind
    parent: PointId | None
    vm: VmName
    repository: RepositoryId
    disks: tuple[DiskEntry, ...]
    freeze: FreezeEntry
    consistency: Literal["filesystem", "crash"]
    qemu: str
    backupctl: str
    start: str
    end: str
    checkpoints: int

    @property
    def checksum(self) -> str:
        """The checksum over all its fields, as it stands in the file."""
        return _checksum(self.to_dict())

    @property
    def started(self) -> datetime:
        """What the clock showed when the run began."""
        return _moment(self.start)

    def disk(self, name: str) -> DiskEntry | None:
        """Return the entry of a disk."""
        return next((entry for entry in self.disks if entry.name == name), None)

    def with_disk(self, changed: DiskEntry) -> "Manifest":
        """Return the manifest with another entry for the disk of that name."""
        entries = tuple(changed if entry.name == changed.name else entry for entry in self.disks)
        return replace(self, disks=entries)

    def to_dict(self) -> dict[str, Any]:
        """Return the document, without its checksum."""
        return {"format": FORMAT, **asdict(self), "disks": [asdict(entry) for entry in self.disks]}

    def to_json(self) -> bytes:
        """Return the file's content."""
        document = self.to_dict()
        document["checksum"] = _checksum(document)
        return (json.dumps(document, indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes) -> "Manifest":
        """Read a manifest. Raises UnknownFormat, DamageFound."""
        return _read_once(content)


@lru_cache(1 << 14)
def _read_once(content: bytes) -> Manifest:
    """Read a manifest, one of each content: a prune looks at all of them after every step."""
    try:
        document = strict_json.parse(content, FILE_NAME)
        version = document.get("format") if isinstance(document, dict) else None
        if isinstance(version, int) and not isinstance(version, bool) and version > FORMAT:
            raise UnknownFormat(
                f"the manifest has format {version}; this backupctl knows {FORMAT}: a newer one made it"
            )
        return _read(document)
    except RecursionError as err:
        raise DamageFound(f"{FILE_NAME} is nested too deep") from err
    except Malformed as err:
        raise DamageFound(str(err)) from err


def _read(document: object) -> Manifest:
    fields = Fields(document, FILE_NAME)
    checksum = fields.text("checksum", strict_json.plain_text(64))
    unsigned = {name: value for name, value in cast("dict[str, Any]", document).items() if name != "checksum"}
    if checksum != _checksum(unsigned):
        raise Malformed(f"{FILE_NAME} does not agree with its checksum")
    if fields.number("format") != FORMAT:
        raise Malformed(f"{FILE_NAME} has no format that ever was")
    manifest = Manifest(
        point=fields.text("point", point_id),
        kind=cast("PointKind", fields.choice("kind", "full", "incremental")),
        parent=fields.optional("parent", point_id),
        vm=fields.text("vm", vm_name),
        repository=fields.text("repository", repository_id),
        disks=tuple(_disk(entry) for entry in fields.items("disks")),
        freeze=_freeze(fields.value("freeze")),
        consistency=cast(
            "Literal['filesystem', 'crash']", fields.choice("consistency", "filesystem", "crash")
        ),
        qemu=fields.text("qemu", strict_json.plain_text(100)),
        backupctl=fields.text("backupctl", strict_json.plain_text(100)),
        start=fields.text("start", _time),
        end=fields.text("end", _time),
        checkpoints=fields.number("checkpoints"),
    )
    fields.done()
    _refuse_nonsense(manifest)
    return manifest


def _refuse_nonsense(manifest: Manifest) -> None:
    names = [entry.name for entry in manifest.disks]
    if not names or len(set(names)) != len(names):
        raise Malformed(f"{FILE_NAME}: no disk, or one twice")
    for parent in (manifest.parent, *(entry.parent for entry in manifest.disks)):
        if parent is not None and parent >= manifest.point:
            raise Malformed(f"{FILE_NAME}: the parent {parent} is not older than the point")
    for entry in manifest.disks:
        if entry.merged and entry.merged.parent and entry.merged.parent >= manifest.point:
            raise Malformed(f"{FILE_NAME}: {entry.name} is to stand on a point that is not older")
        if (entry.kind == "incremental") != (entry.parent is not None):
            raise Malformed(f"{FILE_NAME}: {entry.name} is {entry.kind}, but its parent says otherwise")
    if (manifest.kind == "incremental") != (manifest.parent is not None):
        raise Malformed(f"{FILE_NAME}: the point is {manifest.kind}, but its parent says otherwise")


def _disk(value: object) -> DiskEntry:
    fields = Fields(value, "a disk's entry")
    entry = DiskEntry(
        name=fields.text("name", disk_name),
        kind=cast("PointKind", fields.choice("kind", "full", "incremental")),
        parent=fields.optional("parent", point_id),
        size=fields.number("size"),
        node=NodeName(fields.text("node", strict_json.plain_text(100))),
        format=fields.text("format", strict_json.plain_text(100)),
        persistent=fields.flag("persistent"),
        reason=fields.text("reason", strict_json.plain_text()),
        dirty_bytes=fields.number("dirty_bytes"),
        copied_bytes=fields.number("copied_bytes"),
        zero_bytes=fields.number("zero_bytes"),
        stored_bytes=fields.number("stored_bytes"),
        file_bytes=fields.number("file_bytes"),
        unchanged_bytes=fields.number("unchanged_bytes"),
        scanned=fields.flag("scanned"),
        digests=fields.text("digests", _hexadecimal),
        merged=_merged(fields.value("merged")),
    )
    fields.done()
    return entry


def _merged(value: object) -> Merged | None:
    if value is None:
        return None
    fields = Fields(value, "a merged layer")
    found = Merged(
        parent=fields.optional("parent", point_id),
        file_bytes=fields.number("file_bytes"),
        stored_bytes=fields.number("stored_bytes"),
        digests=fields.text("digests", _hexadecimal),
    )
    fields.done()
    return found


def _freeze(value: object) -> FreezeEntry:
    fields = Fields(value, "freeze")
    entry = FreezeEntry(
        asked=fields.choice("asked", "auto", "require", "never"),
        got=fields.choice("got", "frozen", "none"),
        milliseconds=fields.number_or_none("milliseconds"),
    )
    fields.done()
    return entry


def repository_id(text: str) -> RepositoryId:
    """Check a repository's id. Raises ValueError."""
    return RepositoryId(_hexadecimal(text))


def _hexadecimal(text: str) -> str:
    if len(text) != 32 or not set(text) <= set("0123456789abcdef"):
        raise ValueError("not 32 hexadecimal digits")
    return text


def _time(text: str) -> str:
    _moment(text)
    return text


def _moment(text: str) -> datetime:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z")


def _checksum(document: dict[str, Any]) -> str:
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return str(blake3(canonical.encode()).hexdigest(16))
