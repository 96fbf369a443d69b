# SPDX-License-Identifier: GPL-2.0-or-later
"""A thin restore: an overlay for each disk, with the point in the repository as its backing.

It takes no time and no room, and a VM can boot from it at once. The repository is only read; what the VM
writes goes into the overlay. The point must stay for as long as the overlay is used.
"""

from dataclasses import dataclass
from pathlib import Path

from backupctl.errors import TargetExists, UsageError, WriteFailed
from backupctl.names import DiskName, PointId, VmName
from backupctl.report import Reporter
from backupctl.repository import chain, holding, landing, overlay
from backupctl.repository.images import ImageFormat
from backupctl.repository.vm_folder import Point, VmFolder
from backupctl.restore import STDOUT, refuse_one_for_all, target_of

_UNTOUCHED = "nothing was touched"


@dataclass(frozen=True)
class ThinDisk:
    """One overlay. size: virtual, in bytes. backing: the point's image, absolute."""

    name: DiskName
    path: Path
    size: int
    backing: Path


@dataclass(frozen=True)
class ThinReport:
    """What a thin restore made."""

    vm: VmName
    point: PointId
    images: tuple[ThinDisk, ...]


def restore(
    folder: VmFolder,
    point: Point,
    *,
    to: str,
    disk: str | None,
    image_format: ImageFormat | None,
    force: bool,
    reporter: Reporter,
) -> ThinReport:
    """Make overlays of one disk of a point, or of all; `to` as in a whole restore, but files only.

    All that can be refused is refused before anything is made. Raises UsageError, NoSuchPoint, TargetExists,
    Locked, DamageFound, WriteFailed.
    """
    if image_format == "raw":
        raise UsageError("a thin restore is a qcow2 overlay: raw has no backing", state=_UNTOUCHED)
    with holding.reading(folder, point.id) as held:
        made = _make(folder, held, to, disk, force=force)
    reporter.note(
        f"these images need {folder.name} {point.id} to stay: backupctl protect {folder.name} {point.id}"
    )
    return ThinReport(folder.name, point.id, made)


def _make(folder: VmFolder, point: Point, to: str, disk: str | None, *, force: bool) -> tuple[ThinDisk, ...]:
    names = [disk] if disk is not None else [entry.name for entry in point.manifest.disks]
    chains = {name: chain.paths(folder, point, name) for name in names}
    targets = {name: target_of(DiskName(name), to, "qcow2")[0] for name in names}
    refuse_one_for_all(list(targets.values()), names)
    for target in targets.values():
        _refuse(folder, target, force=force)
    made = []
    for entry in point.manifest.disks:
        if entry.name not in chains:
            continue
        path, layers = Path(targets[entry.name]), chains[entry.name]
        try:
            overlay.make(path, entry.size, layers, force=force)
        except OSError as err:
            raise WriteFailed(f"{path} can't be made: {err.strerror}") from err
        made.append(ThinDisk(entry.name, path, entry.size, layers[0].resolve()))
    return tuple(made)


def _refuse(folder: VmFolder, target: str, *, force: bool) -> None:
    path = Path(target)
    if target == STDOUT or path.is_block_device():
        raise UsageError("a thin restore makes files: name a folder, or a file", state=_UNTOUCHED)
    landing.refuse_inside(folder.path.parent, path)
    landing.place_of(path)
    if path.exists() and not force:
        raise TargetExists(f"{path} exists", state=_UNTOUCHED, next_command="the same with --force")
    if path.is_file():
        landing.refuse_in_use(path)
