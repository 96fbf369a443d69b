# SPDX-License-Identifier: GPL-2.0-or-later
"""Bringing an image or a block device that is there to the state of a point: only what differs is written.

::

    target ─► read ─► digests ─► compared with the point's digest maps ─► clusters that differ
    point  ─► those clusters, each compared with its digest ─► written in place

A death in the middle leaves a target that is neither the old nor the new one; the same again finishes it.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backupctl.cancel import Cancellation
from backupctl.digests import clusters, hashing
from backupctl.digests.clusters import CLUSTER_BYTES, EffectiveContent
from backupctl.errors import BackupctlError, DamageFound, UsageError, WriteFailed, moving
from backupctl.events import StepStarted
from backupctl.events.restore import TargetLarger, TargetResized
from backupctl.images import nbd_server
from backupctl.images.create import ImageFormat
from backupctl.images.foreign_header import ImageFeature
from backupctl.names import DiskName, PointId, VmName
from backupctl.operations.restore import destination, selection
from backupctl.operations.restore.selection import MissingDisk, Part
from backupctl.progress import Reporter
from backupctl.repository import chain
from backupctl.repository.chain import Layer
from backupctl.repository.point import Point
from backupctl.repository.vm_folder import VmFolder
from backupctl.sizes import WINDOW_CLUSTERS, Range
from backupctl.system import safe_open
from backupctl.targets import in_place, output
from backupctl.targets.in_place import Target
from backupctl.transfer import cluster_map, copy, extents
from backupctl.transfer.copy import Copy, Filter, open_target
from backupctl.transfer.extents import Extent
from backupctl.transfer.nbd_client import Connection
from backupctl.transfer.rate_limit import TokenBucket
from backupctl.transfer.source import Source
from backupctl.transfer.verify_filter import VerifyFilter
from backupctl.vm import filling

_CONNECTIONS = 2
_MOST_BYTES = 8 << 20  # at a time: a device that can't make zeroes by itself has them written
_HALF_DONE = "the target is partly changed; the same command again finishes it"


@dataclass(frozen=True)
class InPlaceDisk:
    """One target that is now as the point. Sizes in bytes; written_bytes: in whole clusters.

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
    """What was brought to the state of a point. missing: disks that the point does not hold, left out."""

    vm: VmName
    point: PointId
    images: tuple[InPlaceDisk, ...]
    missing: tuple[MissingDisk, ...]


@dataclass(frozen=True)
class _Work:
    """One disk. layers: newest first. expected: what the target shall hold. room: what it has, in bytes."""

    vm: VmName
    name: DiskName
    point: PointId
    layers: tuple[Layer, ...]
    target: Target
    expected: EffectiveContent
    room: int
    reporter: Reporter
    stop: Cancellation

    @property
    def size(self) -> int:
        return self.expected.size_bytes


def restore(
    folder: VmFolder,
    point: Point,
    *,
    to: str,
    disk: str | None,
    image_format: ImageFormat | None,
    reporter: Reporter,
    stop: Cancellation,
    all_disks: bool = False,
    allowed: Collection[ImageFeature] = (),
) -> InPlaceReport:
    """Bring what stands at `to` (as in a whole restore) to the state of a point.

    image_format: None takes what the disk was in the VM, and raw for a block device. A file gets the disk's
    size; a block device may be larger, and keeps what is behind the disk. all_disks: take those that the
    point does not hold from their own newest points. allowed: what an image may lead to. All that can be
    refused is refused before anything is changed. Raises UsageError, NoSuchPoint, DamageFound, ReadFailed,
    WriteFailed, RepositoryError, Interrupted.
    """
    with (
        selection.chosen(folder, point.id, disk, all_disks=all_disks, reporter=reporter) as chosen,
        ExitStack() as held,
    ):
        layers = [chain.layers(folder, part.point, part.entry.name) for part in chosen.parts]
        wanted = [destination.of_existing(part.entry, to, image_format) for part in chosen.parts]
        destination.refuse_one_for_all([path for path, _ in wanted], chosen.names)
        targets = [held.enter_context(_target(folder, *one, allowed)) for one in wanted]
        destination.refuse_one_for_all([str(target.identity) for target in targets], chosen.names)
        works = [
            _work(folder.name, part, below, target, reporter, stop)
            for part, below, target in zip(chosen.parts, layers, targets, strict=True)
        ]
        done = tuple(_reconcile(work) for work in works)
    return InPlaceReport(folder.name, point.id, done, chosen.missing)


def _work(
    vm: VmName, part: Part, layers: tuple[Layer, ...], target: Target, reporter: Reporter, stop: Cancellation
) -> _Work:
    entry = part.entry
    expected = chain.effective_content(layers, entry.size)
    both = filling.watching(stop, target.path)
    return _Work(
        vm, entry.name, part.point.id, layers, target, expected, _room(target, entry.size), reporter, both
    )


@contextmanager
def _target(
    folder: VmFolder, path: str, kind: ImageFormat, allowed: Collection[ImageFeature]
) -> Iterator[Target]:
    output.refuse_inside(folder.path.parent, Path(path))
    with ExitStack() as held:
        try:
            found = held.enter_context(in_place.opened(Path(path), kind, allowed))
        except OSError as err:
            raise UsageError(f"{path} can't be opened: {err.strerror}", state="nothing was touched") from err
        yield found


