# SPDX-License-Identifier: GPL-2.0-or-later
"""The files that describe a VM, as a point holds them: shown, or restored beside the disks."""

import os
from dataclasses import dataclass
from pathlib import Path

from backupctl.errors import UNTOUCHED, BackupctlError, TargetExists, UsageError, WriteFailed
from backupctl.names import FileKind
from backupctl.operations.restore import destination, request
from backupctl.operations.restore.request import RestoreRequest
from backupctl.progress import Reporter
from backupctl.repository import read_locks, stored_files
from backupctl.repository.point import Point
from backupctl.repository.stored_files import StoredFile
from backupctl.repository.vm_directory import VmDirectory
from backupctl.targets import output

DIRECTORY = "definition"
_MAIN: tuple[FileKind, ...] = ("domain", "qemu", "images")


@dataclass(frozen=True)
class RestoredFile:
    """A file that describes the VM. origin: its path on the VM's host, "" for what was asked for."""

    kind: FileKind
    path: Path
    origin: str
    size: int


def main_file(directory: VmDirectory, point: Point) -> bytes:
    """Return the XML of libvirt, or what QEMU told. Raises UsageError if there is neither, DamageFound."""
    entry = stored_files.first(point.manifest.definition, *_MAIN)
    if entry is None:
        raise no_definition(directory, point)
    return stored_files.read(point.path, entry)


def no_definition(directory: VmDirectory, point: Point) -> BackupctlError:
    """Say that a point holds disks only."""
    return UsageError(
        f"{directory.name} {point.id} has no definition of the VM",
        state=UNTOUCHED,
        hint="points that an older version made hold disks only; a later point may have it",
        next_command=f"backupctl list {directory.name}",
    )


def refuse(wanted: RestoreRequest) -> None:
    """Refuse what cannot be restored, before a disk is written. Raises UsageError, TargetExists."""
    directory = files_directory(wanted)
    with read_locks.reading(wanted.directory, wanted.point) as point:
        if not point.manifest.definition:
            raise no_definition(wanted.directory, point)
        for entry in point.manifest.definition:
            refuse_file(wanted, directory / entry.name)


def refuse_file(wanted: RestoreRequest, target: Path) -> None:
    """Refuse one file that must not be made or replaced. Raises UsageError, TargetExists."""
    request.refuse_inside_repository(wanted, target)
    if not os.path.lexists(target):
        return
    if not target.is_file():
        raise TargetExists(f"{target} is not a file; it was not replaced", state=UNTOUCHED)
    request.refuse_overwriting(wanted, f"{target} exists")


def files_directory(wanted: RestoreRequest) -> Path:
    """Return where the files go. Raises UsageError if the disks do not go to a directory."""
    if wanted.to == destination.STDOUT or not destination.is_directory(wanted.to):
        raise UsageError(
            "the files of the definition need a directory: --to DIR/",
            state=UNTOUCHED,
        )
    return Path(wanted.to) / DIRECTORY


def restore(wanted: RestoreRequest, reporter: Reporter) -> tuple[RestoredFile, ...]:
    """Restore all files of the definition into a directory of their own, below that of the disks.

    Raises DamageFound, RepositoryError, WriteFailed, TargetExists, UsageError, Locked.
    """
    directory = files_directory(wanted)
    with read_locks.reading(wanted.directory, wanted.point) as point:
        return tuple(
            restore_file(wanted, point, entry, directory / entry.name, reporter)
            for entry in point.manifest.definition
        )


def restore_file(
    wanted: RestoreRequest, point: Point, entry: StoredFile, target: Path, reporter: Reporter
) -> RestoredFile:
    """Restore one file, absent or complete. Raises as `restore`."""
    write(wanted, target, stored_files.read(point.path, entry), reporter)
    return RestoredFile(entry.kind, target, entry.origin, entry.size)


def write(wanted: RestoreRequest, target: Path, content: bytes, reporter: Reporter) -> None:
    """Write a file, absent or complete. Raises WriteFailed, TargetExists, UsageError, Locked."""
    try:
        with output.file(target, force=wanted.overwrite, warn=reporter.event) as image:
            view = memoryview(content)
            while view:
                view = view[os.write(image.descriptor, view) :]
    except OSError as err:
        raise WriteFailed(f"cannot write {target}: {err.strerror}") from err
