# SPDX-License-Identifier: GPL-2.0-or-later
"""The chain of a disk at a point: its image, the parent's, and so on down to a full one.

It is made from the manifests, and each image must match them: format, size, and the one backing file that the
manifest's parent gives. Any other backing file could make QEMU open a file or a network address that an
attacker chose, so it is damage. The check that counts is made on the very descriptor that QEMU then gets
(`opened`): an image that was replaced after an earlier check is not opened.
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from backupctl.digests import digest_map
from backupctl.digests.clusters import EffectiveContent
from backupctl.digests.digest_map import DigestMap, Named
from backupctl.errors import UNTOUCHED, DamageFound, NoSuchPoint
from backupctl.images import qcow2_header
from backupctl.images.open_image import OpenImage
from backupctl.images.qcow2_header import Header
from backupctl.names import DiskName, PointId
from backupctl.repository import markers
from backupctl.repository.manifest import DiskEntry
from backupctl.repository.point import Point
from backupctl.repository.vm_directory import VmDirectory
from backupctl.sizes import MOST_LAYERS
from backupctl.system import safe_open

KnownPoints = Mapping[PointId, Point]
"""Points whose manifests were read under the VM's lock."""


@dataclass(frozen=True)
class Layer:
    """One link of a chain: an image, and what its manifest says of it."""

    path: Path
    entry: DiskEntry

    @classmethod
    def of(cls, point: Point, entry: DiskEntry) -> "Layer":
        """Return a disk's layer at a point; of two descriptions, the one that its image matches.

        Raises DamageFound if there are two and the image's header is damaged.
        """
        path = point.path / f"{entry.name}.qcow2"
        after = entry.after_merge()
        if after is not entry and qcow2_header.read(path).backing == backing_of(after):
            return cls(path, after)
        return cls(path, entry)

    @property
    def merging(self) -> bool:
        """Whether the layer above it, which hides what changes, is being merged into it."""
        return markers.has(self.path.parent, markers.merging(self.entry.name))

    def open(self, *, writable: bool = False) -> OpenImage:
        """Open the image, and compare its header with the manifest: QEMU then gets what was checked.

        Raises DamageFound, RepositoryUnreadable.
        """
        image = self.open_unchecked(writable=writable)
        try:
            self.check_open(image)
        except BaseException:
            image.close()
            raise
        return image

    def open_unchecked(self, *, writable: bool = False) -> OpenImage:
        """Open the image without a check of its header. Raises DamageFound, RepositoryUnreadable."""
        try:
            return OpenImage.open(self.path, writable=writable)
        except safe_open.NotThere as err:
            raise qcow2_header.missing(self.path, err) from err

    def check(self) -> None:
        """Compare the image's header with the manifest. Raises DamageFound, RepositoryError."""
        with self.open():
            pass

    def check_open(self, image: OpenImage) -> None:
        """Compare as `check` does, an image that is open. Raises DamageFound, RepositoryError."""
        if self.merging:
            self._check_link(image.header())
        else:
            self._check_as_stored(image.header())

    def check_as_stored(self) -> None:
        """Compare as `check` does, with size and length even during a merge. Raises DamageFound."""
        self._check_as_stored(qcow2_header.read(self.path))

    def _check_as_stored(self, found: Header) -> None:
        path, entry = self.path, self.entry
        if found.size != entry.size:
            raise DamageFound(f"{path}: virtual size is {found.size} bytes, manifest says {entry.size}")
        if found.file_bytes != entry.file_bytes:
            raise DamageFound(f"{path}: length is {found.file_bytes} bytes, manifest says {entry.file_bytes}")
        self._check_link(found)

    def _check_link(self, found: Header) -> None:
        wanted = backing_of(self.entry)
        if found.backing != wanted:
            raise DamageFound(
                f"{self.path}: backing file is {found.backing!r:.200}, manifest says {wanted!r}"
            )
        if found.backing_format != ("qcow2" if wanted else ""):
            raise DamageFound(f"{self.path}: backing format is {found.backing_format!r:.60}, not qcow2")

    def digests(self, check: Callable[[], None] = lambda: None) -> DigestMap:
        """Open its digest map. check: called between pieces, may raise to cancel.

        Raises DamageFound, also if it is not the map that the manifest names, RepositoryUnreadable.
        """
        path = digest_map.path_of(self.path)
        named = Named(self.entry.size, self.entry.digests)
        try:
            return DigestMap.open(path, named, check)
        except DamageFound:
            # A crash between the two renames of a merge: the image was replaced, and its map is still
            # waiting.
            ready = digest_map.merged_path_of(self.path)
            if not safe_open.there(ready):
                raise
        return DigestMap.open(ready, named, check)


