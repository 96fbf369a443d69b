# SPDX-License-Identifier: GPL-2.0-or-later
"""Restoring: a point's disks as images of their own, in a folder, a file, a block device or a pipe.

The backup is only read, and each cluster is compared with its digest. A file is made under another name
beside the target, brought to the disk, and then renamed: after whatever death the target is absent (or as
before), or complete.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backupctl.errors import Interrupted, TargetExists, TransferError, UsageError, WriteFailed, moving
from backupctl.names import DiskName, PointId, VmName
from backupctl.readout import Readout, said
from backupctl.report import Reporter, Stop
from backupctl.repository import chain, holding, landing
from backupctl.repository.chain import Layer
from backupctl.repository.images import ImageFormat
from backupctl.repository.manifest import DiskEntry
from backupctl.repository.vm_folder import Point, VmFolder
from backupctl.transfer.proving import Range
from backupctl.vm import filling

STDOUT = "-"
_STDOUT_DESCRIPTOR = 1
_SUFFIXES: dict[str, ImageFormat] = {".qcow2": "qcow2", ".raw": "raw", ".img": "raw"}


@dataclass(frozen=True)
class RestoredDisk:
    """One restored disk. path: where it is, "-" for stdout. size: virtual, in bytes.

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


@dataclass(frozen=True)
class RestoreReport:
    """What a finished restore came to."""

    vm: VmName
    point: PointId
    images: tuple[RestoredDisk, ...]


@dataclass(frozen=True)
class _Work:
    """One disk, its layers (newest first), and where it goes."""

    entry: DiskEntry
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
    stop: Stop,
) -> RestoreReport:
    """Restore one disk of a point, or all.

    to: "-" for stdout, a block device, or a file (one disk); else a folder (gives DIR/<disk>.<format>):
    one that exists, a path that ends in "/", or a new one whose name has no image's ending.
    image_format: None takes it from the file's ending, else qcow2 for files and raw for the rest.
    force: write over what is there, and let damaged data through, named in the report.

    All that can be refused is refused before a byte is written. Raises UsageError, NoSuchPoint,
    TargetExists, Locked, DamageFound, ReadFailed, WriteFailed, RepositoryError, Interrupted.
    """
    with holding.reading(folder, point.id) as held:
        works = _works(folder, held, to, disk, image_format, force=force)
        done = tuple(_restore(folder, held.id, work, force, reporter, stop) for work in works)
    return RestoreReport(folder.name, point.id, done)


def _works(
    folder: VmFolder,
    point: Point,
    to: str,
    disk: str | None,
    image_format: ImageFormat | None,
    *,
    force: bool,
) -> list[_Work]:
    """Return what is to be done, after all that can be refused was refused."""
    names = [disk] if disk is not None else [entry.name for entry in point.manifest.disks]
    chains = {name: chain.layers(folder, point, name) for name in names}
    works = [
        _Work(entry, chains[entry.name], *target_of(entry.name, to, image_format))
        for entry in point.manifest.disks
        if entry.name in chains
    ]
    for work in works:
        _refuse(folder, work, force=force)
    refuse_one_for_all([work.target for work in works], names)
    return works


def target_of(name: DiskName, to: str, wanted: ImageFormat | None) -> tuple[str, ImageFormat]:
    """Return where a disk goes, and as what; `to` and `wanted` as `restore` takes them."""
    path = Path(to)
    if to == STDOUT or path.is_block_device():
        return to, wanted or "raw"
    if path.is_dir() or to.endswith("/") or (not path.exists() and path.suffix.lower() not in _SUFFIXES):
        kind: ImageFormat = wanted or "qcow2"
        return str(path / f"{name}.{kind}"), kind
    return to, wanted or _SUFFIXES.get(path.suffix.lower(), "qcow2")


def refuse_one_for_all(targets: Sequence[str], disks: Sequence[str]) -> None:
    """Refuse several disks with one target. Raises UsageError."""
    if len(set(targets)) < len(targets):
        raise UsageError(
            f"this point has several disks ({', '.join(disks)}): choose one with --disk, or name a folder",
            state="nothing was touched",
        )


def _refuse(folder: VmFolder, work: _Work, *, force: bool) -> None:
    """Refuse what must not be written to, while nothing is touched."""
    target = Path(work.target)
    device = target.is_block_device()
    if (work.target == STDOUT or device) and work.format != "raw":
        what = "a block device" if device else "standard output"
        raise UsageError(f"{what} takes raw bytes, not a {work.format} image", state="nothing was touched")
    if work.target == STDOUT:
        if os.isatty(_STDOUT_DESCRIPTOR):
            raise UsageError("an image is not written to a terminal: redirect the output, or name a file")
        return
    landing.refuse_inside(folder.path.parent, target)
    landing.place_of(target)
    if not force and (device or os.path.lexists(target)):
        what = "is a block device, whose content would be lost" if device else "exists"
        raise TargetExists(
            f"{target} {what}", state="nothing was touched", next_command="the same with --force"
        )
    if target.is_file():
        landing.refuse_in_use(target)


def _restore(
    folder: VmFolder, point: PointId, work: _Work, force: bool, reporter: Reporter, stop: Stop
) -> RestoredDisk:
    begun = time.monotonic()
    entry = work.entry
    stop.check()
    reporter.step(f"restore {entry.name}")

    def progress(done_bytes: int) -> None:
        reporter.progress(entry.name, done_bytes, entry.size)

    if work.target != STDOUT:
        stop = filling.watching(stop, Path(work.target))
    reading = Readout(folder.name, point, work.layers, force, stop, progress)
    try:
        _read_out(reading, work, force)
    except (TransferError, Interrupted) as err:
        raise err.add(state=_left(work.target), next_command="the same again") from err
    progress(entry.size)
    if reading.damaged:
        reporter.warn(f"{entry.name}: restored with damage: {said(reading.damaged)}")
    if reading.unproven:
        reporter.warn(f"{entry.name}: restored without proof: {reading.unproven}")
    return RestoredDisk(
        entry.name,
        work.target,
        work.format,
        entry.size,
        time.monotonic() - begun,
        tuple(reading.damaged),
        reading.unproven,
    )


def _read_out(reading: Readout, work: _Work, force: bool) -> None:
    try:
        with moving(work.entry.name, _called(work.target)):
            if work.target == STDOUT:
                reading.into_stream(_STDOUT_DESCRIPTOR)
            elif Path(work.target).is_block_device():
                with landing.device(Path(work.target), work.entry.size) as target:
                    reading.into_image(target, work.format, onto_device=True)
            else:
                with landing.file(Path(work.target), force=force) as target:
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
