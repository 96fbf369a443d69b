# SPDX-License-Identifier: GPL-2.0-or-later
"""Merging a layer into the one below it, so that a dropped point's layer goes and no content is lost.

::

    before   upper ──► lower ──► base      lower is retired, and upper is the only layer above it
    after    upper ────────────► base      upper's image is lower's, overwritten with what upper stored

    1 mark      lower's marker <disk>.merging is set: its image need no longer match its manifest
    2 write     what upper stores is written into lower's image, in place; upper hides each of these clusters
    3 describe  the merged digest map is written beside upper's, and upper's manifest gets a second
                description, `merged`
    4 swap      lower's image is renamed over upper's, then the map, then the manifest keeps only the new
                description

After each step, and after a crash within one, every reader of upper sees the same bytes: until the rename
through upper's old image, after it in the new one; the backing file that the image names says which one it
is. Steps 1 and 2 can be repeated, and then start from what is on the disk of lower's image; after step 3 only
step 4 is left. Step 2 is done by the caller: transfer moves the bytes.

Three cases cannot be written in place. If the disk grew from lower to upper, and base has data beyond
lower's end, that data would become visible as soon as lower's image grows. If the image has a second hard
link (`cp -al`, `rsync --link-dest`), that copy would change. If its own tables are damaged, and call a used
cluster free, QEMU would overwrite that cluster. Then the merged image is a new file in upper's directory,
made of both layers, and step 4 renames that one over upper's.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from backupctl.digests import clusters, digest_map
from backupctl.digests.clusters import EffectiveContent, Records
from backupctl.errors import DamageFound, RepositoryError, WriteFailed
from backupctl.images import create, qcow2_check, qcow2_header
from backupctl.images.open_image import OpenImage
from backupctl.repository import chain, history, markers
from backupctl.repository import manifest as manifests
from backupctl.repository.chain import Layer, backing_of
from backupctl.repository.history import PointEvent
from backupctl.repository.manifest import DiskEntry, Manifest, Merged
from backupctl.repository.point import Point
from backupctl.sizes import WINDOW_CLUSTERS
from backupctl.system import durable, safe_open


@dataclass(frozen=True)
class Merge:
    """One merge; `of` decides how. layers: upper, lower, and those below, newest first. point: upper's.

    in_place: upper's clusters are written into lower's image; otherwise `image` is a new file.
    """

    point: Point
    layers: tuple[Layer, ...]
    in_place: bool

    @classmethod
    def of(cls, point: Point, layers: tuple[Layer, ...]) -> Self:
        """Decide how to merge. Raises DamageFound, WriteFailed, RepositoryError."""
        # Decided once, here: a hard link that somebody makes later must not change it half-way.
        upper, lower, *below = layers
        with safe_open.unreadable(lower.path):
            try:
                names = lower.path.lstat().st_nlink
            except FileNotFoundError as err:
                raise DamageFound(f"cannot access {lower.path}: {err.strerror}") from err
        fits = names == 1 and (not below or upper.entry.size <= lower.entry.size)
        with lower.open() as image:
            if lower.merging:
                _drop_cache(lower.path)
            return cls(point, layers, fits and not qcow2_check.check_tables(image).errors)

    @property
    def upper(self) -> Layer:
        """The layer that is merged into the one below."""
        return self.layers[0]

    @property
    def lower(self) -> Layer:
        """The layer that it is merged into."""
        return self.layers[1]

    @property
    def size(self) -> int:
        """The disk's size afterwards, in bytes."""
        return self.upper.entry.size

    @property
    def image(self) -> Path:
        """The image that will be the merged one."""
        return self.lower.path if self.in_place else _new_image(self.upper.path)

    @property
    def backing(self) -> str:
        """The backing file of the merged image, "" for none."""
        return backing_of(self.lower.entry)

    @contextmanager
    def mark(self) -> Iterator[OpenImage]:
        """Do step 1, and yield the image to write to. Raises WriteFailed, DamageFound, RepositoryError."""
        _remove(_new_image(self.upper.path))
        if not self.in_place:
            with create.new_layer(self.image, self.size, self.backing or None) as image:
                yield image
            return
        with self.lower.open(writable=True) as image:
            # Durable before the first byte is written: without the marker, lower would be called damaged.
            markers.put(self.lower.path.parent, markers.merging(self.lower.entry.name))
            if image.header().size < self.size:
                create.resize(image, self.size)
            yield image

    def abandon(self) -> None:
        """Give up step 2: a new image is removed. What was written in place is written again next time."""
        if not self.in_place:
            with suppress(OSError):
                self.image.unlink()

    def describe(self, image: OpenImage) -> Point:
        """Do step 3, after all bytes are written and flushed; returns upper's point with both descriptions.

        Raises WriteFailed, DamageFound, RepositoryError.
        """
        if image.header().size > self.size:
            create.resize(image, self.size)
        ready = digest_map.merged_path_of(self.upper.path)
        _remove(ready)
        count = sum(len(part) for part in self.records())
        checksum = digest_map.write_parts(ready, self.size, count, self.records)
        # The map is durable before the manifest names it: from then on a crash leads to step 4, which needs
        # it.
        _sync_directory(ready.parent)
        with safe_open.unreadable(self.image):
            stored = image.stat()
        merged = Merged(self.lower.entry.parent, stored.st_size, stored.st_blocks * 512, checksum)
        entry = replace(self.upper.entry, merged=merged)
        return rewrite(self.point, self.point.manifest.with_disk(entry))

    def written(self) -> Iterator[Records]:
        """Yield the records of what step 2 writes: upper's, or both for a new image. Raises DamageFound."""
        if self.in_place:
            yield self.upper.digests().records
        else:
            yield from self.records()

    def records(self) -> Iterator[Records]:
        """Yield the records of the merged layer, ascending, a window at a time. Raises DamageFound."""
        lower, upper = self.lower.digests().records, self.upper.digests().records
        below = None if self.in_place else chain.effective_content(self.layers[2:], self.size)
        for first in range(0, clusters.count(self.size), WINDOW_CLUSTERS):
            part = _within(lower, first, self.size)
            if below is not None:
                part = clusters.overlay(self._hidden(below, first), part, self.size)
            found = clusters.overlay(part, _within(upper, first, self.size), self.size)
            if len(found):
                yield found

    def _hidden(self, below: EffectiveContent, first: int) -> Records:
        """Return zeroes for what base has beyond lower's end: the merged layer must hide it."""
        shown = below.window(first, min(WINDOW_CLUSTERS, clusters.count(self.size) - first))
        ended = shown["cluster"] >= clusters.count(self.lower.entry.size)
        found = np.array(shown[ended & ~clusters.is_zero(shown)])
        found["low"] = found["high"] = 0
        return found


