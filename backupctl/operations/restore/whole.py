# SPDX-License-Identifier: GPL-2.0-or-later
"""Restoring: a point's disks as images of their own, in a folder, a file, a block device or a pipe.

The backup is only read, and each cluster is compared with its digest. A file is made under another name
beside the target, brought to the disk, and then renamed: after whatever death the target is absent (or as
before), or complete.
"""

import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.errors import Interrupted, TargetExists, TransferError, UsageError, WriteFailed, moving
from backupctl.events import StepStarted
from backupctl.events.restore import RestoredUnverified, RestoredWithDamage
from backupctl.images.create import ImageFormat
from backupctl.images.foreign_header import ImageFeature
from backupctl.names import DiskName, PointId, VmName
from backupctl.operations.restore import destination, selection
from backupctl.operations.restore.destination import STDOUT
from backupctl.operations.restore.disk import DiskReader, said
from backupctl.operations.restore.selection import MissingDisk, Selection
from backupctl.progress import Reporter
from backupctl.repository import chain
from backupctl.repository.chain import Layer
from backupctl.repository.manifest import DiskEntry
from backupctl.repository.point import Point
from backupctl.repository.vm_folder import VmFolder
from backupctl.sizes import Range
from backupctl.targets import output
from backupctl.vm import filling

_STDOUT_DESCRIPTOR = 1
_UNTOUCHED = "nothing was touched"


@dataclass(frozen=True)
class RestoredDisk:
    """One restored disk. path: where it is, "-" for stdout. size: virtual, in bytes.

    point: the one that it was taken from.
    damaged: ranges that `force` let through, in bytes. unproven: why nothing could be compared with its
    digest, "" if all was.
    """

    name: DiskName
    path: str
    format: ImageFormat
    size: int
    seconds: float
    damaged: tuple[Range, ...]
    unproven: str
    point: PointId


@dataclass(frozen=True)
class RestoreReport:
    """What a finished restore came to. missing: disks that the point does not hold, left out."""

    vm: VmName
    point: PointId
    images: tuple[RestoredDisk, ...]
    missing: tuple[MissingDisk, ...]


@dataclass(frozen=True)
class _Work:
    """One disk, the point that it is taken from, its layers (newest first), and where it goes."""

    entry: DiskEntry
    point: PointId
    layers: tuple[Layer, ...]
    target: str
    format: ImageFormat


def restore(
    folder: VmFolder,
    point: Point,
    *,
    to: str,
    disk: str | None,
    image_format: ImageFormat | None,
    force: bool,
    reporter: Reporter,
    stop: Cancellation,
    all_disks: bool = False,
    allowed: Collection[ImageFeature] = (),
) -> RestoreReport:
    """Restore one disk of a point, or all.

    to: "-" for stdout, or as `destination` tells. image_format: None takes it from the file's ending, else
    qcow2 for new files and raw for the rest. force: write over what is there, and let damaged data through,
    named in the report. all_disks: take those that the point does not hold from their own newest points.
    allowed: what an image that is replaced may have that the new one has not.

    All that can be refused is refused before a byte is written. Raises UsageError, NoSuchPoint,
    TargetExists, Locked, DamageFound, ReadFailed, WriteFailed, RepositoryError, Interrupted.
    """
    with selection.chosen(folder, point.id, disk, all_disks=all_disks, reporter=reporter) as chosen:
        works = _works(folder, chosen, to, image_format)
        for work in works:
            _refuse(folder, work, to, allowed, force=force)
        done = tuple(_restore(folder, work, force, reporter, stop) for work in works)
    return RestoreReport(folder.name, point.id, done, chosen.missing)


def _works(folder: VmFolder, chosen: Selection, to: str, image_format: ImageFormat | None) -> list[_Work]:
    works = [
        _Work(
            part.entry,
            part.point.id,
            chain.layers(folder, part.point, part.entry.name),
            *destination.of_new(part.entry, to, image_format),
        )
        for part in chosen.parts
    ]
    destination.refuse_one_for_all([work.target for work in works], chosen.names)
    return works


def _refuse(
    folder: VmFolder, work: _Work, to: str, allowed: Collection[ImageFeature], *, force: bool
) -> None:
    """Refuse what must not be written to, while nothing is touched."""
    target = Path(work.target)
    device = target.is_block_device()
    if (work.target == STDOUT or device) and work.format != "raw":
        what = "a block device" if device else "standard output"
        raise UsageError(f"{what} takes raw bytes, not a {work.format} image", state=_UNTOUCHED)
    if work.target == STDOUT:
        if os.isatty(_STDOUT_DESCRIPTOR):
            raise UsageError("an image is not written to a terminal: redirect the output, or name a file")
        return
    output.refuse_inside(folder.path.parent, target)
    if not device:
        destination.refuse_unplaceable(to, target)
    output.place_of(target)
    if not force and (device or os.path.lexists(target)):
        what = "is a block device, whose content would be lost" if device else "exists"
        raise TargetExists(f"{target} {what}", state=_UNTOUCHED, next_command="backupctl restore --force")
    if not device and os.path.lexists(target):
        output.refuse_in_use(target)
        output.refuse_more_than_bytes(target, work.format, allowed)


def _restore(
    folder: VmFolder, work: _Work, force: bool, reporter: Reporter, stop: Cancellation
) -> RestoredDisk:
    begun = time.monotonic()
    entry = work.entry
    stop.check()
    reporter.event(StepStarted(f"restore {entry.name}"))

    def progress(done_bytes: int) -> None:
        reporter.progress(entry.name, done_bytes, entry.size)

    if work.target != STDOUT:
        stop = filling.watching(stop, Path(work.target))
    reading = DiskReader(folder.name, work.point, work.layers, force, stop, progress)
    try:
        _read_out(reading, work, force, reporter)
    except (TransferError, Interrupted) as err:
        raise err.add(state=_left(work.target), next_command="backupctl restore") from err
    progress(entry.size)
    if reading.damaged:
        reporter.event(RestoredWithDamage(entry.name, said(reading.damaged)))
    if reading.unproven:
        reporter.event(RestoredUnverified(entry.name, reading.unproven))
    return RestoredDisk(
        entry.name,
        work.target,
        work.format,
        entry.size,
        time.monotonic() - begun,
        tuple(reading.damaged),
        reading.unproven,
        work.point,
    )


def _read_out(reading: DiskReader, work: _Work, force: bool, reporter: Reporter) -> None:
    try:
        with moving(work.entry.name, _called(work.target)):
            if work.target == STDOUT:
                reading.into_stream(_STDOUT_DESCRIPTOR)
            elif Path(work.target).is_block_device():
                with output.device(Path(work.target), work.entry.size) as target:
                    reading.into_image(target, work.format, onto_device=True)
            else:
                with output.file(Path(work.target), force=force, warn=reporter.event) as target:
                    reading.into_image(target, work.format, onto_device=False)
    except OSError as err:
        raise WriteFailed(f"{_called(work.target)} can't be written: {err.strerror}") from err


def _called(target: str) -> str:
    return "standard output" if target == STDOUT else target


def _left(target: str) -> str:
    """Say what a restore that failed leaves."""
    if target == STDOUT:
        return "what was written is not complete"
    if Path(target).is_block_device():
        return f"{target} may hold a part of the image; the backup is as it was"
    return f"nothing of this run is left at {target}; disks that were restored before it stay"
