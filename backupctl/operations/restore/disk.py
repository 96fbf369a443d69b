# SPDX-License-Identifier: GPL-2.0-or-later
"""One disk of a point out of the repository, each cluster compared with its digest on its way.

::

    chain of layers ─► QEMU's server ─► compared ─► QEMU's server ─► an image, a raw file or a device
                                            └─────────────────────► a stream of bytes

What does not agree with its digest is refused; with `force` it is let through, and named.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

from backupctl.cancel import Cancellation
from backupctl.digests.clusters import CLUSTER_BYTES, EffectiveContent
from backupctl.errors import DamageFound, ReadFailed, RepositoryUnreadable
from backupctl.images import create, nbd_server
from backupctl.images.create import ImageFormat
from backupctl.images.open_image import OpenImage
from backupctl.names import PointId, VmName
from backupctl.repository import chain
from backupctl.repository.chain import Layer
from backupctl.sizes import Range
from backupctl.system import safe_open
from backupctl.transfer import cluster_map, extents
from backupctl.transfer.copy import Copy, open_target
from backupctl.transfer.extents import Extent
from backupctl.transfer.nbd_client import Connection
from backupctl.transfer.rate_limit import TokenBucket
from backupctl.transfer.source import Source
from backupctl.transfer.stream import stream
from backupctl.transfer.verify_filter import VerifyFilter

_CONNECTIONS = 2
_HEAD_BYTES = 1 << 20
_FORCE = "verify names all that is damaged; restore --force lets it through"
_DEVICE_ZERO_BYTES = 8 << 20  # at a time: a device that can't make zeroes by itself has them written
_SHOWN = 4


@dataclass
class DiskReader:
    """The reading of one disk. layers: newest first. progress: told the bytes done, of `size`.

    damaged: ranges of the disk that were let through. unproven: why nothing could be compared, "" if all
    was.
    """

    vm: VmName
    point: PointId
    layers: tuple[Layer, ...]
    force: bool
    stop: Cancellation
    progress: Callable[[int], None]
    damaged: list[Range] = field(default_factory=list)
    unproven: str = ""

    @property
    def size(self) -> int:
        """The disk's virtual size in bytes."""
        return self.layers[0].entry.size

    def into_image(self, target: OpenImage, image_format: ImageFormat, *, onto_device: bool) -> None:
        """Write into an empty file, sparsely, or over all of a device.

        A device begins with zeroes until all else is there, so that what is refused halfway does not look
        complete. Raises DamageFound, ReadFailed, WriteFailed, RepositoryError, Interrupted.
        """
        prover = VerifyFilter(self._expected(), self._spoilt, zeroes=onto_device)
        create.create_target(target, image_format, self.size, onto_device=onto_device)
        with (
            self._served() as source,
            nbd_server.serve_target(target, image_format, onto_device=onto_device) as address,
            open_target(address, nbd_server.EXPORT, _CONNECTIONS) as sinks,
        ):
            head = min(_HEAD_BYTES, self.size) if onto_device else 0
            pour = _Pipeline(self, source, sinks, prover, _DEVICE_ZERO_BYTES if onto_device else self.size)
            pour.blank(Extent(0, head, zero=True))
            pour.part(head, self.size)
            pour.part(0, head)
        self.damaged.sort()

    def into_stream(self, descriptor: int) -> None:
        """Write all bytes in order to a descriptor. Raises as `into_image`."""
        prover = VerifyFilter(self._expected(), self._spoilt, zeroes=True)
        with self._served() as source:
            stream(source, descriptor, check=self.stop.check, progress=self.progress, look=prover)

    @contextmanager
    def _served(self) -> Iterator[Source]:
        with (
            chain.opened(self.layers) as opened,
            nbd_server.serve(opened) as address,
            closing(Source.connect([address] * _CONNECTIONS, nbd_server.EXPORT, borne=True)) as source,
        ):
            try:
                yield source
            except ReadFailed as err:
                if not all(connection.alive() for connection in source.connections):
                    raise  # the server is lost: that tells nothing of what is stored
                self._prove_readable()
                raise DamageFound(
                    f"{self.layers[0].entry.name} of {self.vm} at {self.point} can't be read: {err.message}",
                    state="the restore was given up; what it wrote is gone, or not complete",
                    hint=_FORCE,
                    next_command=self._next(),
                ) from err

    def _expected(self) -> EffectiveContent | None:
        try:
            return chain.effective_content(self.layers, self.size)
        except (DamageFound, RepositoryUnreadable) as err:
            if not self.force:
                raise err.add(state="nothing was written", hint=_FORCE, next_command=self._next()) from err
            self.unproven = err.message
            return None

    def _spoilt(self, ranges: Sequence[Range]) -> None:
        if not self.force:
            raise self.refused(ranges)
        self.damaged += ranges

    def lost(self, ranges: Sequence[Range]) -> DamageFound:
        """Return the error that names what QEMU can't read. Raises RepositoryUnreadable if nobody can."""
        self._prove_readable()
        return self.refused(ranges)

    def _prove_readable(self) -> None:
        try:
            for layer in self.layers:
                safe_open.prove_readable(layer.path, self.stop.check)
        except RepositoryUnreadable as err:
            raise err.add(
                state="the restore was given up; what it wrote is gone, or not complete",
                hint=_FORCE,
                next_command=self._next(),
            ) from err

    def refused(self, ranges: Sequence[Range]) -> DamageFound:
        """Return the error that names what is damaged."""
        return DamageFound(
            f"{self.layers[0].entry.name} of {self.vm} at {self.point} is damaged: {said(ranges)} are not "
            "what was read from the VM",
            state="the restore was given up; what it wrote is gone, or not complete",
            hint=_FORCE,
            next_command=self._next(),
        )

    def _next(self) -> str:
        return f"backupctl verify {self.vm} {self.point}"


