# SPDX-License-Identifier: GPL-2.0-or-later
"""Restoring: a point's disks as images of their own, in a folder, a file, a block device or a pipe.

The backup is only read. A file is made under another name beside the target, brought to the disk, and
then renamed: after whatever death the target is absent (or as before), or complete.
"""

import os
import stat
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from backupctl.errors import TargetExists, UsageError, WriteFailed
from backupctl.names import DiskName, PointId, VmName
from backupctl.report import Reporter, Stop
from backupctl.repository import chain, convert, images, landing
from backupctl.repository.layout import Point
from backupctl.repository.manifest import DiskEntry
from backupctl.transfer.source import Source
from backupctl.transfer.stream import stream

STDOUT = "-"
_STDOUT_DESCRIPTOR = 1
_FORMATS = {".raw": "raw", ".img": "raw", ".qcow2": "qcow2"}


@dataclass(frozen=True)
class RestoredDisk:
    """One restored disk. path: where it is, "-" for stdout. size: virtual, in bytes."""

    name: DiskName
    path: str
    format: str
    size: int
    seconds: float


@dataclass(frozen=True)
class RestoreReport:
    """What a finished restore came to."""

    point: PointId
    vm: VmName
    images: tuple[RestoredDisk, ...]


@dataclass(frozen=True)
class _Work:
    """One disk and where it goes."""

    entry: DiskEntry
    chain: tuple[Path, ...]
    target: str
    format: str


def restore(
    point: Point,
    *,
    to: str,
    disk: str | None,
    image_format: str | None,
    force: bool,
    reporter: Reporter,
    stop: Stop,
) -> RestoreReport:
    """Restore one disk of a point, or all.

    to: an existing folder or a path that ends in "/" (gives DIR/<disk>.<format>); a file or a block
    device (one disk); "-" for stdout (one disk, raw). image_format: raw or qcow2; None takes it from the
    file's ending, else qcow2 for files and raw for the rest. force: replace what is there.

    Raises UsageError, NoSuchPoint, TargetExists, DamageFound, ReadFailed, WriteFailed, RepositoryError,
    Interrupted. All that can be refused is refused before a byte is written.
    """
    works = _plan(point, to, disk, image_format)
    for work in works:
        _refuse(point, work, force=force)
    return RestoreReport(
        point.id, point.manifest.vm, tuple(_restore(work, force, reporter, stop) for work in works)
    )


def _plan(point: Point, to: str, disk: str | None, image_format: str | None) -> list[_Work]:
    names = [disk] if disk is not None else [entry.name for entry in point.manifest.disks]
    chains = {name: chain.paths(point.folder, point, name) for name in names}
    folder = to != STDOUT and (to.endswith("/") or Path(to).is_dir())
    if len(names) > 1 and not folder:
        raise UsageError(
            f"the point {point.id} holds {len(names)} disks ({', '.join(names)}): choose one with --disk, "
            f"or name a folder to restore them all into (one that exists, or {to}/)",
            state="nothing was touched",
        )
    works = []
    for name in names:
        entry = point.manifest.disk(name)
        assert entry is not None  # chain.paths found it
        kind = image_format or _usual_format(to, folder=folder)
        target = str(Path(to) / f"{name}.{kind}") if folder else to
        works.append(_Work(entry, chains[name], target, kind))
    return works


def _usual_format(to: str, *, folder: bool) -> str:
    if folder:
        return "qcow2"
    if to == STDOUT or _is_device(to):
        return "raw"
    return _FORMATS.get(Path(to).suffix.lower(), "qcow2")


def _refuse(point: Point, work: _Work, *, force: bool) -> None:
    """Refuse what must not be written to, while nothing is touched."""
    if work.target == STDOUT:
        if work.format != "raw":
            raise UsageError("only a raw image can be written to stdout", state="nothing was touched")
        if os.isatty(_STDOUT_DESCRIPTOR):
            raise UsageError("an image is not written to a terminal: redirect stdout, or name a file")
        return
    repository = point.path.parent.parent.resolve()
    if Path(work.target).resolve().is_relative_to(repository):
        raise UsageError(f"{work.target} is in the repository, which a restore never changes")
    if _is_device(work.target):
        if work.format != "raw":
            raise UsageError(f"a block device takes a raw image, not {work.format}")
        return
    if not force and os.path.lexists(work.target):
        raise TargetExists(
            f"{work.target} exists already", state="nothing was touched", next_command="add --force"
        )


def _restore(work: _Work, force: bool, reporter: Reporter, stop: Stop) -> RestoredDisk:
    begun = time.monotonic()
    entry = work.entry
    stop.check()
    reporter.step(f"restore {entry.name}")

    def progress(done_bytes: int) -> None:
        reporter.progress(entry.name, done_bytes, entry.size)

    try:
        if work.target == STDOUT:
            _to_stdout(work, stop, progress)
        elif _is_device(work.target):
            with landing.device(Path(work.target), entry.size, force=force) as target:
                _convert(work, target, stop, progress, onto_device=True)
        else:
            with landing.file(Path(work.target), force=force) as target:
                _convert(work, target, stop, progress, onto_device=False)
    except OSError as err:
        raise WriteFailed(f"{work.target} can't be written: {err.strerror}") from err
    progress(entry.size)
    return RestoredDisk(entry.name, work.target, work.format, entry.size, time.monotonic() - begun)


def _convert(
    work: _Work, target: Path, stop: Stop, progress: Callable[[int], None], *, onto_device: bool
) -> None:
    convert.convert(
        work.chain,
        target,
        work.format,
        onto_device=onto_device,
        check=stop.check,
        progress=lambda part: progress(int(part * work.entry.size)),
    )


def _to_stdout(work: _Work, stop: Stop, progress: Callable[[int], None]) -> None:
    with (
        images.serve(work.chain) as address,
        closing(Source.connect([address], images.EXPORT)) as source,
    ):
        stream(source, _STDOUT_DESCRIPTOR, check=stop.check, progress=progress)


def _is_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(Path(path).stat().st_mode)
    except OSError:
        return False
