# SPDX-License-Identifier: GPL-2.0-or-later
"""What a restore is asked to do, where each disk goes, and what is refused before anything is touched.

The three ways to restore (`whole`, `overlay`, `in_place`) take the same request.
"""

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from backupctl.errors import UNTOUCHED, TargetExists
from backupctl.images.create import ImageFormat
from backupctl.images.foreign_header import ImageFeature
from backupctl.names import PointId
from backupctl.operations.restore import destination, selection
from backupctl.operations.restore.selection import MissingDisk
from backupctl.progress import Reporter
from backupctl.repository import chain
from backupctl.repository.chain import Layer
from backupctl.repository.manifest import DiskEntry
from backupctl.repository.vm_directory import VmDirectory
from backupctl.targets import output


@dataclass(frozen=True, kw_only=True)
class RestoreRequest:
    """A restore of one disk of a point, or of all.

    to: "-" for standard output, or as `destination` describes. disk: None for all of the point's disks.
    all_disks: take those that the point does not hold from their own newest points before it.
    image_format: None as `destination` describes. overwrite: replace what exists at the target.
    allow_damage: also write data that does not match its digest, and name it in the report.
    allowed: what an existing image may have that a plain image has not.
    """

    directory: VmDirectory
    point: PointId
    to: str
    disk: str | None = None
    all_disks: bool = False
    image_format: ImageFormat | None = None
    overwrite: bool = False
    allow_damage: bool = False
    allowed: Collection[ImageFeature] = ()


@dataclass(frozen=True)
class DiskTask:
    """One disk of a request: the point that it is taken from, its layers (newest first), where it goes."""

    entry: DiskEntry
    point: PointId
    layers: tuple[Layer, ...]
    target: str
    format: ImageFormat


@dataclass(frozen=True)
class Tasks:
    """All disks of a request. missing: disks that the point does not hold, left out."""

    disks: tuple[DiskTask, ...]
    missing: tuple[MissingDisk, ...]


TargetOf = Callable[[DiskEntry, str, ImageFormat | None], tuple[str, ImageFormat]]
"""`destination.of_new` or `destination.of_existing`."""


@contextmanager
def tasks(request: RestoreRequest, target_of: TargetOf, reporter: Reporter) -> Iterator[Tasks]:
    """Hold the points of a request for reading; yields a task for each disk, in the point's order.

    Raises UsageError, NoSuchPoint, DamageFound, Locked, RepositoryError.
    """
    with selection.chosen(
        request.directory, request.point, request.disk, all_disks=request.all_disks, reporter=reporter
    ) as chosen:
        found = tuple(
            DiskTask(
                part.entry,
                part.point.id,
                chain.layers(request.directory, part.point, part.entry.name),
                *target_of(part.entry, request.to, request.image_format),
            )
            for part in chosen.parts
        )
        destination.refuse_one_for_all([task.target for task in found], chosen.names)
        yield Tasks(found, chosen.missing)


def refuse_inside_repository(request: RestoreRequest, target: Path) -> None:
    """Refuse a target within the repository. Raises UsageError."""
    output.refuse_inside(request.directory.path.parent, target)


def refuse_new_file(
    request: RestoreRequest, task: DiskTask, also_allowed: Collection[ImageFeature] = ()
) -> None:
    """Refuse a file that must not be made or replaced. Raises UsageError, TargetExists.

    also_allowed: features of an existing image that the new one has as well.
    """
    target = Path(task.target)
    refuse_inside_repository(request, target)
    destination.refuse_unplaceable(request.to, target)
    output.place_of(target)
    if not os.path.lexists(target):
        return
    refuse_overwriting(request, f"{target} exists")
    output.refuse_in_use(target)
    output.refuse_more_than_bytes(target, task.format, {*request.allowed, *also_allowed})


def refuse_overwriting(request: RestoreRequest, why: str) -> None:
    """Refuse to replace what exists, unless the request says so. Raises TargetExists."""
    if not request.overwrite:
        raise TargetExists(
            why,
            state=UNTOUCHED,
            hint="choose another target, or overwrite this one",
            next_command="backupctl restore --force",
        )
