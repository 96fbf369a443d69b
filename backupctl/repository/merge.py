# SPDX-License-Identifier: GPL-2.0-or-later
"""Merging a layer into the one below it, so that a dropped point's layer goes and no content is lost.

::

    before   N ──► D ──► P      D is retired, N the only layer that stands on it
    after    N ───────► P       N's image is D's with what N stored written over it

    1 mark      D/<disk>.merging is put: D's manifest need no longer be true
    2 write     what N stores goes into D's image, in place; N masks each cluster meanwhile
    3 describe  the merged digest map is laid ready, and N's manifest gets a second description, `merged`
    4 switch    the image is renamed over N's, then the map, then the manifest says only what is

After each step, and after a death within one, every reader of N sees the same bytes: up to the rename
through N's old image, from then on in the new one, and the image's backing link tells which it is. Steps
1 and 2 may be done again and again, and then begin with what is on the disk of D's image; once 3 is done
only 4 is left. Step 2 is the caller's (bytes are moved by another room).

A disk that grew from D to N while P holds something where D had ended already can't be written in place:
the moment D's image grows, P would show through. Nor can an image that has a second name: whoever made
that hard link (`cp -al`, `rsync --link-dest`) means to have a copy. Nor one whose own tables are damaged:
where they call a cluster free that is not, QEMU would write over it. Then the merged image is a new file in
N's folder, made of both layers, and takes the place of D's in step 4.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from backupctl.digests import clusters, digest_map
from backupctl.digests.clusters import CLUSTER_BYTES, EffectiveContent, Records
from backupctl.errors import DamageFound, RepositoryError, WriteFailed
from backupctl.images import create, qcow2_header
from backupctl.images.open_image import OpenImage
from backupctl.repository import chain, history, markers
from backupctl.repository import manifest as manifests
from backupctl.repository.chain import Layer, backing_of
from backupctl.repository.history import Deed
from backupctl.repository.manifest import DiskEntry, Manifest, Merged
from backupctl.repository.point import Point
from backupctl.sizes import WINDOW_CLUSTERS
from backupctl.system import durable, safe_open


@dataclass(frozen=True)
class Merge:
    """One merge; `of` decides how. layers: N, D, and what is below, newest first. point: N's.

    in_place: D's own image takes N's clusters; otherwise `image` is a new one. Decided once: a hard link
    that somebody makes meanwhile must not change it half-way.
    """

    point: Point
    layers: tuple[Layer, ...]
    in_place: bool

    @classmethod
    def of(cls, point: Point, layers: tuple[Layer, ...]) -> Self:
        """Look at what is to be merged. Raises DamageFound, WriteFailed, RepositoryError."""
        upper, lower, *below = layers
        with safe_open.unreadable(lower.path):
            try:
                names = lower.path.lstat().st_nlink
            except FileNotFoundError as err:
                raise DamageFound(f"{lower.path} can't be looked at: {err.strerror}") from err
        fits = names == 1 and (not below or upper.entry.size <= lower.entry.size)
        with lower.open() as image:
            if lower.merging:
                _forget(lower.path)
            return cls(point, layers, fits and not create.check(image).errors)

    @property
    def upper(self) -> Layer:
        """The layer that is merged."""
        return self.layers[0]

    @property
    def lower(self) -> Layer:
        """The layer that takes it in."""
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
        """The backing link of the merged image, "" for none."""
        return backing_of(self.lower.entry)

    @contextmanager
    def mark(self) -> Iterator[OpenImage]:
        """Do step 1, and give an image to write to. Raises WriteFailed, DamageFound, RepositoryError."""
        _remove(_new_image(self.upper.path))
        if not self.in_place:
            with create.new_layer(self.image, self.size, self.backing or None) as image:
                yield image
            return
        with self.lower.open(writable=True) as image:
            markers.put(self.lower.path.parent, markers.merging(self.lower.entry.name))
            if image.header().size < self.size:
                create.resize(image, self.size)
            yield image

    def abandon(self) -> None:
        """Give step 2 up: of a new image nothing stays. What D's own has got, it gets again next time."""
        if not self.in_place:
            with suppress(OSError):
                self.image.unlink()

    def cut_cluster(self, image: OpenImage) -> tuple[int, int] | None:
        """Return the rest of a cluster that D's larger image would keep behind the new end: offset, length.

        It must be zeroes before the image is cut: it would come back when the disk grows again.
        """
        rest = -self.size % CLUSTER_BYTES
        records = self.upper.digests().records
        ends_in = len(records) and int(records["cluster"][-1]) == clusters.count(self.size) - 1
        if not (rest and ends_in):
            return None
        room = image.header().size - self.size
        return (self.size, min(rest, room)) if room > 0 else None

    def describe(self, image: OpenImage) -> Point:
        """Do step 3, when all bytes are written and flushed; returns N with both descriptions.

        Raises WriteFailed, DamageFound, RepositoryError.
        """
        if image.header().size > self.size:
            create.resize(image, self.size)
        ready = digest_map.merged_path_of(self.upper.path)
        _remove(ready)
        count = sum(len(part) for part in self.records())
        checksum = digest_map.write_parts(ready, self.size, count, self.records)
        _sync_folder(ready.parent)
        with safe_open.unreadable(self.image):
            stored = image.stat()
        merged = Merged(self.lower.entry.parent, stored.st_size, stored.st_blocks * 512, checksum)
        entry = replace(self.upper.entry, merged=merged)
        return rewrite(self.point, self.point.manifest.with_disk(entry))

    def written(self) -> Iterator[Records]:
        """Yield the records of what step 2 writes: N's, or into a new image both. Raises DamageFound."""
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
        """Return zeroes for what D ended before, and P has: the merged layer must hide it."""
        shown = below.window(first, min(WINDOW_CLUSTERS, clusters.count(self.size) - first))
        ended = shown["cluster"] >= clusters.count(self.lower.entry.size)
        found = np.array(shown[ended & ~clusters.is_zero(shown)])
        found["low"] = found["high"] = 0
        return found


