# SPDX-License-Identifier: GPL-2.0-or-later
"""`summary` in a VM's directory: what the manifests say, in one file, for commands that only show points.

It is a cache. Nothing that decides what to delete, to restore or to trust reads it. While the VM's directory
is sealed (seal.py), and its history and its newest point are as they were, it is believed. Else each point is
compared with the identity of its directory and of its manifest, and one that is not exactly as it was is read
anew; and so is everything if the file is missing, damaged, of another version, or of another VM. Whoever
writes it holds the VM's lock; a crash leaves the file before or none, and either is right.
"""

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from backupctl.errors import BackupctlError, DamageFound, RepositoryUnreadable
from backupctl.names import PointId
from backupctl.repository import (
    audit,
    chain,
    history,
    markers,
    point_names,
    seal,
    summary_chains,
    summary_file,
)
from backupctl.repository import manifest as manifests
from backupctl.repository.chain import Layer
from backupctl.repository.point import Point
from backupctl.repository.summary_file import (
    FILE_NAME,
    DiskSummary,
    Identity,
    PointSummary,
    Stored,
)
from backupctl.repository.vm_directory import AllPoints, VmDirectory
from backupctl.system import safe_open

__all__ = ["DiskSummary", "Identity", "Listing", "PointSummary", "look", "renew", "renew_if_free", "renewed"]

_log = logging.getLogger("backupctl.repository")

_TICK_SECONDS = 0.02
"""Longer than a clock tick of the kernel, by which it dates files: two changes in one tick look like one."""
_MANIFEST = f"/{manifests.FILE_NAME}"


@dataclass(frozen=True)
class Listing:
    """All points of a VM, oldest first. damaged, unreadable: as in `ScannedPoints`.

    problems: how they differ from the history. fits: whether all of this is from the summary, and compared.
    sealed: whether nothing has changed since the last run or prune ended, and no unfinished point was there.
    """

    points: tuple[PointSummary, ...]
    retired: tuple[PointSummary, ...]
    damaged: tuple[tuple[Path, BackupctlError], ...]
    unreadable: tuple[tuple[Path, RepositoryUnreadable], ...]
    problems: tuple[audit.Problem, ...]
    fits: bool
    sealed: bool = False

    @cached_property
    def by_id(self) -> Mapping[PointId, PointSummary]:
        """All points, retired ones too."""
        return {one.id: one for one in (*self.points, *self.retired)}


def look(directory: VmDirectory, *, closely: bool = False) -> Listing:
    """Return the points of a VM. Changes and locks nothing. Raises RepositoryError.

    closely: if any layer that the newest point needs has changed, each point is compared.
    """
    # Before the points: whoever changes one writes a line into the history then or after.
    past = _history(directory)
    stored = summary_file.read(directory)
    if stored is not None and _is_as_sealed(directory, stored, past):
        listing = _sealed_listing(stored.content.points)
        if _is_newest_as_it_was(directory, listing, closely=closely):
            return listing
    looked = _look_at_each(directory, stored, past)
    problems = () if looked.compared else audit.problems(directory)
    found = looked.read.committed
    return Listing(
        tuple([one for one in looked.points if not one.retired]),
        tuple([one for one in looked.points if one.retired]),
        found.damaged,
        found.unreadable,
        problems,
        looked.compared,
    )


def renew(directory: VmDirectory) -> None:
    """Write the summary anew if it does not fit, and seal it. The caller holds the VM's lock. Raises nothing.

    The caller changes nothing of the VM's points any more while it holds that lock.
    """
    try:
        _renew(directory)
        _seal(directory)
    except (BackupctlError, OSError, safe_open.NotThere) as err:  # what it says is in the manifests, too
        _log.debug("%s is not written: %s", directory.path / FILE_NAME, err)
        with suppress(OSError):
            (directory.path / f".{FILE_NAME}.new").unlink()


@contextmanager
def renewed(directory: VmDirectory) -> Iterator[None]:
    """Renew the summary at the end of the block, however it ends: its lock has broken the seal.

    The caller holds the VM's lock, and changes nothing of the VM's points after the block.
    """
    try:
        yield
    finally:
        renew(directory)


