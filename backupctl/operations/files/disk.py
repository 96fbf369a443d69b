# SPDX-License-Identifier: GPL-2.0-or-later
"""A disk at a point as a device: each cluster is compared with its digest before a byte of it is used."""

from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from backupctl.digests import clusters, hashing
from backupctl.digests.clusters import EffectiveContent
from backupctl.errors import DamageFound, ReadFailed
from backupctl.filesystems.device import check_bounds
from backupctl.images.layered_image import LayeredImage
from backupctl.sizes import CLUSTER_BYTES
from backupctl.system.direct_io import aligned

_KEPT_CLUSTERS = 256
_BATCH_CLUSTERS = 16


class PointDisk:
    """A Device. expected: what the digests say of it. check: called before each read; may raise to stop.

    name: of the disk and its point, for messages.
    """

    def __init__(
        self, name: str, image: LayeredImage, expected: EffectiveContent, check: Callable[[], None]
    ) -> None:
        self.size = image.size
        self._name = name
        self._image = image
        self._expected = expected
        self._check = check
        self._buffer = aligned(_BATCH_CLUSTERS * CLUSTER_BYTES)
        self._kept: OrderedDict[int, bytes] = OrderedDict()

    def read(self, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes.

        Raises FilesystemError beyond the end, DamageFound for what does not match its digest,
        RepositoryUnreadable.
        """
        check_bounds(self.size, offset, length)
        if not length:
            return b""
        first, stop = offset // CLUSTER_BYTES, -(-(offset + length) // CLUSTER_BYTES)
        found = bytearray()
        for begin in range(first, stop, _BATCH_CLUSTERS):
            found += self._clusters(begin, min(stop, begin + _BATCH_CLUSTERS))
        skipped = offset - first * CLUSTER_BYTES
        return bytes(memoryview(found)[skipped : skipped + length])

    def _clusters(self, first: int, stop: int) -> bytes:
        if stop - first > 1:
            return self._verified(first, stop)
        if first not in self._kept:
            self._kept[first] = self._verified(first, stop)
            if len(self._kept) > _KEPT_CLUSTERS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(first)
        return self._kept[first]

    def _verified(self, first: int, stop: int) -> bytes:
        self._check()
        numbers = np.arange(first, stop, dtype=np.uint64)
        content = self._buffer[: (stop - first) * CLUSTER_BYTES]
        try:
            self._image.read(numbers, content)
        except ReadFailed as err:
            if self._image.refused is not None:
                raise self._image.refused from err
            raise DamageFound(f"cannot read {self._name}: {err.message}") from err
        found = hashing.of_clusters(numbers, content)
        wrong = found["cluster"][clusters.differ(found, self._expected.of(numbers))]
        if len(wrong):
            begin, length = clusters.ranges(wrong, self.size)[0]
            raise DamageFound(
                f"{self._name} is damaged: bytes {begin}-{begin + length - 1} "
                "are not what was read from the VM"
            )
        return bytes(content)
