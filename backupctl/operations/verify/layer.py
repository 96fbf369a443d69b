# SPDX-License-Identifier: GPL-2.0-or-later
"""The proof of one layer: its image, its digest map, and whether they tell of the same bytes.

The layer is read without those below it. What is found wrong becomes a `Flaw`; nothing is raised for it.
What the operating system lets nobody read is no flaw, for it may be whole: it is `unchecked`. QEMU has one
error for both, so where it can't read something the file is read through, without QEMU.
"""

import secrets
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from backupctl.cancel import Cancellation
from backupctl.digests import clusters, digest_map
from backupctl.digests.clusters import CLUSTER_BYTES, EffectiveContent, Records
from backupctl.digests.digest_map import DigestMap
from backupctl.errors import DamageFound, ReadFailed, RepositoryError, RepositoryUnreadable
from backupctl.images import create, nbd_server
from backupctl.images.open_image import OpenImage
from backupctl.repository.chain import Layer
from backupctl.system import safe_open
from backupctl.transfer import read_layer
from backupctl.transfer.read_layer import Clusters
from backupctl.transfer.source import Source

Kind = Literal["manifest", "history", "chain", "image", "digests", "data"]

_BLOCK = 16  # clusters: a sample is taken in mebibytes, since a disk seeks as long as it reads one
_CONNECTIONS = 2
_NONE: Clusters = np.empty(0, np.uint64)


@dataclass(frozen=True)
class VerifyScope:
    """How deep to look. data: read it at all. percent: of it, a sample if below 100. seed: of the sample."""

    data: bool = True
    percent: float = 100.0
    seed: int = field(default_factory=lambda: secrets.randbits(32))


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a layer.

    clusters: the damaged ones, ascending; none if its data can still be read right; None if nothing of it
    can be trusted.
    """

    kind: Kind
    path: Path
    message: str
    clusters: Clusters | None


class LayerCheck:
    """The proof of a layer; `run` does it.

    held: its digest map, or why it can't be had. merging: a prune was overwriting the image. chance: chooses
    the sample.
    """

    def __init__(
        self,
        layer: Layer,
        held: DigestMap | DamageFound | RepositoryUnreadable,
        depth: VerifyScope,
        chance: np.random.Generator,
        stop: Cancellation,
        *,
        merging: bool,
    ) -> None:
        self.flaws: list[Problem] = []
        self.notes: list[str] = []
        self.unchecked: list[str] = []
        self.read_bytes = 0
        self._layer = layer
        self._held = held
        self._depth = depth
        self._chance = chance
        self._stop = stop
        self._merging = merging

    def run(self, progress: Callable[[int], None]) -> None:
        """Look at everything. progress: told the bytes of data read. Raises Interrupted."""
        try:
            self._run(progress)
        except RepositoryUnreadable as err:
            self.unchecked.append(err.message)

    def _run(self, progress: Callable[[int], None]) -> None:
        try:
            image = self._layer.open_unchecked()
        except DamageFound as err:
            self._flaw("image", err.message, None)
            return
        with image:
            if self._opens(image):
                self._prove(image, progress)

    def _prove(self, image: OpenImage, progress: Callable[[int], None]) -> None:
        self._check_tables(image)
        if isinstance(self._held, DamageFound):
            self._flaw("digests", self._held.message, None, digest_map.path_of(self._layer.path))
            return
        if isinstance(self._held, RepositoryUnreadable):
            raise self._held
        try:
            self._compare(image, self._held.records, progress)
        except RepositoryUnreadable:
            raise
        except (ReadFailed, RepositoryError) as err:
            self._prove_readable()
            self._flaw("image", f"{self._layer.path} can't be read: {err.message}", None)

    def _opens(self, image: OpenImage) -> bool:
        """Check the image's header; whether QEMU can open it without harm.

        One that was cut off can be: its data tells what is lost.
        """
        try:
            if self._merging:
                self.notes.append(f"{image.path}: a prune has not ended yet; the next one goes on with it")
                image.header()
            else:
                self._layer.check_open(image)
            return True
        except DamageFound as err:
            self._flaw("image", err.message, None)
        try:
            return image.header().size == self._layer.entry.size
        except DamageFound:
            return False

    def _check_tables(self, image: OpenImage) -> None:
        path = self._layer.path
        tables = create.check(image)
        if tables.leaks:
            self.notes.append(f"{path}: {tables.leaks} clusters that nothing uses: no harm")
        if tables.errors:
            self._prove_readable()
            self._flaw("image", f"{path}: qemu-img check: {tables.message}", _NONE)

    def _compare(self, image: OpenImage, records: Records, progress: Callable[[int], None]) -> None:
        """Compare what the layer stores with its digest map."""
        named = records["cluster"]
        with (
            nbd_server.serve((image,)) as address,
            closing(
                Source.connect([address] * _CONNECTIONS, nbd_server.EXPORT, depth=True, borne=True)
            ) as source,
        ):
            data, zero = read_layer.stored(source)
            stored = np.concatenate([data, zero])
            blank = np.intersect1d(zero, named[~clusters.is_zero(records)], assume_unique=True)
            self._spoilt("missing from the image", np.setdiff1d(named, stored))
            self._spoilt("stored, but not by us", np.setdiff1d(stored, named))
            self._spoilt("stored as zeroes, which they were not", blank)
            if self._depth.data:
                wanted = self._sample(np.intersect1d(data, named, assume_unique=True))
                self._compare_data(records, source, wanted, progress)

    def _compare_data(
        self, records: Records, source: Source, wanted: Clusters, progress: Callable[[int], None]
    ) -> None:
        size = self._layer.entry.size
        expected = EffectiveContent([(records, size)], size)
        differing = [_NONE]

        def look(found: Records) -> None:
            should = expected.window(int(found["cluster"][0]), len(found))
            differing.append(found["cluster"][clusters.differ(found, should)])

        lost = read_layer.read(source, wanted, look, check=self._stop.check, progress=progress)
        self.read_bytes += len(wanted) * CLUSTER_BYTES
        self._spoilt("not what was read from the VM", np.sort(np.concatenate(differing)))
        if len(lost):
            self._prove_readable()
        self._spoilt("can't be read", lost)

    def _prove_readable(self) -> None:
        """Raise RepositoryUnreadable if the operating system can't read the image either."""
        safe_open.prove_readable(self._layer.path, self._stop.check)

    def _sample(self, stored: Clusters) -> Clusters:
        """Choose a sample by mebibytes, at least one."""
        if self._depth.percent >= 100 or not len(stored):
            return stored
        blocks = np.unique(stored // _BLOCK)
        count = max(1, round(len(blocks) * self._depth.percent / 100))
        chosen = self._chance.choice(blocks, count, replace=False)
        return stored[np.isin(stored // _BLOCK, chosen)]

    def _spoilt(self, what: str, damaged: Clusters) -> None:
        if len(damaged):
            number = f"{len(damaged)} {'cluster' if len(damaged) == 1 else 'clusters'}"
            self._flaw("data", f"{self._layer.path}: {number} {what}", damaged)

    def _flaw(self, kind: Kind, message: str, damaged: Clusters | None, path: Path | None = None) -> None:
        self.flaws.append(Problem(kind, path or self._layer.path, message, damaged))
