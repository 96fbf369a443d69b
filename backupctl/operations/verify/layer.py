# SPDX-License-Identifier: GPL-2.0-or-later
"""The check of one layer: its image, its digest map, and whether both describe the same bytes.

The layer is read without those below it. What is found wrong becomes a `Problem`; it is not raised. What the
operating system cannot read is not a problem of the layer, which may be sound: it is `unchecked`. QEMU
reports the same error for both, so where it cannot read something the file is read without QEMU.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from backupctl.cancel import Cancellation
from backupctl.digests import clusters, digest_map
from backupctl.digests.clusters import CLUSTER_BYTES, Clusters, EffectiveContent, Records
from backupctl.digests.digest_map import DigestMap
from backupctl.errors import DamageFound, ReadFailed, RepositoryError, RepositoryUnreadable
from backupctl.images import create
from backupctl.images.open_image import OpenImage
from backupctl.operations import endpoints
from backupctl.repository.chain import Layer
from backupctl.system import safe_open
from backupctl.transfer import read_layer
from backupctl.transfer.reader import NbdReader
from backupctl.transfer.source import Source

Kind = Literal["manifest", "history", "chain", "image", "digests", "data"]

_BLOCK = 16  # clusters: a sample consists of whole MiB, since a disk seeks for as long as it reads one
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
    rng: chooses the sample.
    """

    layer: Layer
    digests: DigestMap | DamageFound | RepositoryUnreadable
    scope: VerifyScope
    rng: np.random.Generator
    stop: Cancellation
    merging: bool
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
        except RepositoryUnreadable:
            raise
        except (ReadFailed, RepositoryError) as err:
            self._require_readable_file()
            self._add("image", f"cannot read {self.layer.path}: {err.message}", None)

    def _can_be_opened(self, image: OpenImage) -> bool:
        """Check the image's header; returns whether QEMU can open the image safely.

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
        tables = create.check(image)
        if tables.leaks:
            self.report.notes.append(f"{path}: {tables.leaks} leaked clusters (harmless)")
        if tables.errors:
            self._require_readable_file()
            self._add("image", f"{path}: qemu-img check: {tables.message}", _NONE)

    def _compare(self, image: OpenImage, records: Records, progress: Callable[[int], None]) -> None:
        """Compare what the layer stores with its digest map."""
        named = records["cluster"]
        with endpoints.read_images((image,), depth=True, tolerate_errors=True) as source:
            data, zero = read_layer.stored(source)
            stored = np.concatenate([data, zero])
            zeroed = np.intersect1d(zero, named[~clusters.is_zero(records)], assume_unique=True)
            self._add_damage("missing from the image", np.setdiff1d(named, stored))
            self._add_damage("stored, but not in the digest map", np.setdiff1d(stored, named))
            self._add_damage("read as zeroes but should contain data", zeroed)
            if self.scope.data:
                wanted = self._sample(np.intersect1d(data, named, assume_unique=True))
                self._compare_data(records, source, wanted, progress)

    def _compare_data(
        self, records: Records, source: Source, wanted: Clusters, progress: Callable[[int], None]
    ) -> None:
        size = self.layer.entry.size
        expected = EffectiveContent([(records, size)], size)
        differing = [_NONE]

        def compare(found: Records) -> None:
            should = expected.of(found["cluster"])
            differing.append(found["cluster"][clusters.differ(found, should)])

        lost = read_layer.read(NbdReader(source), wanted, compare, check=self.stop.check, progress=progress)
        self.report.read_bytes += len(wanted) * CLUSTER_BYTES
        self._add_damage("not what was read from the VM", np.sort(np.concatenate(differing)))
        if len(lost):
            self._require_readable_file()
        self._add_damage("unreadable", lost)

    def _require_readable_file(self) -> None:
        """Raise RepositoryUnreadable if the operating system cannot read the image either."""
        safe_open.prove_readable(self.layer.path, self.stop.check)

    def _sample(self, stored: Clusters) -> Clusters:
        """Choose a sample of whole MiB, at least one."""
        if self.scope.percent >= 100 or not len(stored):
            return stored
        blocks = np.unique(stored // _BLOCK)
        count = max(1, round(len(blocks) * self.scope.percent / 100))
        chosen = self.rng.choice(blocks, count, replace=False)
        return stored[np.isin(stored // _BLOCK, chosen)]

    def _add_damage(self, what: str, damaged: Clusters) -> None:
        if len(damaged):
            number = f"{len(damaged)} {'cluster' if len(damaged) == 1 else 'clusters'}"
            self._add("data", f"{self.layer.path}: {number} {what}", damaged)

    def _add(self, kind: Kind, message: str, damaged: Clusters | None, path: Path | None = None) -> None:
        self.report.problems.append(Problem(kind, path or self.layer.path, message, damaged))