def backing_of(entry: DiskEntry) -> str:
    """Return the backing file that an image must name, "" for none."""
    return f"../{entry.parent}/{entry.name}.qcow2" if entry.parent else ""


def effective_content(layers: Sequence[Layer], size: int) -> EffectiveContent:
    """Return what a disk of `size` bytes holds, from the layers' digest maps. Raises DamageFound."""
    return EffectiveContent([(layer.digests().records, layer.entry.size) for layer in layers], size)


def paths(directory: VmDirectory, point: Point, disk: str) -> tuple[Path, ...]:
    """Return the images of a disk at a point, newest first, each checked. Raises as `layers`."""
    return tuple(layer.path for layer in layers(directory, point, disk))


def layers(
    directory: VmDirectory, point: Point, disk: str, points: KnownPoints = MappingProxyType({})
) -> tuple[Layer, ...]:
    """Return the layers of a disk at a point, newest first, each image checked.

    points: as for `below`. Raises NoSuchPoint if the point does not hold the disk, DamageFound.
    """
    entry = point.manifest.disk(disk)
    if entry is None:
        raise no_such_disk(point, disk)
    return _follow(directory, point, entry, points)


@contextmanager
def opened(layers: Iterable[Layer]) -> Iterator[tuple[OpenImage, ...]]:
    """Yield the images of layers, open until the block ends, each checked by its descriptor.

    Raises DamageFound, RepositoryError.
    """
    with ExitStack() as held:
        yield tuple(held.enter_context(layer.open()) for layer in layers)


def no_such_disk(point: Point, disk: str, newest: PointId | None = None) -> NoSuchPoint:
    """Return the error for a disk that a point does not hold. newest: the newest point that holds it."""
    held = ", ".join(found.name for found in point.manifest.disks)
    elsewhere = f". The newest point with {disk} is {newest}" if newest else ""
    return NoSuchPoint(
        f"the point {point.id} has no disk {disk!r:.120}; its disks: {held}{elsewhere}", state=UNTOUCHED
    )


def below(
    directory: VmDirectory, parent: PointId | None, disk: str, points: KnownPoints = MappingProxyType({})
) -> tuple[Layer, ...]:
    """Return the chain that would be below a new layer on `parent`; empty for a full.

    points: those whose manifests need not be read again. Raises as `layers`.
    """
    return () if parent is None else layers(directory, _parent(directory, parent, points), disk, points)


@dataclass(frozen=True)
class Broken:
    """A disk that cannot be restored from a point. why: what is wrong with its chain."""

    point: PointId
    disk: DiskName
    why: str

    def __str__(self) -> str:
        return f"{self.disk} of {self.point} cannot be restored: {self.why}"


def damaged(directory: VmDirectory) -> tuple[Broken, ...]:
    """Check the chain of each disk at each point: headers, backing files, digest maps; not the data.

    Points with a damaged manifest are in `VmDirectory.scan_points`. Locks nothing: what a prune may have
    changed is checked again. Raises RepositoryError.
    """
    found = _look(directory)
    if not found:
        return ()
    again = {(one.point, one.disk) for one in _look(directory)}
    return tuple(one for one in found if (one.point, one.disk) in again)