def renew_if_free(directory: VmDirectory) -> None:
    """Do the same at the end of a command that holds the VM's lock no longer. Raises nothing."""
    with suppress(BackupctlError), directory.lock(0):
        renew(directory)


@dataclass(frozen=True)
class _Looked:
    """A look at each point.

    past: the identity of the history, from before. points: oldest first. read: what was read anew. compared:
    whether the history has no other points.
    """

    past: tuple[int, int, int] | None
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


def _sealed_listing(points: Sequence[PointSummary]) -> Listing:
    retired = tuple([one for one in points if one.retired])
    current = tuple([one for one in points if not one.retired]) if retired else tuple(points)
    return Listing(current, retired, (), (), (), fits=True, sealed=True)


def _is_as_sealed(directory: VmDirectory, stored: Stored, past: tuple[int, int, int] | None) -> bool:
    """Whether neither the VM's directory nor its history has changed since the seal."""
    known, stamp = stored.content.history, stored.stamp
    if stamp is None or known is None or known != past:
        return False
    return seal.is_whole(directory.path, stamp)


def _is_newest_as_it_was(directory: VmDirectory, listing: Listing, *, closely: bool) -> bool:
    """Whether the newest point has not changed. closely: nor any that it depends on."""
    if not listing.points:
        return True
    newest, known = listing.points[-1], listing.by_id if closely else {}
    disks = newest.disks if closely else ()
    needed = {point for disk in disks for point, _ in summary_chains.below(known, disk.name, disk.parent)}
    looked_at = [newest, *(known[point] for point in needed if point in known)]
    return all(_identity(None, f"{directory.path}/{one.id}") == one.identity for one in looked_at)


def _look(directory: VmDirectory) -> _Looked:
    """Look at each point, whether the directory is sealed or not."""
    past = _history(directory)
    return _look_at_each(directory, summary_file.read(directory), past)


def _look_at_each(
    directory: VmDirectory, stored: Stored | None, past: tuple[int, int, int] | None
) -> _Looked:
    """Look at each point. past: the identity of the history, from before."""
    known = stored.content if stored else None
    fitting, others = _compared(directory, known.points if known else [])
    read = directory.scan_some(list(others))
    made = [_summary(one, others[one.id], retired=False) for one in read.committed.points]
    made += [_summary(one, others[one.id], retired=True) for one in read.retired.points]
    # The history was compared with just these points, and neither it nor any of them has changed since.
    same = known is not None and not others and len(fitting) == len(known.points)
    compared = same and known is not None and known.history is not None and known.history == past
    points = sorted([*fitting, *made], key=_id) if made else fitting
    return _Looked(past, points, read, compared)


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


def _identity(above: int | None, name: str) -> Identity | None:
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
    begun, looked = time.time(), _look(directory)
    if looked.compared:
        return
    newest = max(map(_newest_change, looked.points), default=0.0)
    if 0 < (wait := newest + _TICK_SECONDS - begun) <= 2 * _TICK_SECONDS:
        time.sleep(wait)
        begun, looked = time.time(), _look(directory)
    # A change in the same tick as the one before would not be seen.
    settled = [one for one in looked.points if _newest_change(one) + _TICK_SECONDS <= begun]
    merging = looked.merging
    points = [one for one in settled if one.id not in merging]
    whole = len(points) == len(looked.points) and looked.is_sound and _has_sound_layers(directory, looked)
    compared = looked.past if whole and not audit.problems(directory) else None
    summary_file.write(directory, points, compared)


def _seal(directory: VmDirectory) -> None:
    """Seal the summary if it fits. Raises as `renew` does not."""
    stamp = seal.date(directory.path)
    past, stored = _history(directory), summary_file.read(directory)
    # After the directory got its date: what others changed before would not break this seal.
    if stamp is None or stored is None or stored.content.history is None or directory.pending_points():
        return
    if _look_at_each(directory, stored, past).compared:
        summary_file.write_seal(directory, stored, stamp)


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
        chain.why_cut(f"{directory.path}/{one.id}", disk.name, disk.file_bytes)
        for one in looked.points
        for disk in one.disks
    )


def _history(directory: VmDirectory) -> tuple[int, int, int] | None:
    try:
        found = (directory.path / history.FILE_NAME).lstat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_ctime_ns