def _room(target: Target, size: int) -> int:
    try:
        room = target.size()
    except OSError as err:
        raise UsageError(f"{target.path} can't be read: {err.strerror}", state="nothing was touched") from err
    if target.device and room < size:
        raise UsageError(
            f"{target.path} has {room} bytes; the disk needs {size}", state="nothing was touched"
        )
    return room


def _reconcile(work: _Work) -> InPlaceDisk:
    begun = time.monotonic()
    work.stop.check()
    _fit(work)
    try:
        with moving(work.name, str(work.target.path)), work.target.served() as address:
            differing = _differing(work, address)
            written = _write(work, address, differing)
    except OSError as err:
        raise WriteFailed(f"{work.target.path} can't be written: {err.strerror}", state=_HALF_DONE) from err
    return InPlaceDisk(
        work.name,
        work.target.path,
        work.target.format,
        work.size,
        written,
        work.size - written,
        time.monotonic() - begun,
        work.point,
    )


def _fit(work: _Work) -> None:
    if work.room == work.size:
        return
    if work.target.device:
        work.reporter.event(TargetLarger(work.target.path, work.name, work.room - work.size))
        return
    work.reporter.event(TargetResized(work.target.path, work.room, work.size))
    work.target.resize(work.size)


def _differing(work: _Work, address: Path) -> NDArray[np.bool_]:
    """Read the target; return one flag for each cluster of the disk."""
    found = np.zeros(clusters.count(work.size), np.bool_)

    def look(extent: Extent, content: memoryview | None) -> Sequence[Extent]:
        first, count = extent.offset // CLUSTER_BYTES, clusters.count(extent.length)
        held = clusters.blank(first, count) if content is None else hashing.of_piece(extent.offset, content)
        found[first : first + count] = clusters.differ(held, work.expected.window(first, count))
        return ()

    def unreadable(extent: Extent) -> None:
        first = extent.offset // CLUSTER_BYTES
        found[first : first + clusters.count(extent.length)] = True

    work.reporter.event(StepStarted(f"compare {work.target.path} with {work.name}"))
    with closing(Source.connect([address] * _CONNECTIONS, nbd_server.EXPORT)) as source:
        _copy(work, source, (), work.size, look, unreadable).run(
            _until(cluster_map.all_extents(source), work.size)
        )
    return found


def _write(work: _Work, address: Path, differing: NDArray[np.bool_]) -> int:
    """Write what differs from the point into the target; returns how many bytes."""

    def spoilt(ranges: list[Range]) -> None:
        raise DamageFound(
            f"{work.name} is damaged in the repository: bytes {ranges[0][0]}-{sum(ranges[0]) - 1} are not "
            "what was read from the VM",
            state="nothing of the damaged data was written, but the target is partly changed",
            hint="verify names all that is damaged",
            next_command=f"backupctl verify {work.vm}",
        )

    def unreadable(extent: Extent) -> None:
        for layer in work.layers:
            safe_open.prove_readable(layer.path, work.stop.check)
        spoilt([(extent.offset, extent.length)])

    total = sum(extent.length for extent in _wanted(differing, work.expected))
    if not total:
        return 0
    work.reporter.event(StepStarted(f"write what differs: {total} of {work.size} bytes"))
    prover = VerifyFilter(work.expected, spoilt, zeroes=True)
    with (
        chain.opened(work.layers) as opened,
        nbd_server.serve(opened) as point,
        closing(Source.connect([point] * _CONNECTIONS, nbd_server.EXPORT)) as source,
        open_target(
            address, nbd_server.EXPORT, _CONNECTIONS, work.stop.check, flush_seconds=copy.DISK_SECONDS
        ) as sinks,
    ):
        try:
            _copy(work, source, sinks, total, prover, unreadable).run(_wanted(differing, work.expected))
        except BackupctlError as err:
            err.add(state=_HALF_DONE)
            raise
    return total


def _copy(
    work: _Work,
    source: Source,
    sinks: tuple[Connection, ...],
    total: int,
    sieve: Filter,
    unreadable: Callable[[Extent], None],
) -> Copy:
    def progress(done_bytes: int) -> None:
        work.reporter.progress(work.name, done_bytes, total)

    return Copy(
        source, sinks, TokenBucket(None), work.stop.check, progress, sieve=sieve, unreadable=unreadable
    )


def _until(found: Iterator[Extent], size: int) -> Iterator[Extent]:
    """Yield the part of the extents that belongs to the disk: a device may be larger."""
    for extent in found:
        if extent.offset < size:
            yield Extent(extent.offset, min(extent.end, size) - extent.offset, extent.zero)


def _wanted(differing: NDArray[np.bool_], expected: EffectiveContent) -> Iterator[Extent]:
    """Yield what is to be written: data to be read from the point, and zeroes."""
    for first in range(0, len(differing), WINDOW_CLUSTERS):
        flags = differing[first : first + WINDOW_CLUSTERS]
        records = expected.window(first, len(flags))[flags]
        zero = clusters.is_zero(records)
        for kind in (False, True):
            for offset, length in clusters.ranges(records["cluster"][zero == kind], expected.size_bytes):
                yield from extents.pieces(Extent(offset, length, kind), _MOST_BYTES)
