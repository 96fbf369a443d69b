# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading one disk of a point from the repository; each cluster is compared with its digest on the way.

::

    chain of layers ─► compared ─► an image, a raw file or a device
                           └─────► a stream of bytes

What does not match its digest is refused; with `allow_damage` it is written, and reported.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from backupctl.cancel import Cancellation
from backupctl.digests import clusters
from backupctl.digests.clusters import Clusters, EffectiveContent
from backupctl.errors import DamageFound, ReadFailed, RepositoryUnreadable
from backupctl.images.create import ImageFormat
from backupctl.images.open_image import OpenImage
from backupctl.names import PointId, VmName
from backupctl.operations import chain_reader, endpoints
from backupctl.operations.chain_reader import ChainReader
from backupctl.repository import chain
from backupctl.repository.chain import Layer
from backupctl.sizes import Range
from backupctl.system.threads import Workers
from backupctl.transfer import batch
from backupctl.transfer.batch import Part
from backupctl.transfer.copy import Copy
from backupctl.transfer.sink import Sink
from backupctl.transfer.stream import stream
from backupctl.transfer.verify_filter import VerifyFilter

_HEAD_CLUSTERS = 16
_ALLOW_DAMAGE = (
    "verify lists everything that is damaged; restore --allow-damage writes damaged data as well "
    "(--force only overwrites an existing target)"
)
_GIVEN_UP = "the restore was aborted; what it wrote is removed or incomplete"
_DEVICE_ZERO_CLUSTERS = 128  # on a device without a zero command they are written as data
_SHOWN = 4


@dataclass
class DiskReader:
    """The reading of one disk. layers: newest first. progress: called with the bytes done, of `size`.

    damaged: ranges that were written although they do not match their digests. unverified: why nothing could
    be compared, "" if everything was.
    """

    vm: VmName
    point: PointId
    layers: tuple[Layer, ...]
    stop: Cancellation
    progress: Callable[[int], None]
    allow_damage: bool = False
    damaged: list[Range] = field(default_factory=list, init=False)
    unverified: str = field(default="", init=False)

    @property
    def size(self) -> int:
        """The disk's virtual size in bytes."""
        return self.layers[0].entry.size

    def into_image(self, target: OpenImage, image_format: ImageFormat, *, onto_device: bool) -> None:
        """Write into an empty file, sparsely, or over all of a device.

        Raises DamageFound, ReadFailed, WriteFailed, RepositoryError, Interrupted.
        """
        verify = VerifyFilter(self._expected(), self._on_mismatch, self.size, zeroes=onto_device)
        with (
            self._source() as source,
            endpoints.write_target(
                target, image_format, self.size, self.stop.check, onto_device=onto_device
            ) as sink,
            Workers(chain_reader.WORKERS) as workers,
        ):
            count = clusters.count(self.size)
            head = min(_HEAD_CLUSTERS, count) if onto_device else 0
            zero_clusters = _DEVICE_ZERO_CLUSTERS if onto_device else batch.ZERO_CLUSTERS
            pipeline = _Pipeline(self, source, sink, verify, zero_clusters, workers)
            # The start of a device, with its partition table, stays zeroes until everything else is written:
            # otherwise a device whose restore was given up halfway would look complete.
            pipeline.write_zeroes(np.arange(head, dtype=np.uint64))
            pipeline.copy(head, count)
            pipeline.copy(0, head)
        self.damaged.sort()

    def into_stream(self, descriptor: int) -> None:
        """Write all bytes in order to a descriptor. Raises as `into_image`."""
        verify = VerifyFilter(self._expected(), self._on_mismatch, self.size, zeroes=True)
        with self._source() as source:
            stream(
                source,
                source.parts(),
                descriptor,
                check=self.stop.check,
                progress=self.progress,
                filter_records=verify,
            )

    @contextmanager
    def _source(self) -> Iterator[ChainReader]:
        with endpoints.read_chain(self.layers) as source:
            try:
                yield source
            except ReadFailed as err:
                self._raise_refused(source)
                raise DamageFound(
                    f"cannot read {self.layers[0].entry.name} of {self.vm} at {self.point}: {err.message}",
                    state=_GIVEN_UP,
                    hint=_ALLOW_DAMAGE,
                    next_command=self._verify_command(),
                ) from err

    def _expected(self) -> EffectiveContent | None:
        try:
            return chain.effective_content(self.layers, self.size)
        except (DamageFound, RepositoryUnreadable) as err:
            if not self.allow_damage:
                raise err.add(
                    state="nothing was written", hint=_ALLOW_DAMAGE, next_command=self._verify_command()
                ) from err
            self.unverified = err.message
            return None

    def _on_mismatch(self, ranges: Sequence[Range]) -> None:
        if not self.allow_damage:
            raise self._damage(ranges)
        self.damaged += ranges

    def on_unreadable(self, source: ChainReader, numbers: Clusters) -> None:
        """Refuse what cannot be read, unless damage is allowed. Raises DamageFound, RepositoryUnreadable."""
        if not self.allow_damage:
            self._raise_refused(source)
            raise self._damage(clusters.ranges(numbers, self.size))

    def _raise_refused(self, source: ChainReader) -> None:
        """Raise RepositoryUnreadable if the operating system refused to read an image: not damage then."""
        if source.refused is not None:
            raise source.refused.add(state=_GIVEN_UP, hint=_ALLOW_DAMAGE, next_command=self._verify_command())

    def _damage(self, ranges: Sequence[Range]) -> DamageFound:
        return DamageFound(
            f"{self.layers[0].entry.name} of {self.vm} at {self.point} is damaged: {format_ranges(ranges)} "
            "are not what was read from the VM",
            state=_GIVEN_UP,
            hint=_ALLOW_DAMAGE,
            next_command=self._verify_command(),
        )

    def _verify_command(self) -> str:
        return f"backupctl verify {self.vm} {self.point}"


