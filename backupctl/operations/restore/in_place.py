# SPDX-License-Identifier: GPL-2.0-or-later
"""Bringing an existing image or block device to the state of a point: only what differs is written.

::

    target ─► read ─► digests ─► compared with the point's digest maps ─► clusters that differ
    point  ─► those clusters, each compared with its digest ─► written in place

A crash in the middle leaves a target that is neither the old nor the new one; the same command again
finishes it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backupctl.cancel import Cancellation
from backupctl.digests import clusters
from backupctl.digests.clusters import Clusters, EffectiveContent, Records
from backupctl.errors import UNTOUCHED, BackupctlError, DamageFound, UsageError, WriteFailed, moving
from backupctl.events import StepStarted
from backupctl.events.restore import TargetLarger, TargetResized
from backupctl.images.create import ImageFormat
from backupctl.names import DiskName, PointId, VmName
from backupctl.operations import endpoints
from backupctl.operations.restore import destination, request
from backupctl.operations.restore.disk import format_ranges
from backupctl.operations.restore.request import DiskTask, RestoreRequest
from backupctl.operations.restore.selection import MissingDisk
from backupctl.progress import Reporter
from backupctl.repository import chain
from backupctl.sizes import WINDOW_CLUSTERS, Range
from backupctl.targets import in_place
from backupctl.targets.in_place import Target
from backupctl.transfer import cluster_map, sink
from backupctl.transfer.batch import Part
from backupctl.transfer.copy import Copy, Wanted
from backupctl.transfer.reader import NbdReader
from backupctl.transfer.verify_filter import VerifyFilter
from backupctl.vm import filling

_ZERO_CLUSTERS = 128  # on a device without a zero command they are written as data
_HALF_DONE = "the target is partly changed; run the same command again to finish it"


@dataclass(frozen=True)
class InPlaceDisk:
    """One target, now in the state of the point. Sizes in bytes; written_bytes: in whole clusters.

    point: the one that it was taken from.
    """

    name: DiskName
    path: Path
    format: ImageFormat
    size: int
    written_bytes: int
    same_bytes: int
    seconds: float
    point: PointId


@dataclass(frozen=True)
class InPlaceReport:
    """The targets that were updated. missing: disks that the point does not hold, left out."""

    vm: VmName
    point: PointId
    images: tuple[InPlaceDisk, ...]
    missing: tuple[MissingDisk, ...]


@dataclass(frozen=True)
class _Target:
    """The target of one disk. expected: what it shall hold. size: what it has now, in bytes."""

    vm: VmName
    task: DiskTask
    target: Target
    expected: EffectiveContent
    size: int
    reporter: Reporter
    stop: Cancellation

    @property
    def name(self) -> DiskName:
        return self.task.entry.name


def restore(wanted: RestoreRequest, reporter: Reporter, stop: Cancellation) -> InPlaceReport:
    """Bring what exists at the target of each disk to the state of a point. Damaged data is never written.

    A file gets the disk's size; a block device may be larger, and keeps what is after the disk. Everything
    that can be refused is refused before anything is changed. Raises UsageError, NoSuchPoint, DamageFound,
    ReadFailed, WriteFailed, RepositoryError, Interrupted.
    """
    with request.tasks(wanted, destination.of_existing, reporter) as tasks, ExitStack() as held:
        opened = [held.enter_context(_open(wanted, task)) for task in tasks.disks]
        destination.refuse_one_for_all(
            [str(target.identity) for target in opened], [task.entry.name for task in tasks.disks]
        )
        targets = [
            _target(wanted, task, target, reporter, stop)
            for task, target in zip(tasks.disks, opened, strict=True)
        ]
        done = tuple(_update(one) for one in targets)
    return InPlaceReport(wanted.directory.name, wanted.point, done, tasks.missing)


@contextmanager
def _open(wanted: RestoreRequest, task: DiskTask) -> Iterator[Target]:
    path = Path(task.target)
    request.refuse_inside_repository(wanted, path)
    with ExitStack() as held:
        try:
            found = held.enter_context(in_place.opened(path, task.format, wanted.allowed))
        except OSError as err:
            raise UsageError(f"cannot open {path}: {err.strerror}", state=UNTOUCHED) from err
        yield found


def _target(
    wanted: RestoreRequest, task: DiskTask, target: Target, reporter: Reporter, stop: Cancellation
) -> _Target:
    return _Target(
        wanted.directory.name,
        task,
        target,
        chain.effective_content(task.layers, task.entry.size),
        _size(target, task.entry.size),
        reporter,
        filling.watching(stop, target.path),
    )


def _size(target: Target, needed: int) -> int:
    try:
        size = target.size()
    except OSError as err:
        raise UsageError(f"cannot read {target.path}: {err.strerror}", state=UNTOUCHED) from err
    if target.device and size < needed:
        raise UsageError(f"{target.path} has {size} bytes; the disk needs {needed}", state=UNTOUCHED)
    return size


def _update(one: _Target) -> InPlaceDisk:
    started = time.monotonic()
    one.stop.check()
    _resize(one)
    try:
        with moving(one.name, str(one.target.path)), one.target.served() as address:
            differing = _differing(one, address)
            written = _write(one, address, differing)
    except OSError as err:
        raise WriteFailed(f"cannot write {one.target.path}: {err.strerror}", state=_HALF_DONE) from err
    return InPlaceDisk(
        name=one.name,
        path=one.target.path,
        format=one.target.format,
        size=one.expected.size_bytes,
        written_bytes=written,
        same_bytes=one.expected.size_bytes - written,
        seconds=time.monotonic() - started,
        point=one.task.point,
    )


def _resize(one: _Target) -> None:
    wanted = one.expected.size_bytes
    if one.size == wanted:
        return
    if one.target.device:
        one.reporter.event(TargetLarger(one.target.path, one.name, one.size - wanted))
        return
    one.reporter.event(TargetResized(one.target.path, one.size, wanted))
    one.target.resize(wanted)


def _differing(one: _Target, address: Path) -> NDArray[np.bool_]:
    """Read the target; return one flag for each cluster of the disk."""
    size = one.expected.size_bytes
    found = np.zeros(clusters.count(size), np.bool_)

    def compare(held: Records) -> Wanted:
        numbers = held["cluster"]
        found[numbers] = clusters.differ(held, one.expected.of(numbers))
        nothing = np.zeros(len(numbers), np.bool_)
        return Wanted(nothing, nothing)

    def rewrite(numbers: Clusters) -> None:
        found[numbers] = True

    one.reporter.event(StepStarted(f"compare {one.target.path} with {one.name}"))
    with endpoints.read_server(address) as source:
        Copy(
            NbdReader(source, size),
            None,
            check=one.stop.check,
            progress=_progress(one, size),
            filter_records=compare,
            on_unreadable=rewrite,
        ).run(_until(cluster_map.all_parts(source), len(found)))
    return found


def _write(one: _Target, address: Path, differing: NDArray[np.bool_]) -> int:
    """Write what differs from the point into the target; returns how many bytes."""

    def on_mismatch(ranges: Sequence[Range]) -> None:
        raise DamageFound(
            f"{one.name} is damaged in the repository: {format_ranges(ranges)} are not what was read from "
            "the VM",
            state="no damaged data was written, but the target is partly changed",
            hint="verify lists everything that is damaged",
            next_command=f"backupctl verify {one.vm}",
        )

    def on_unreadable(numbers: Clusters) -> None:
        if source.refused is not None:
            raise source.refused
        on_mismatch(clusters.ranges(numbers, size))

    size = one.expected.size_bytes
    total = clusters.bytes_of(np.flatnonzero(differing).astype(np.uint64), size)
    if not total:
        return 0
    one.reporter.event(StepStarted(f"write what differs: {total} of {size} bytes"))
    with (
        endpoints.read_chain(one.task.layers) as source,
        endpoints.write_server(address, one.stop.check, flush_seconds=sink.DISK_SECONDS, size=size) as target,
    ):
        try:
            Copy(
                source,
                target,
                check=one.stop.check,
                progress=_progress(one, total),
                filter_records=VerifyFilter(one.expected, on_mismatch, size, zeroes=True),
                on_unreadable=on_unreadable,
                zero_clusters=_ZERO_CLUSTERS,
            ).run(_wanted(differing, one.expected))
        except BackupctlError as err:
            err.add(state=_HALF_DONE)
            raise
    return total


def _progress(one: _Target, total: int) -> Callable[[int], None]:
    return lambda done_bytes: one.reporter.progress(one.name, done_bytes, total)


def _until(parts: Iterator[Part], count: int) -> Iterator[Part]:
    """Yield what of the parts belongs to the disk, which has `count` clusters: a device may be larger."""
    for numbers, zero in parts:
        yield Part(numbers[: np.searchsorted(numbers, np.uint64(count))], zero)


def _wanted(differing: NDArray[np.bool_], expected: EffectiveContent) -> Iterator[Part]:
    """Yield what is to be written: data to be read from the point, and zeroes."""
    for first in range(0, len(differing), WINDOW_CLUSTERS):
        flags = differing[first : first + WINDOW_CLUSTERS]
        records = expected.window(first, len(flags))[flags]
        zero = clusters.is_zero(records)
        for kind in (False, True):
            yield Part(records["cluster"][zero == kind], kind)
