# SPDX-License-Identifier: GPL-2.0-or-later
"""Restore: a disk as it was at a point, as an image, on a block device, or on standard output.

A file appears under its name complete or not at all: it is written beside it, brought to the disk, and
then renamed. The repository is only read, through the checked chain, and never through a name that is
stored in an image. The copying is `qemu-img convert`: fast, sparse, and kept by others.
"""

import json
import os
import re
import select
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from backupctl.errors import Failed, ReadFailed, TargetExists, UsageError, WriteFailed
from backupctl.names import DiskName, PointId, VmName
from backupctl.report import Reporter, Stop
from backupctl.repository import chain, durable, images
from backupctl.repository.layout import Point, VmFolder
from backupctl.repository.manifest import DiskEntry
from backupctl.transfer import extents
from backupctl.transfer.copy import PIECE_BYTES
from backupctl.transfer.extents import Extent, pieces
from backupctl.transfer.source import Source

ImageFormat = Literal["qcow2", "raw"]
_SUFFIXES: dict[str, ImageFormat] = {".qcow2": "qcow2", ".raw": "raw", ".img": "raw"}
_PERCENT = re.compile(rb"\(([0-9.]+)/100%\)")


@dataclass(frozen=True)
class RestoredDisk:
    """One restored disk. path: where it went, "-" for standard output. size: bytes."""

    name: DiskName
    path: str
    format: ImageFormat
    size: int
    seconds: float


@dataclass(frozen=True)
class RestoreReport:
    """What a restore came to."""

    vm: VmName
    point: PointId
    images: tuple[RestoredDisk, ...]


@dataclass(frozen=True)
class _Target:
    """Where one disk goes. device: it is there already and stays what it is."""

    entry: DiskEntry
    path: Path
    format: ImageFormat
    device: bool


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

    to: a folder (gives FOLDER/<disk>.<format>), a file, a block device, or "-" for raw bytes on standard
    output. force: whether what is there may be overwritten. Raises UsageError, TargetExists, NoSuchPoint,
    DamageFound, ReadFailed, WriteFailed, Interrupted.
    """
    entries = _chosen(folder, point, disk)
    if to == "-":
        return RestoreReport(
            folder.name, point.id, (_to_stdout(folder, point, _one(entries), image_format, stop),)
        )
    targets = _targets(entries, to, image_format)
    for target in targets:
        _refuse(target, force=force)
    done = tuple(_restore_one(folder, point, target, reporter, stop) for target in targets)
    return RestoreReport(folder.name, point.id, done)


def _chosen(folder: VmFolder, point: Point, disk: str | None) -> tuple[DiskEntry, ...]:
    if disk is None:
        return point.manifest.disks
    chain.paths(folder, point, disk)  # says which disks there are if this one isn't
    return tuple(entry for entry in point.manifest.disks if entry.name == disk)


def _one(entries: tuple[DiskEntry, ...]) -> DiskEntry:
    if len(entries) != 1:
        names = ", ".join(entry.name for entry in entries)
        raise UsageError(f"this point has several disks ({names}): choose one with --disk, or name a folder")
    return entries[0]


def _targets(entries: tuple[DiskEntry, ...], to: str, wanted: ImageFormat | None) -> list[_Target]:
    path = Path(to)
    if _is_device(path):
        if wanted == "qcow2":
            raise UsageError(f"{path} is a block device: it takes raw bytes, not a qcow2 image")
        return [_Target(_one(entries), path, "raw", device=True)]
    if path.is_dir() or to.endswith("/") or (not path.exists() and path.suffix not in _SUFFIXES):
        kind: ImageFormat = wanted or "qcow2"
        return [_Target(entry, path / f"{entry.name}.{kind}", kind, device=False) for entry in entries]
    return [_Target(_one(entries), path, wanted or _SUFFIXES.get(path.suffix, "qcow2"), device=False)]


def _is_device(path: Path) -> bool:
    try:
        return stat.S_ISBLK(path.stat().st_mode)
    except OSError:
        return False


def _refuse(target: _Target, *, force: bool) -> None:
    if not force and (target.device or target.path.exists() or target.path.is_symlink()):
        what = "is a block device, whose content would be lost" if target.device else "exists"
        raise TargetExists(
            f"{target.path} {what}", state="nothing was written", next_command="the same with --force"
        )
    if target.device:
        room = _device_size(target.path)
        if room < target.entry.size:
            raise WriteFailed(
                f"{target.path} has {room} bytes; {target.entry.name} needs {target.entry.size}"
            )


def _device_size(path: Path) -> int:
    with path.open("rb") as device:
        return device.seek(0, os.SEEK_END)


def _restore_one(
    folder: VmFolder, point: Point, target: _Target, reporter: Reporter, stop: Stop
) -> RestoredDisk:
    begun = time.monotonic()
    entry = target.entry
    source = images.blockdev(chain.paths(folder, point, entry.name))
    reporter.step(f"restore {entry.name}")

    def told(percent: float) -> None:
        reporter.progress(entry.name, round(percent / 100 * entry.size), entry.size)

    try:
        if target.device:
            _convert(source, target.path, "raw", ["-n"], told, stop)
            durable.sync_file(target.path)
        else:
            with _beside(target.path) as temporary:
                _convert(source, temporary, target.format, [], told, stop)
    except OSError as err:
        raise WriteFailed(f"{target.path} can't be written: {err.strerror}") from err
    return RestoredDisk(entry.name, str(target.path), target.format, entry.size, time.monotonic() - begun)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Give a name beside `path`; when the block ends well, what stands there becomes `path`, durably."""
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as private:
        temporary = Path(private, path.name)
        yield temporary
        durable.sync_file(temporary)
        temporary.replace(path)
        durable.sync_folder(path.parent)