@dataclass(frozen=True)
class _Pipeline:
    """What is copied from where to where. zero_clusters: as for Copy."""

    reader: DiskReader
    source: ChainReader
    sink: Sink
    verify: VerifyFilter
    zero_clusters: int
    workers: Workers

    def copy(self, first: int, stop: int) -> None:
        """Copy some neighbours. With `allow_damage` what cannot be read becomes zeroes."""
        self.reader.stop.check()
        lost: list[Clusters] = []

        def on_unreadable(numbers: Clusters) -> None:
            self.reader.on_unreadable(self.source, numbers)
            lost.append(numbers)

        Copy(
            self.source,
            self.sink,
            check=self.reader.stop.check,
            progress=self.reader.progress,
            filter_records=self.verify,
            on_unreadable=on_unreadable,
            zero_clusters=self.zero_clusters,
            workers=self.workers,
        ).run(_within(self.source.parts(), first, stop))
        for numbers in lost:
            self.write_zeroes(numbers)
            self.reader.damaged += clusters.ranges(numbers, self.reader.size)

    def write_zeroes(self, numbers: Clusters) -> None:
        """Write zeroes."""
        Copy(
            self.source,
            self.sink,
            check=self.reader.stop.check,
            zero_clusters=self.zero_clusters,
            workers=self.workers,
        ).run([Part(numbers, zero=True)])


def format_ranges(ranges: Sequence[Range]) -> str:
    """Return which bytes these are; of many ranges only the first few."""
    shown = ", ".join(f"{offset}-{offset + length - 1}" for offset, length in ranges[:_SHOWN])
    return f"bytes {shown}" + (f" and {len(ranges) - _SHOWN} more ranges" if len(ranges) > _SHOWN else "")


def _within(parts: Iterable[Part], first: int, stop: int) -> Iterator[Part]:
    """Yield what of some parts lies between two clusters."""
    for numbers, zero in parts:
        begin, end = np.searchsorted(numbers, np.array([first, stop], np.uint64)).tolist()
        yield Part(numbers[begin:end], zero)
