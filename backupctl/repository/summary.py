# SPDX-License-Identifier: GPL-2.0-or-later
"""`summary` in a VM's directory: what the manifests say, in one file, for commands that only show points.

It is a cache. Nothing that decides what to delete, to restore or to trust reads it. Of each point it has the
identity of its directory and of its manifest; a point that is not exactly as it was then is read anew, and so
is everything if the file is missing, damaged, of another version, or of another VM. Whoever writes it holds
the VM's lock; a crash leaves the file before or none, and either is right.
"""

import logging
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from blake3 import blake3
from msgspec import Meta, Struct

from backupctl.errors import BackupctlError, DamageFound, RepositoryUnreadable
from backupctl.names import DiskName, PointId
from backupctl.repository import audit, chain, history, markers, point_names
from backupctl.repository import manifest as manifests
from backupctl.repository.chain import Layer
from backupctl.repository.manifest import Consistency, PointKind
from backupctl.repository.point import Point
from backupctl.repository.strict_json import Size
from backupctl.repository.vm_directory import AllPoints, VmDirectory
from backupctl.system import durable, safe_open

_log = logging.getLogger("backupctl.repository")

FILE_NAME = "summary"
_FORMAT: Literal[1] = 1
MAX_BYTES = 1 << 27
_TICK_SECONDS = 0.02
"""Longer than a clock tick of the kernel, by which it dates files: two changes in one tick look like one."""
_MOST_TIME = 253402300799  # the end of the year 9999
_MANIFEST = f"/{manifests.FILE_NAME}"

Time = Annotated[int, Meta(ge=0, le=_MOST_TIME)]


class DiskSummary(Struct, array_like=True, frozen=True, gc=False):
    """One disk of a point; sizes in bytes. See `DiskEntry`."""

    name: DiskName
    kind: PointKind
    parent: PointId | None
    size: Size
    copied_bytes: Size
    stored_bytes: Size
    file_bytes: Size


Identity = tuple[int, int, int, int, int]
"""What shows that a point is as it was: inode and time of change of its directory, the same of its manifest,
and the length of that. Times are in nanoseconds; no program can set them. Every file that is created, removed
or replaced in a directory, a marker too, sets that of the directory."""


class PointSummary(Struct, array_like=True, frozen=True, gc=False):
    """One point. started, ended: of its run, in seconds since 1970. frozen_ms: None if it was not frozen."""

    id: PointId
    identity: Identity
    retired: bool
    protected: bool
    kind: PointKind
    parent: PointId | None
    consistency: Consistency
    started: Time
    ended: Time
    frozen_ms: Size | None
    disks: tuple[DiskSummary, ...]

    @property
    def stored_bytes(self) -> int:
        """What its images take."""
        return sum(disk.stored_bytes for disk in self.disks)


class _Content(Struct, frozen=True, forbid_unknown_fields=True):
    """The file.

    history: the identity of the history with which these points were compared; None if anything was wrong, or
    could not be told: then manifests, history and layers are read each time.
    """

    format: Literal[1]
    vm: str
    repository: str
    history: tuple[int, int, int] | None
    points: list[PointSummary]


_ENCODER, _DECODER = msgspec.json.Encoder(), msgspec.json.Decoder(_Content)


@dataclass(frozen=True)
class Listing:
    """All points of a VM, oldest first. damaged, unreadable: as in `ScannedPoints`.

    problems: how they differ from the history. fits: whether all of this is from the summary, and compared.
    """

    points: tuple[PointSummary, ...]
    retired: tuple[PointSummary, ...]
    damaged: tuple[tuple[Path, BackupctlError], ...]
    unreadable: tuple[tuple[Path, RepositoryUnreadable], ...]
    problems: tuple[audit.Problem, ...]
    fits: bool


def look(directory: VmDirectory) -> Listing:
    """Return the points of a VM. Changes and locks nothing. Raises RepositoryError."""
    looked = _look(directory)
    problems = () if looked.compared else audit.problems(directory)
    found = looked.read
    return Listing(
        tuple(one for one in looked.points if not one.retired),
        tuple(one for one in looked.points if one.retired),
        found.committed.damaged,
        found.committed.unreadable,
        problems,
        looked.compared,
    )


def renew(directory: VmDirectory) -> None:
    """Write the summary anew if it does not fit. The caller holds the VM's lock. Raises nothing."""
    try:
        _renew(directory)
    except (BackupctlError, OSError) as err:  # what it says is in the manifests, too
        _log.debug("%s is not written: %s", directory.path / FILE_NAME, err)
        with suppress(OSError):
            (directory.path / f".{FILE_NAME}.new").unlink()


def renew_if_free(directory: VmDirectory) -> None:
    """Do the same at the end of a command that holds the VM's lock no longer. Raises nothing."""
    with suppress(BackupctlError), directory.lock(0):
        renew(directory)


@dataclass(frozen=True)
class _Looked:
    """points: oldest first. read: what was read anew. compared: whether the history has no other points."""

    points: list[PointSummary]
    read: AllPoints
    compared: bool

    @property
    def merging(self) -> set[PointId]:
        """The points in the middle of a merge, whose manifests do not say what their images are."""
        every = (*self.read.committed.points, *self.read.retired.points)
        return {one.id for one in every if _is_merging(one)}

    @property
    def is_sound(self) -> bool:
        """Whether each manifest can be read."""
        return not any(one.damaged or one.unreadable for one in self.read)