def unfinished(lower: Point, upper: Point, above: Sequence[Point], disk: str) -> bool:
    """Whether a merge of `upper` into `lower` must wait for another one that is not at its end.

    above: the points that stand on `upper`. A merge that was described holds the only copy of N's content
    in D's image, and that image's name in N's manifest; one that was begun has made D's content something
    else. So neither may D take part in a second merge before, nor N.
    """
    entries = [point.manifest.disk(disk) for point in (lower, upper, *above)]
    return any(entry and entry.merged for entry in entries) or markers.has(upper.path, markers.merging(disk))


def swap_images(point: Point, entry: DiskEntry) -> Point:
    """Do step 4 for a disk whose manifest has both descriptions, or what is left of it; returns N.

    The caller keeps readers away from N, and from D. Raises RepositoryError; DamageFound if what lies in
    D's place is not the merged image: then nothing is moved.
    """
    image = point.path / f"{entry.name}.qcow2"
    after = entry.after_merge()
    try:
        if qcow2_header.read(image).backing != backing_of(after):
            made = _made(point, entry)
            Layer(made, after).check_as_stored()
            _move(made, image)
        ready = digest_map.merged_path_of(image)
        if ready.exists():
            _move(ready, digest_map.path_of(image))
    except OSError as err:
        raise RepositoryError(f"{image} can't be exchanged: {err.strerror}") from err
    return rewrite(point, point.manifest.with_disk(after))


def detach_from(points: Iterable[Point], gone: Point) -> None:
    """Have no point named as built on one whose layers nobody needs any more. Raises RepositoryError."""
    for point in points:
        if point.manifest.parent == gone.id:
            parents = [entry.parent for entry in point.manifest.disks if entry.parent]
            parent = max(parents, default=None)
            kind: manifests.PointKind = "incremental" if parent else "full"
            rewrite(point, replace(point.manifest, parent=parent, kind=kind))


def rewrite(point: Point, manifest: Manifest) -> Point:
    """Replace a point's manifest, at once and durably. Raises RepositoryError."""
    history.record(point.path.parent, Deed("changing", point.id, manifest.checksum))
    try:
        durable.replace(point.path / manifests.FILE_NAME, manifest.to_json())
    except OSError as err:
        raise RepositoryError(f"{point.path} can't be written: {err.strerror}") from err
    history.record(point.path.parent, Deed("changed", point.id, manifest.checksum))
    return replace(point, manifest=manifest)


def _made(point: Point, entry: DiskEntry) -> Path:
    """Return the merged image that waits to take its place."""
    new = _new_image(point.path / f"{entry.name}.qcow2")
    return new if new.exists() else point.path.parent / str(entry.parent) / f"{entry.name}.qcow2"


def _new_image(path: Path) -> Path:
    return path.with_suffix(".qcow2.merged")


def _within(records: Records, first: int, size_bytes: int) -> Records:
    """Return the records of one window."""
    last = min(first + WINDOW_CLUSTERS, clusters.count(size_bytes))
    numbers = records["cluster"]
    # Not numpy's searchsorted: it copies a column of a mapped file before it looks.
    begin = bisect_left(numbers, first)
    return np.array(records[begin : bisect_left(numbers, last, lo=begin)])


def _move(source: Path, target: Path) -> None:
    """Rename over a file, durably: first where it is now, then where it was."""
    source.rename(target)
    durable.sync_folder(target.parent)
    if source.parent != target.parent:
        durable.sync_folder(source.parent)


def _remove(path: Path) -> None:
    """Remove what a dead prune left. Raises WriteFailed."""
    try:
        durable.remove(path)
    except OSError as err:
        raise WriteFailed(f"{path} can't be removed: {err.strerror}") from err


def _forget(path: Path) -> None:
    """Have an image read from the disk.

    The merge that did not end may have met a sync that failed. Then its tables lie in memory as if they had
    been written: QEMU would leave them so, and the next sync succeed without them.
    """
    try:
        durable.sync_and_forget(path)
    except OSError as err:
        raise WriteFailed(f"{path} can't be brought to the disk: {err.strerror}") from err


def _sync_folder(path: Path) -> None:
    try:
        durable.sync_folder(path)
    except OSError as err:
        raise WriteFailed(f"{path} can't be brought to the disk: {err.strerror}") from err