def _convert(
    source: dict[str, object],
    target: Path,
    image_format: ImageFormat,
    options: list[str],
    told: Callable[[float], None],
    stop: Stop,
) -> None:
    """Run qemu-img convert.

    told: called with the per cent done. Raises ReadFailed, WriteFailed, Interrupted.
    """
    command = [os.environ.get("QEMU_IMG", "qemu-img"), "convert", "-p", "-W", "-O", image_format, *options]
    command += [f"json:{json.dumps(source)}", str(target.absolute())]
    with tempfile.TemporaryFile() as complaints:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            start_new_session=True,  # a Ctrl-C in the terminal is ours to handle, not the child's
        )
        with child:
            try:
                _follow(child, told, stop)
            except BaseException:
                child.kill()
                raise
        if child.returncode != 0:
            complaints.seek(0)
            raise _explained(complaints.read(4000).decode(errors="replace").strip(), target)


def _follow(child: "subprocess.Popen[bytes]", told: Callable[[float], None], stop: Stop) -> None:
    assert child.stdout is not None
    waiting = select.poll()
    waiting.register(child.stdout, select.POLLIN | select.POLLHUP)
    while True:
        stop.check()
        if not waiting.poll(100):
            continue
        content = os.read(child.stdout.fileno(), 65536)
        if not content:
            return
        if found := _PERCENT.findall(content):
            told(float(found[-1]))


def _explained(complaint: str, target: Path) -> Failed:
    last = complaint.splitlines()[-1] if complaint else "qemu-img said nothing"
    if "error while reading" in last:
        return ReadFailed(f"the repository can't be read: {last:.500}")
    return WriteFailed(f"{target} can't be restored: {last:.500}")


def _to_stdout(
    folder: VmFolder, point: Point, entry: DiskEntry, wanted: ImageFormat | None, stop: Stop
) -> RestoredDisk:
    if wanted == "qcow2":
        raise UsageError("standard output takes raw bytes, not a qcow2 image")
    begun = time.monotonic()
    with (
        images.serve(chain.paths(folder, point, entry.name)) as address,
        closing(Source.connect([address], images.EXPORT)) as source,
    ):
        for piece in _pieces(source):
            stop.check()
            sys.stdout.buffer.write(
                bytes(piece.length) if piece.zero else source.read(piece.offset, piece.length)
            )
        sys.stdout.buffer.flush()
    return RestoredDisk(entry.name, "-", "raw", entry.size, time.monotonic() - begun)


def _pieces(source: Source) -> Iterator[Extent]:
    for status in source.statuses():
        yield from pieces(
            Extent(status.offset, status.length, bool(status.flags[0] & extents.ZERO)), PIECE_BYTES
        )
