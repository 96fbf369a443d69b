# SPDX-License-Identifier: GPL-2.0-or-later
"""Checkpoints: one for each point, of all its disks. The name is the state, as with a bitmap.

A checkpoint ``backupctl-<repository>-<point>`` has a dirty bitmap of that name on each of its disks. Unlike
the bitmaps that we make ourselves, each records for as long as it exists (libvirt 9.0; formatcheckpoint.html
says so). So a checkpoint of any age tells what changed since, and to undo a run is to delete its own: nothing
is merged, and nothing is lost.

The bitmap's name does not contain the disk's, so a checkpoint's description says which files each disk
consisted of. Where images were exchanged, the bitmap in an image is another disk's, and is not used.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from backupctl.errors import CommandFailed
from backupctl.names import BitmapName, DiskName, Namespace, NodeName, PointId, bitmap_parts
from backupctl.vm.bitmap import Bitmap
from backupctl.vm.driver import PointFacts
from backupctl.vm.libvirt import xml
from backupctl.vm.libvirt.connection import Connection

_NO_DOMAIN, _SIZE = 2, 4
"""Of VIR_DOMAIN_CHECKPOINT_XML: the sizes are there only of bitmaps that can be used."""
_REDEFINE = 1
"""VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE: libvirt notes the checkpoint, and touches no bitmap."""
_METADATA_ONLY = 2
"""VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY."""
_NOT_FOUND = "1"
"""virErrorNumber's INTERNAL_ERROR: libvirt's answer if a bitmap is not in the image any more."""
_UNKNOWN_GRANULARITY = 0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a domain.

    created: seconds since 1970. sizes: by disk, the bytes that changed since; None where the bitmap is
    missing or cannot be used. files: by disk, the files that it consisted of, the active one first; empty for
    a checkpoint that is not ours.
    """

    name: str
    created: int
    sizes: Mapping[str, int | None]
    files: Mapping[str, tuple[str, ...]]

    def is_of(self, target: str, files: Sequence[str]) -> bool:
        """Whether a disk that consists of these files now is the one that this checkpoint was made of.

        A snapshot puts a file on top, and a block commit takes it away: the file that was active then is
        still there, or the one that is active now was below it.
        """
        then = self.files.get(target, ())
        return bool(then and files and (then[0] in files or files[0] in then))


def checkpoint_name(namespace: Namespace, point: PointId) -> str:
    """Name the checkpoint of a point."""
    return f"{namespace.prefix}{point}"


def description(files: Mapping[str, Sequence[str]]) -> str:
    """Return a checkpoint's description, which says of which files each disk consists."""
    return json.dumps({"backupctl": {target: list(found) for target, found in files.items()}})


def listed(connection: Connection, *, off: bool = False) -> tuple[Checkpoint, ...]:
    """Return all checkpoints of a domain, oldest first. Raises MonitorError, Failed.

    off: whether the domain is off, when libvirt does not look into the images: it tells no sizes then.
    """
    domain, flags = connection.domain, _NO_DOMAIN if off else _NO_DOMAIN | _SIZE
    found = connection.call("virDomainListAllCheckpoints", domain.listAllCheckpoints)
    made = []
    for one in found:
        text = connection.call("virDomainCheckpointGetXMLDesc", partial(one.getXMLDesc, flags))
        made.append(parsed(text))
    return tuple(sorted(made, key=lambda each: (each.created, each.name)))


def parsed(document: str) -> Checkpoint:
    """Read a checkpoint's description by libvirt. Raises Failed."""
    root = xml.parse(document)
    sizes: dict[str, int | None] = {}
    for disk in root.findall("disks/disk"):
        if disk.get("checkpoint") == "bitmap" and (target := disk.get("name")):
            size = disk.get("size", "")
            sizes[target] = int(size) if size.isascii() and size.isdigit() else None
    created = root.findtext("creationTime", "0")
    return Checkpoint(
        root.findtext("name", ""),
        int(created) if created.isascii() and created.isdigit() else 0,
        sizes,
        _files(root.findtext("description", "")),
    )


def _files(text: str) -> dict[str, tuple[str, ...]]:
    try:
        said: Any = json.loads(text)
        found = said["backupctl"].items()
        return {str(target): tuple(map(str, files)) for target, files in found}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def bitmaps_of(
    checkpoints: Iterable[Checkpoint], target: str, name: DiskName, files: Sequence[str]
) -> tuple[Bitmap, ...]:
    """Return one disk's part of each checkpoint, as the bitmap that a run knows it by.

    files: those of which the disk consists now. Ours that were made of another disk are not this disk's.
    """
    return tuple(
        _bitmap(one, target, bitmap_name(one.name, name))
        for one in checkpoints
        if target in one.sizes and (bitmap_parts(one.name) is None or one.is_of(target, files))
    )