def unfinished(lower: Point, upper: Point, above: Sequence[Point], disk: str) -> bool:
    """Whether a merge of `upper` into `lower` must wait for the end of another one.

    above: the points that depend on `upper`.
    """
    # After step 3 lower's image has the only copy of upper's content, and only upper's manifest says so.
    # After step 1 lower's image does not match its manifest. So neither layer may take part in a second merge
    # until the first one has ended.
    entries = [point.manifest.disk(disk) for point in (lower, upper, *above)]
    return any(entry and entry.merged for entry in entries) or markers.has(upper.path, markers.merging(disk))


def swap_images(point: Point, entry: DiskEntry) -> Point:
    """Do step 4, or the rest of it, for a disk whose manifest has both descriptions; returns the point.

    The caller holds exclusive locks on both points. Raises RepositoryError; DamageFound if the image that is
    to be moved is not the merged one: then nothing is moved.
    """
    image = point.path / f"{entry.name}.qcow2"
    after = entry.after_merge()
    try:
        if qcow2_header.read(image).backing != backing_of(after):
            made = _made(point, entry)
            # Upper's old image is gone after the rename: nothing but the merged image may take its place.
            Layer(made, after).check_as_stored()
            _move(made, image)
        ready = digest_map.merged_path_of(image)
        if ready.exists():
            # After the image: the other way round, a crash would leave a map that no image matches.
            _move(ready, digest_map.path_of(image))
    except OSError as err:
        raise RepositoryError(f"cannot replace {image}: {err.strerror}") from err
    return rewrite(point, point.manifest.with_disk(after))


def detach_from(points: Iterable[Point], gone: Point) -> None:
    """Update the parent of points that were built on a point without layers. Raises RepositoryError."""
    for point in points:
        if point.manifest.parent == gone.id:
            parents = [entry.parent for entry in point.manifest.disks if entry.parent]
            parent = max(parents, default=None)
            kind: manifests.PointKind = "incremental" if parent else "full"
            rewrite(point, replace(point.manifest, parent=parent, kind=kind))


def rewrite(point: Point, manifest: Manifest) -> Point:
    """Replace a point's manifest, atomically and durably. Raises RepositoryError."""
    # The history allows both manifests before one replaces the other: after a crash neither is reported.
    history.record(point.path.parent, PointEvent("changing", point.id, manifest.checksum))
    try:
        durable.replace(point.path / manifests.FILE_NAME, manifest.to_json())
    except OSError as err:
        raise RepositoryError(f"cannot write to {point.path}: {err.strerror}") from err
    history.record(point.path.parent, PointEvent("changed", point.id, manifest.checksum))
    return replace(point, manifest=manifest)


def _made(point: Point, entry: DiskEntry) -> Path:
    """Return the merged image that is to take upper's place."""
    new = _new_image(point.path / f"{entry.name}.qcow2")
    return new if new.exists() else point.path.parent / str(entry.parent) / f"{entry.name}.qcow2"


def _new_image(path: Path) -> Path:
    return path.with_suffix(".qcow2.merged")


def _within(records: Records, first: int, size_bytes: int) -> Records:
    """Return the records of one window."""
    last = min(first + WINDOW_CLUSTERS, clusters.count(size_bytes))
    numbers = records["cluster"]
    # Not numpy's searchsorted: it would copy a column of the mapped file first.
    begin = bisect_left(numbers, first)
    return np.array(records[begin : bisect_left(numbers, last, lo=begin)])


def _move(source: Path, target: Path) -> None:
    """Rename over a file, durably."""
    source.rename(target)
    # Its new directory first: after a power failure it may have two names, but not none.
    durable.sync_directory(target.parent)
    if source.parent != target.parent:
        durable.sync_directory(source.parent)


def _remove(path: Path) -> None:
    """Remove what a killed prune left. Raises WriteFailed."""
    try:
        durable.remove(path)
    except OSError as err:
        raise WriteFailed(str(err.strerror), subject=f"cannot remove {path}") from err


def _drop_cache(path: Path) -> None:
    """Drop an image from the page cache. Raises WriteFailed."""
    # The fsync of the unfinished merge may have failed. Then the cache has its tables as if they were
    # written: QEMU would not write them again, and the next fsync would succeed without them.
    try:
        durable.sync_and_forget(path)
    except OSError as err:
        raise WriteFailed(str(err.strerror), subject=f"cannot sync {path}") from err


def _sync_directory(path: Path) -> None:
    try:
        durable.sync_directory(path)
    except OSError as err:
        raise WriteFailed(str(err.strerror), subject=f"cannot sync {path}") from err
