# SPDX-License-Identifier: GPL-2.0-or-later
"""A restore of whole disks: as images of their own, in a directory, a file, a block device or a pipe.

The backup is only read, and each cluster is compared with its digest. A file is made under another name
beside the target, fsynced, and then renamed: after a crash at any point the target is absent (or as it was),
or complete.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.errors import UNTOUCHED, Interrupted, TransferError, UsageError, WriteFailed, moving
from backupctl.events import StepStarted
from backupctl.events.restore import RestoredUnverified, RestoredWithDamage
from backupctl.images.create import ImageFormat
from backupctl.names import DiskName, PointId, VmName
from backupctl.operations.restore import destination, request
from backupctl.operations.restore.destination import STDOUT
from backupctl.operations.restore.disk import DiskReader, format_ranges
from backupctl.operations.restore.request import DiskTask, RestoreRequest
from backupctl.operations.restore.selection import MissingDisk
from backupctl.progress import Reporter
from backupctl.sizes import Range
from backupctl.targets import output
from backupctl.vm import filling

_STDOUT_DESCRIPTOR = 1


@dataclass(frozen=True)
class RestoredDisk:
    """One restored disk. path: where it is, "-" for stdout. size: virtual, in bytes.

    point: the one that it was taken from.
    damaged: ranges in bytes that do not match their digests, restored because of `allow_damage`.
    unverified: why nothing could be compared with its digest, "" if everything was.
    """

    name: DiskName
    path: str
    format: ImageFormat
    size: int
    seconds: float
    damaged: tuple[Range, ...]
    unverified: str
    point: PointId


@dataclass(frozen=True)
class RestoreReport:
    """The result of a restore. missing: disks that the point does not hold, left out."""

    vm: VmName
    point: PointId
    images: tuple[RestoredDisk, ...]
    missing: tuple[MissingDisk, ...]


def restore(wanted: RestoreRequest, reporter: Reporter, stop: Cancellation) -> RestoreReport:
    """Restore one disk of a point, or all.

    Everything that can be refused is refused before a byte is written. Raises UsageError, NoSuchPoint,
    TargetExists, Locked, DamageFound, ReadFailed, WriteFailed, RepositoryError, Interrupted.
    """
    with request.tasks(wanted, destination.of_new, reporter) as tasks:
        for task in tasks.disks:
            _refuse(wanted, task)
        for task in tasks.disks:  # of all disks, so that the end of the last one can be foretold
            reporter.progress(task.entry.name, 0, task.entry.size)
        done = tuple(_restore(wanted, task, reporter, stop) for task in tasks.disks)
    return RestoreReport(wanted.directory.name, wanted.point, done, tasks.missing)


def _refuse(wanted: RestoreRequest, task: DiskTask) -> None:
    """Refuse what must not be written to, while nothing is touched."""
    target = Path(task.target)
    device = target.is_block_device()
    if (task.target == STDOUT or device) and task.format != "raw":
        what = "a block device" if device else "standard output"
        raise UsageError(f"{what} takes raw bytes, not a {task.format} image", state=UNTOUCHED)
    if task.target == STDOUT:
        if os.isatty(_STDOUT_DESCRIPTOR):
            raise UsageError(
                "refusing to write an image to a terminal: redirect the output, or name a file",
                state=UNTOUCHED,
            )
    elif device:
        request.refuse_inside_repository(wanted, target)
        output.place_of(target)
        request.refuse_overwriting(wanted, f"{target} is a block device, whose content would be lost")
    else:
        request.refuse_new_file(wanted, task)


def _restore(wanted: RestoreRequest, task: DiskTask, reporter: Reporter, stop: Cancellation) -> RestoredDisk:
    started = time.monotonic()
    entry = task.entry
    stop.check()
    reporter.event(StepStarted(f"restore {entry.name}"))

    def progress(done_bytes: int) -> None:
        reporter.progress(entry.name, done_bytes, entry.size)

    if task.target != STDOUT:
        stop = filling.watching(stop, Path(task.target))
    reader = DiskReader(
        wanted.directory.name, task.point, task.layers, stop, progress, allow_damage=wanted.allow_damage
    )
    try:
        _write(reader, task, reporter, overwrite=wanted.overwrite)
    except (TransferError, Interrupted) as err:
        raise err.add(state=_left_behind(task.target), next_command="backupctl restore") from err
    progress(entry.size)
    if reader.damaged:
        reporter.event(RestoredWithDamage(entry.name, format_ranges(reader.damaged)))
    if reader.unverified:
        reporter.event(RestoredUnverified(entry.name, reader.unverified))
    return RestoredDisk(
        name=entry.name,
        path=task.target,
        format=task.format,
        size=entry.size,
        seconds=time.monotonic() - started,
        damaged=tuple(reader.damaged),
        unverified=reader.unverified,
        point=task.point,
    )


def _write(reader: DiskReader, task: DiskTask, reporter: Reporter, *, overwrite: bool) -> None:
    try:
        with moving(task.entry.name, _name_of(task.target)):
            if task.target == STDOUT:
                reader.into_stream(_STDOUT_DESCRIPTOR)
            elif Path(task.target).is_block_device():
                with output.device(Path(task.target), task.entry.size) as target:
                    reader.into_image(target, task.format, onto_device=True)
            else:
                with output.file(Path(task.target), force=overwrite, warn=reporter.event) as target:
                    reader.into_image(target, task.format, onto_device=False)
    except OSError as err:
        raise WriteFailed(f"cannot write {_name_of(task.target)}: {err.strerror}") from err


def _name_of(target: str) -> str:
    return "standard output" if target == STDOUT else target


def _left_behind(target: str) -> str:
    """Return what a failed restore leaves."""
    if target == STDOUT:
        return "what was written is not complete"
    if Path(target).is_block_device():
        return f"{target} may hold a part of the image; the backup is unchanged"
    return f"nothing of this run is left at {target}; disks that were restored before it stay"
