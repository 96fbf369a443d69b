# SPDX-License-Identifier: GPL-2.0-or-later
"""The check of one layer: its image, its digest map, and whether both describe the same bytes.

The layer is read without those below it, and without QEMU. What is found wrong becomes a `Problem`; it is not
raised. What the operating system cannot read is not a problem of the layer, which may be sound: it is
`unchecked`.
"""

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from backupctl.cancel import Cancellation
from backupctl.digests import clusters, digest_map
from backupctl.digests.clusters import CLUSTER_BYTES, Clusters, EffectiveContent, Records
from backupctl.digests.digest_map import DigestMap
from backupctl.errors import DamageFound, RepositoryUnreadable
from backupctl.images import qcow2_check
from backupctl.images.layered_image import LayeredImage
from backupctl.images.open_image import OpenImage
from backupctl.operations.chain_reader import ChainReader
from backupctl.operations.verify.stored import Stored, joined
from backupctl.repository.chain import Layer
from backupctl.system import files, safe_open
from backupctl.system.threads import Workers
from backupctl.transfer import read_layer
from backupctl.transfer.batch import Part

Kind = Literal["manifest", "history", "chain", "image", "digests", "data", "definition"]

_NONE: Clusters = np.empty(0, np.uint64)


@dataclass(frozen=True)
class VerifyScope:
    """How much to verify. data: read it. percent: of the data; a sample if below 100. seed: of the sample."""

    data: bool = True
    percent: float = 100.0
    seed: int = field(default_factory=lambda: secrets.randbits(32))

    @property
    def is_whole(self) -> bool:
        """Whether every byte is read."""
        return self.data and self.percent >= 100


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a layer.

    clusters: the damaged ones, ascending; none if all its data can still be read correctly; None if nothing
    of it can be trusted.
    """

    kind: Kind
    path: Path
    message: str
    clusters: Clusters | None


@dataclass
class LayerReport:
    """What the check of a layer found. notes: harmless. unchecked: what could not be read."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    read_bytes: int = 0


@dataclass(frozen=True)
class LayerCheck:
    """The check of a layer; `run` does it.

    digests: its digest map, or why that cannot be read. merging: a prune was overwriting the image.
    rng: chooses the sample. workers: read.
    """

    layer: Layer
    digests: DigestMap | DamageFound | RepositoryUnreadable
    scope: VerifyScope
    rng: np.random.Generator
    stop: Cancellation
    merging: bool
    workers: Workers
    report: LayerReport = field(default_factory=LayerReport, init=False)

    def run(self, progress: Callable[[int], None]) -> LayerReport:
        """Check everything. progress: called with the bytes of data read. Raises Interrupted."""
        try:
            self._run(progress)
        except RepositoryUnreadable as err:
            self.report.unchecked.append(err.message)
        return self.report

    def _run(self, progress: Callable[[int], None]) -> None:
        try:
            image = self.layer.open_unchecked()
        except DamageFound as err:
            self._add("image", err.message, None)
            return
        with image:
            if self._can_be_opened(image):
                self._check(image, progress)

    def _check(self, image: OpenImage, progress: Callable[[int], None]) -> None:
        self._check_tables(image)
        if isinstance(self.digests, DamageFound):
            self._add("digests", self.digests.message, None, digest_map.path_of(self.layer.path))
            return
        if isinstance(self.digests, RepositoryUnreadable):
            raise self.digests
        try:
            self._compare(image, self.digests.records, progress)
        except DamageFound as err:
            self._add("image", err.message, None)

    def _can_be_opened(self, image: OpenImage) -> bool:
        """Check the image's header; returns whether the image can be read.

        A truncated image can be opened: reading its data shows what is lost.
        """
        try:
            if self.merging:
                self.report.notes.append(f"{image.path}: an unfinished prune; the next prune continues it")
                image.header()
            else:
                self.layer.check_open(image)
            return True
        except DamageFound as err:
            self._add("image", err.message, None)
        try:
            return image.header().size == self.layer.entry.size
        except DamageFound:
            return False

    def _check_tables(self, image: OpenImage) -> None:
        path = self.layer.path
        tables = qcow2_check.check_tables(image, self.stop.check)
        if tables.leaks:
            self.report.notes.append(f"{path}: {tables.leaks} leaked clusters (harmless)")
        if tables.errors:
            self._add("image", f"{path}: {tables.message}", _NONE)

    def _compare(self, image: OpenImage, records: Records, progress: Callable[[int], None]) -> None:
        """Compare what the layer stores with its digest map. Raises RepositoryUnreadable, DamageFound."""
        with safe_open.unreadable(image.path):
            holes = files.holes(image.descriptor)
        with LayeredImage((image,)) as disk:
            stored = Stored(disk, records, holes, self.stop.check)
            found = stored.compare()
            self._add_damage("missing from the image", found.missing)
            self._add_damage("stored, but not in the digest map", found.unnamed)
            self._add_damage("read as zeroes but should contain data", found.zeroed)
            lost = found.lost
            if self.scope.data and found.data_clusters:
                blocks = self._sample(joined(found.blocks))
                lost = [*lost, self._compare_data(records, disk, stored.data(blocks), progress)]
                if disk.refused is not None:
                    raise disk.refused
            self._add_damage("unreadable", lost)

    def _compare_data(
        self,
        records: Records,
        disk: LayeredImage,
        wanted: Iterable[Part],
        progress: Callable[[int], None],
    ) -> Clusters:
        """Read data and compare it with its digests; returns what cannot be read."""
        size = self.layer.entry.size
        expected = EffectiveContent([(records, size)], size)
        differing: list[Clusters] = []
        counts: list[int] = []  # a sum would be changed by several threads at once

        def compare(found: Records) -> None:
            counts.append(len(found))
            wrong = clusters.differ(found, expected.of(found["cluster"]))
            if wrong.any():
                differing.append(found["cluster"][wrong])

        with ChainReader(disk) as reader:
            lost = read_layer.read(
                reader, wanted, compare, check=self.stop.check, progress=progress, workers=self.workers
            )
        self.report.read_bytes += sum(counts) * CLUSTER_BYTES
        self._add_damage("not what was read from the VM", differing)
        return lost

    def _sample(self, blocks: Clusters) -> Clusters | None:
        """Choose a sample of whole MiB, at least one; None for all."""
        if self.scope.percent >= 100:
            return None
        count = max(1, round(len(blocks) * self.scope.percent / 100))
        return np.sort(self.rng.choice(blocks, count, replace=False))

    def _add_damage(self, what: str, parts: list[Clusters]) -> None:
        damaged = np.sort(joined(parts))
        if len(damaged):
            number = f"{len(damaged)} {'cluster' if len(damaged) == 1 else 'clusters'}"
            self._add("data", f"{self.layer.path}: {number} {what}", damaged)

    def _add(self, kind: Kind, message: str, damaged: Clusters | None, path: Path | None = None) -> None:
        self.report.problems.append(Problem(kind, path or self.layer.path, message, damaged))