@dataclass(frozen=True)
class _Pipeline:
    """What is copied from where to where. most: the longest extent, in bytes."""

    readout: DiskReader
    source: Source
    sinks: tuple[Connection, ...]
    prover: VerifyFilter
    most: int

    def part(self, begin: int, end: int) -> None:
        """Copy a part of the disk. With `force` what can't be read becomes zeroes."""
        self.readout.stop.check()
        failed = self._copy(_part(self.source, begin, end, self.most), self.prover, self.readout.progress)
        # A request is a mebibyte; which of its clusters can't be read is found out one by one.
        single = [one for extent in failed for one in extents.pieces(extent, CLUSTER_BYTES)]
        for extent in self._copy(single, self.prover):
            self.blank(extent)
            self.readout.damaged.append((extent.offset, extent.length))

    def blank(self, extent: Extent) -> None:
        """Write zeroes."""
        self._copy([Extent(extent.offset, extent.length, zero=True)] if extent.length else [], None)

    def _copy(
        self,
        wanted: Iterable[Extent],
        prover: VerifyFilter | None,
        progress: Callable[[int], None] = lambda _done_bytes: None,
    ) -> list[Extent]:
        """Copy extents; returns the pieces that can't be read, if that is borne with."""
        failed: list[Extent] = []

        def unreadable(extent: Extent) -> None:
            if not self.readout.force:
                raise self.readout.lost([(extent.offset, extent.length)])
            failed.append(extent)

        check = self.readout.stop.check
        Copy(
            self.source,
            self.sinks,
            TokenBucket(None),
            check,
            progress,
            sieve=prover,
            unreadable=unreadable,
        ).run(wanted)
        return failed


def said(ranges: Sequence[Range]) -> str:
    """Say which bytes, the first few at least."""
    shown = ", ".join(f"{offset}-{offset + length - 1}" for offset, length in ranges[:_SHOWN])
    return f"bytes {shown}" + (f" and {len(ranges) - _SHOWN} ranges more" if len(ranges) > _SHOWN else "")


def _part(source: Source, begin: int, end: int, most: int) -> Iterator[Extent]:
    """Yield a part of the disk in whole clusters, no extent longer than `most` bytes."""
    for extent in cluster_map.all_extents(source):
        first, last = max(extent.offset, begin), min(extent.end, end)
        if first < last:
            yield from extents.pieces(Extent(first, last - first, extent.zero), most)
