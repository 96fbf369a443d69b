# SPDX-License-Identifier: GPL-2.0-or-later
"""A thin restore: an overlay for each disk, whose backing file is the point's image in the repository.

It takes neither time nor space, and a VM can boot from it at once. The repository is only read; what the VM
writes goes into the overlay. The point must stay for as long as the overlay is used.
"""

from dataclasses import dataclass
from pathlib import Path

from backupctl.errors import UNTOUCHED, UsageError, WriteFailed
from backupctl.events.restore import PointMustStay
from backupctl.names import DiskName, PointId, VmName
from backupctl.operations.restore import destination, request
from backupctl.operations.restore.destination import STDOUT
from backupctl.operations.restore.request import DiskTask, RestoreRequest
from backupctl.operations.restore.selection import MissingDisk
from backupctl.progress import Reporter
from backupctl.targets import overlay


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
    """The overlays that were made. missing: disks that the point does not hold, left out."""

    vm: VmName
    point: PointId
    images: tuple[OverlayDisk, ...]
    missing: tuple[MissingDisk, ...]


def restore(wanted: RestoreRequest, reporter: Reporter) -> OverlayReport:
    """Make overlays of one disk of a point, or of all.

    Everything that can be refused is refused before anything is made. No data is read, so `allow_damage` has
    no meaning here. Raises UsageError, NoSuchPoint, TargetExists, Locked, DamageFound, WriteFailed.
    """
    if wanted.image_format == "raw":
        raise UsageError("a thin restore makes qcow2 overlays: raw has no backing file", state=UNTOUCHED)
    with request.tasks(wanted, destination.of_new, reporter) as tasks:
        for task in tasks.disks:
            _refuse(wanted, task)
        made = tuple(_make(wanted, task, reporter) for task in tasks.disks)
    vm = wanted.directory.name
    for needed in sorted({one.point for one in made}):
        reporter.event(PointMustStay(vm, needed))
    return OverlayReport(vm, wanted.point, made, tasks.missing)


def _make(wanted: RestoreRequest, task: DiskTask, reporter: Reporter) -> OverlayDisk:
    path, images = Path(task.target), [layer.path for layer in task.layers]
    try:
        overlay.make(path, task.entry.size, images, force=wanted.overwrite, warn=reporter.event)
    except OSError as err:
        raise WriteFailed(f"cannot make {path}: {err.strerror}") from err
    return OverlayDisk(task.entry.name, path, task.entry.size, images[0].resolve(), task.point)


def _refuse(wanted: RestoreRequest, task: DiskTask) -> None:
    if task.target == STDOUT or Path(task.target).is_block_device():
        raise UsageError("a thin restore makes files: name a directory, or a file", state=UNTOUCHED)
    # An overlay that replaces another one is opened by the VM in the same way.
    request.refuse_new_file(wanted, task, also_allowed={"backing"})