def bitmap_name(checkpoint: str, disk: DiskName) -> BitmapName:
    """Return the name by which a run knows one disk's part of a checkpoint."""
    return BitmapName(f"{checkpoint}-{disk}" if bitmap_parts(checkpoint) else checkpoint)


def checkpoint_of(bitmap: str, disk: DiskName) -> str:
    """Return the checkpoint of which a bitmap of `bitmaps_of` is a part."""
    return bitmap.removesuffix(f"-{disk}") if bitmap_parts(bitmap) else bitmap


def _bitmap(one: Checkpoint, target: str, name: BitmapName) -> Bitmap:
    size = one.sizes[target]
    return Bitmap(
        name=name,
        node=NodeName(target),
        granularity=_UNKNOWN_GRANULARITY,
        dirty_bytes=size or 0,
        recording=True,
        busy=False,
        persistent=True,
        inconsistent=size is None,
    )


@dataclass(frozen=True)
class Deletion:
    """A checkpoint that must go. done: in words what was done. planned: the same, before it is done."""

    checkpoint: Checkpoint
    done: str
    planned: str


def redefine(connection: Connection, document: str) -> None:
    """Have libvirt note a checkpoint whose bitmaps we make ourselves: the domain is off.

    libvirt allows this for a domain that is off, and for no other call that makes a checkpoint
    (``qemuCheckpointCreateXML`` in src/qemu/qemu_checkpoint.c). Raises MonitorError.
    """
    domain = connection.domain
    connection.call(
        "virDomainCheckpointCreateXML", lambda: domain.checkpointCreateXML(document, _REDEFINE) is not None
    )


def forget(connection: Connection, name: str) -> None:
    """Have libvirt forget a checkpoint whose bitmaps are gone; one that is gone is no error.

    Raises MonitorError.
    """
    for one in _named(connection, name):
        connection.call("virDomainCheckpointDelete", partial(one.delete, _METADATA_ONLY))


def plan(found: Sequence[Checkpoint], facts: PointFacts) -> tuple[Deletion, ...]:
    """Return which checkpoints of ours must go: unfinished ones, and those that newer ones replace.

    One is kept while it is among the newest of any of its disks: a run may leave disks out. Raises
    RepositoryError.
    """
    ours = [(point, one) for one in found if (point := _point(one, facts)) is not None]
    valid = [one for point, one in ours if facts.is_committed(point)]
    kept = 1 + facts.checkpoints() if valid else 0
    undone = [point for point, one in ours if one not in valid]
    absent = facts.what_became_of(undone) if undone else {}
    made = []
    for point, one in ours:
        what = f"checkpoint {one.name}"
        if one not in valid:
            why = f": the point {point} that it names {absent[point]}" if point in absent else ""
            which = f"{what}{why}" if why else f"unfinished {what}"
            made.append(Deletion(one, f"deleted the {which}", f"to clean up: {which}"))
        elif all(_newer(one, target, valid) >= kept for target in one.sizes):
            made.append(
                Deletion(
                    one,
                    f"deleted the {what}: a newer one replaces it",
                    f"to clean up: {what}, which a newer one replaces",
                )
            )
    return tuple(made)


def _newer(one: Checkpoint, target: str, valid: Sequence[Checkpoint]) -> int:
    return sum(other.name > one.name and target in other.sizes for other in valid)


def _point(one: Checkpoint, facts: PointFacts) -> PointId | None:
    """Return the point of a checkpoint of ours; None for any other, and for another VM's."""
    point = facts.namespace.point_of(one.name)
    if point is None or one.name != checkpoint_name(facts.namespace, point) or facts.is_another_vms(point):
        return None
    return point


def delete(connection: Connection, name: str) -> None:
    """Delete a checkpoint; one that is gone already is no error. Raises MonitorError.

    If a bitmap of it was never stored, since QEMU was killed, libvirt can delete no more than what it knows
    of the checkpoint (measured with libvirt 9.0).
    """
    for one in _named(connection, name):
        try:
            connection.call("virDomainCheckpointDelete", partial(one.delete, 0))
        except CommandFailed as err:
            if err.error_class != _NOT_FOUND:
                raise
            connection.call("virDomainCheckpointDelete", partial(one.delete, _METADATA_ONLY))


def _named(connection: Connection, name: str) -> list[Any]:
    domain = connection.domain
    there = connection.call("virDomainListAllCheckpoints", domain.listAllCheckpoints)
    return connection.call(
        "virDomainCheckpointGetName", lambda: [one for one in there if one.getName() == name]
    )
