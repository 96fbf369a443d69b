# SPDX-License-Identifier: GPL-2.0-or-later
"""A thin restore: an overlay for each disk, with the point in the repository as its backing.

It takes no time and no room, and a VM can boot from it at once. The repository is only read; what the VM
writes goes into the overlay. The point must stay for as long as the overlay is used.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from backupctl.errors import TargetExists, UsageError, WriteFailed
from backupctl.events.restore import PointMustStay
from backupctl.images.create import ImageFormat
from backupctl.images.foreign_header import ImageFeature
from backupctl.names import DiskName, PointId, VmName
from backupctl.operations.restore import destination, selection
from backupctl.operations.restore.destination import STDOUT
from backupctl.operations.restore.selection import MissingDisk, Part
from backupctl.progress import Reporter
from backupctl.repository import chain
from backupctl.repository.point import Point
from backupctl.repository.vm_folder import VmFolder
from backupctl.targets import output, overlay

_UNTOUCHED = "nothing was touched"


@dataclass(frozen=True)
class OverlayDisk:
    """One overlay. size: virtual, in bytes. backing: the point's image, absolute. point: whose it is."""

    name: DiskName
    path: Path
    size: int
    backing: Path
    point: PointId


@dataclass(frozen=True)
class OverlayReport:
    """What a thin restore made. missing: disks that the point does not hold, left out."""

    vm: VmName
    point: PointId
    images: tuple[OverlayDisk, ...]
    missing: tuple[MissingDisk, ...]


def restore(
    folder: VmFolder,
    point: Point,
    *,
    to: str,
    disk: str | None,
    image_format: ImageFormat | None,
    force: bool,
    reporter: Reporter,
    all_disks: bool = False,
    allowed: Collection[ImageFeature] = (),
) -> OverlayReport:
    """Make overlays of one disk of a point, or of all; the options as in a whole restore, but files only.

    All that can be refused is refused before anything is made. Raises UsageError, NoSuchPoint, TargetExists,
    Locked, DamageFound, WriteFailed.
    """
    if image_format == "raw":
        raise UsageError("a thin restore is a qcow2 overlay: raw has no backing", state=_UNTOUCHED)
    with selection.chosen(folder, point.id, disk, all_disks=all_disks, reporter=reporter) as chosen:
        chains = [chain.paths(folder, part.point, part.entry.name) for part in chosen.parts]
        targets = [destination.of_new(part.entry, to, image_format) for part in chosen.parts]
        destination.refuse_one_for_all([target for target, _ in targets], chosen.names)
        for target, kind in targets:
            _refuse(folder, to, target, kind, allowed, force=force)
        made = tuple(
            _make(part, Path(target), layers, force, reporter)
            for part, (target, _), layers in zip(chosen.parts, targets, chains, strict=True)
        )
    for needed in sorted({one.point for one in made}):
        reporter.event(PointMustStay(folder.name, needed))
    return OverlayReport(folder.name, point.id, made, chosen.missing)


def _make(part: Part, path: Path, layers: Sequence[Path], force: bool, reporter: Reporter) -> OverlayDisk:
    try:
        overlay.make(path, part.entry.size, layers, force=force, warn=reporter.event)
    except OSError as err:
        raise WriteFailed(f"{path} can't be made: {err.strerror}") from err
    return OverlayDisk(part.entry.name, path, part.entry.size, layers[0].resolve(), part.point.id)


def _refuse(
    folder: VmFolder,
    to: str,
    target: str,
    kind: ImageFormat,
    allowed: Collection[ImageFeature],
    *,
    force: bool,
) -> None:
    path = Path(target)
    if target == STDOUT or path.is_block_device():
        raise UsageError("a thin restore makes files: name a folder, or a file", state=_UNTOUCHED)
    output.refuse_inside(folder.path.parent, path)
    destination.refuse_unplaceable(to, path)
    output.place_of(path)
    if not path.exists():
        return
    if not force:
        raise TargetExists(f"{path} exists", state=_UNTOUCHED, next_command="backupctl restore --force")
    output.refuse_in_use(path)
    # One overlay in the place of another is opened as before.
    output.refuse_more_than_bytes(path, kind, {*allowed, "backing"})