def _look(directory: VmDirectory) -> _Looked:
    # Before the points: whoever changes one writes a line into the history then or after.
    past = _history(directory)
    known = _read(directory)
    fitting, others = _compared(directory, known.points if known else [])
    read = directory.scan_some(list(others))
    made = [_summary(one, others[one.id], retired=False) for one in read.committed.points]
    made += [_summary(one, others[one.id], retired=True) for one in read.retired.points]
    # The history was compared with just these points, and neither it nor any of them has changed since.
    same = known is not None and not others and len(fitting) == len(known.points)
    compared = same and known is not None and known.history is not None and known.history == past
    points = sorted([*fitting, *made], key=_id) if made else fitting
    return _Looked(points, read, compared)


def _compared(
    directory: VmDirectory, known: Iterable[PointSummary]
) -> tuple[list[PointSummary], dict[PointId, Identity | None]]:
    """Return the points that are as they were, oldest first, and the identities of all others."""
    try:
        with safe_open.unreadable(directory.path):
            above = os.open(directory.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                return _sorted_out(above, {one.id: one for one in known})
            finally:
                os.close(above)
    except RepositoryUnreadable:
        if directory.exists():
            raise
        return [], {}


def _sorted_out(
    above: int, known: dict[PointId, PointSummary]
) -> tuple[list[PointSummary], dict[PointId, Identity | None]]:
    fitting, others = [], {}
    for name in sorted(os.listdir(above)):
        one = known.get(PointId(name))
        if one is None and not point_names.is_id(name):
            continue
        identity = _identity(above, name)
        if one is not None and identity == one.identity:
            fitting.append(one)
        else:
            others[PointId(name)] = identity
    return fitting, others


def _identity(above: int, name: str) -> Identity | None:
    """Return what shows whether a point changes; None if it cannot be told."""
    try:
        found = os.stat(name, dir_fd=above, follow_symlinks=False)
        manifest = os.stat(name + _MANIFEST, dir_fd=above, follow_symlinks=False)
    except OSError:
        return None
    return (found.st_ino, found.st_ctime_ns, manifest.st_ino, manifest.st_ctime_ns, manifest.st_size)


def _newest_change(one: PointSummary) -> float:
    """Return when its directory or its manifest was changed last, in seconds since 1970."""
    return max(one.identity[1], one.identity[3]) / 1e9


def _id(one: PointSummary) -> PointId:
    return one.id


def _summary(point: Point, identity: Identity | None, *, retired: bool) -> PointSummary:
    manifest = point.manifest
    return PointSummary(
        point.id,
        identity or _NOT_TOLD,
        retired,
        _is_protected(point),
        manifest.kind,
        manifest.parent,
        manifest.consistency,
        max(0, round(manifest.started.timestamp())),
        max(0, round(manifest.ended.timestamp())),
        manifest.freeze.milliseconds,
        tuple(
            DiskSummary(
                entry.name,
                entry.kind,
                entry.parent,
                entry.size,
                entry.copied_bytes,
                entry.stored_bytes,
                entry.file_bytes,
            )
            for entry in manifest.disks
        ),
    )


_NOT_TOLD: Identity = (0, 0, 0, 0, 0)


def _is_protected(point: Point) -> bool:
    try:
        return point.protected
    except BackupctlError:  # it was removed just now, or its directory cannot be entered
        return False


def _is_merging(point: Point) -> bool:
    return any(entry.merged or markers.has(point.path, markers.merging(entry.name)) for entry in point.disks)


def _renew(directory: VmDirectory) -> None:
    past, begun = _history(directory), time.time()
    looked = _look(directory)
    if looked.compared:
        return
    newest = max(map(_newest_change, looked.points), default=0.0)
    if 0 < (wait := newest + _TICK_SECONDS - begun) <= 2 * _TICK_SECONDS:
        time.sleep(wait)
        past, begun = _history(directory), time.time()
        looked = _look(directory)
    # A change in the same tick as the one before would not be seen.
    settled = [one for one in looked.points if _newest_change(one) + _TICK_SECONDS <= begun]
    merging = looked.merging
    points = [one for one in settled if one.id not in merging]
    whole = len(points) == len(looked.points) and looked.is_sound and _has_sound_layers(directory, looked)
    compared = past if whole and not audit.problems(directory) else None
    _write(directory, points, compared)


def _write(directory: VmDirectory, points: list[PointSummary], compared: tuple[int, int, int] | None) -> None:
    content = _ENCODER.encode(_Content(_FORMAT, directory.name, directory.repository, compared, points))
    durable.replace(directory.path / FILE_NAME, _checksum(content) + b"\n" + content)


def _has_sound_layers(directory: VmDirectory, looked: _Looked) -> bool:
    """Whether no layer is cut off or missing, and the headers of those of new points are right.

    Raises RepositoryUnreadable.
    """
    for point in (*looked.read.committed.points, *looked.read.retired.points):
        for entry in point.disks:
            try:
                Layer.of(point, entry).check()
            except DamageFound:
                return False
    return not any(
        chain.why_cut(directory.path / one.id, disk.name, disk.file_bytes)
        for one in looked.points
        for disk in one.disks
    )


def _history(directory: VmDirectory) -> tuple[int, int, int] | None:
    try:
        found = (directory.path / history.FILE_NAME).lstat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_ctime_ns


def _read(directory: VmDirectory) -> _Content | None:
    """Read the file; None if there is nothing that can be used."""
    try:
        content = safe_open.read(directory.path / FILE_NAME, MAX_BYTES)
        checksum, _, rest = content.partition(b"\n")
        if checksum != _checksum(rest):
            return None
        found = _DECODER.decode(rest)
    except (safe_open.NotThere, RepositoryUnreadable, msgspec.MsgspecError, RecursionError):
        return None
    of_this = (found.vm, found.repository) == (directory.name, directory.repository)
    return found if of_this else None


def _checksum(content: bytes) -> bytes:
    return blake3(content).hexdigest(16).encode()