def _look(directory: VmDirectory) -> list[Broken]:
    scanned, retired = directory.scan_points(), directory.retired()
    there = {point.id for point in scanned.points}
    known: dict[tuple[PointId, DiskName], str | None] = {}
    for point in sorted((*scanned.points, *retired.points), key=lambda one: one.id):  # parents come first
        for entry in point.manifest.disks:
            known[point.id, entry.name] = _why_broken(directory, point, entry, known)
    return [Broken(*key, why) for key, why in known.items() if why and key[0] in there]


def _why_broken(
    directory: VmDirectory, point: Point, entry: DiskEntry, known: dict[tuple[PointId, DiskName], str | None]
) -> str | None:
    """Return what is wrong with a layer, or else with those below it; None if nothing is found."""
    try:
        layer = Layer.of(point, entry)
    except DamageFound as err:
        return err.message
    parent = layer.entry.parent
    if (why := why_broken(layer)) or parent is None:
        return why
    return known.get((parent, entry.name), f"{directory.path / parent} is missing or damaged")


def why_broken(layer: Layer) -> str | None:
    """Return what is wrong with the image or the digest map of a layer. Raises RepositoryUnreadable."""
    try:
        layer.check()
        layer.digests()
    except DamageFound as err:
        return err.message
    return None


def why_cut(directory: str, disk: DiskName, file_bytes: int) -> str | None:
    """Return why a layer in a point's directory cannot be whole, without opening it; None for nothing.

    file_bytes: the length of its image. Raises RepositoryUnreadable.
    """
    layer = f"{directory}/{disk}"
    return _why_shortened(f"{layer}.qcow2", file_bytes) or _why_shortened(layer + digest_map.SUFFIX, None)


def _why_shortened(path: str, wanted: int | None) -> str | None:
    with safe_open.unreadable(path):
        try:
            found = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return f"{path} is missing"
    if not stat.S_ISREG(found.st_mode):
        return f"{path} is not a regular file"
    if found.st_size != wanted and (wanted is not None or not found.st_size):
        text = "" if wanted is None else f", manifest says {wanted} bytes"
        return f"{path}: length is {found.st_size} bytes{text}"
    return None


Lengths = dict[tuple[PointId, DiskName], int]
"""How many layers disks have at points."""


def length(directory: VmDirectory, point: Point, entry: DiskEntry, known: Lengths) -> int:
    """Count the layers of a disk at a point, without checking them. Raises DamageFound.

    known: lengths that were counted before; those of this disk are added.
    """
    above = []
    while (point.id, entry.name) not in known:
        above.append((point.id, entry.name))
        entry = Layer.of(point, entry).entry
        if entry.parent is None:
            known[above.pop()] = 1
            break
        point = _parent(directory, entry.parent)
        held = point.manifest.disk(entry.name)
        if held is None:
            raise DamageFound(f"{point.path} has no disk {entry.name}, and newer points depend on it")
        entry = held
    counted = known[point.id, entry.name]
    for layer in reversed(above):
        counted = known[layer] = counted + 1
    return counted


def _follow(directory: VmDirectory, point: Point, entry: DiskEntry, points: KnownPoints) -> tuple[Layer, ...]:
    found: list[Layer] = []
    while len(found) < MOST_LAYERS:
        layer = Layer.of(point, entry)
        layer.check()
        found.append(layer)
        entry = layer.entry
        if entry.parent is None:
            return tuple(found)
        # Each parent's id is smaller than its child's (the manifest was checked for it), so this ends.
        point = _parent(directory, entry.parent, points)
        below_it = point.manifest.disk(entry.name)
        if below_it is None:
            raise DamageFound(f"{layer.path} depends on {point.id}, which has no disk {entry.name}")
        entry = below_it
    raise DamageFound(
        f"{found[0].path} has more than {MOST_LAYERS} layers below it, more than QEMU opens",
        hint="take a full backup, or prune, before a chain gets that long",
    )


def _parent(directory: VmDirectory, parent: PointId, points: KnownPoints = MappingProxyType({})) -> Point:
    try:
        return points.get(parent) or directory.point_or_retired(parent)
    except NoSuchPoint as err:
        raise DamageFound(f"{directory.path / parent} is missing, and newer points depend on it") from err
