# SPDX-License-Identifier: GPL-2.0-or-later
"""Lists the files of a point and copies them out, without mounting anything.

The file systems of guests are read by our own code (`filesystems/`), in this process, from the images as
their digests say they were. The host's kernel sees none of them, and no other program is started.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from backupctl.cancel import Cancellation
from backupctl.errors import UNTOUCHED, BackupctlError, FilesystemError, UsageError
from backupctl.filesystems import detect, lvm, partitions, tree
from backupctl.filesystems.device import Device
from backupctl.filesystems.tree import FileSystem, Node
from backupctl.images.layered_image import LayeredImage
from backupctl.names import DiskName
from backupctl.operations.files import elsewhere
from backupctl.operations.files.disk import PointDisk
from backupctl.repository import chain, read_locks
from backupctl.repository.point import Point
from backupctl.repository.vm_directory import VmDirectory

_WHOLE = 0


@dataclass(frozen=True)
class Place:
    """A partition of a disk, or a logical volume.

    disk: "" for a volume, which may be on several. number: as Linux counts; 0 for a disk that has no
    partitions. size: in bytes. kind: what it holds, "" if that is not known. problem: why it cannot be read.
    volume: a volume's name, as VG/LV; "" for a partition.
    """

    disk: str
    number: int
    size: int
    kind: str
    problem: str = ""
    warnings: tuple[str, ...] = ()
    volume: str = ""
    filesystem: FileSystem | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        """Its name for people: vda, vda1, or vg/root."""
        return self.volume or f"{self.disk}{self.number or ''}"


@dataclass(frozen=True)
class Selection:
    """Where to look: on which disk and partition, or on which logical volume; None for all."""

    disk: str | None = None
    partition: int | None = None
    volume: str | None = None

    def has(self, place: "Place") -> bool:
        """Whether a place is looked at. A volume is on no partition in particular."""
        if self.volume is not None:
            return place.volume == self.volume
        return self.partition is None or (place.number == self.partition and not place.volume)


@dataclass(frozen=True)
class Found:
    """What a path leads to. path: as it was given, without superfluous slashes."""

    place: Place
    path: bytes
    node: Node

    @property
    def filesystem(self) -> FileSystem:
        """The file system that it is on."""
        assert self.place.filesystem is not None
        return self.place.filesystem


@contextmanager
def open_places(
    directory: VmDirectory, wanted: str, selection: Selection, stop: Cancellation
) -> Iterator[tuple[Place, ...]]:
    """Open the file systems of a point; it is locked against a prune until the block ends.

    Raises NoSuchPoint, UsageError if nothing matches the selection, Locked, DamageFound, RepositoryError.
    """
    with read_locks.reading(directory, wanted) as point:
        names = [entry.name for entry in point.manifest.disks]
        if selection.disk is not None:
            if selection.disk not in names:
                raise chain.no_such_disk(point, selection.disk)
            names = [DiskName(selection.disk)]
        with _disks(directory, point, names, stop.check) as disks:
            places = _all_places(disks)
            chosen = tuple(one for one in places if selection.has(one))
            if not chosen:
                there = ", ".join(one.name for one in places)
                raise UsageError(f"there is no such partition or volume, but {there}", state=UNTOUCHED)
            yield chosen


@contextmanager
def _disks(
    directory: VmDirectory, point: Point, names: list[DiskName], check: Callable[[], None]
) -> Iterator[list[tuple[DiskName, PointDisk]]]:
    """Open disks one in another, so that all stay open until the block ends."""
    if not names:
        yield []
        return
    layers = chain.layers(directory, point, names[0])
    expected = chain.effective_content(layers, layers[0].entry.size)
    with chain.opened(layers) as images, LayeredImage(images) as image:
        disk = PointDisk(f"{names[0]} of {point.id}", image, expected, check)
        with _disks(directory, point, names[1:], check) as others:
            yield [(names[0], disk), *others]


def _all_places(disks: list[tuple[DiskName, PointDisk]]) -> list[Place]:
    """Return all partitions, and then the volumes that are on them."""
    places: list[Place] = []
    physical: list[Device] = []
    for name, disk in disks:
        try:
            found = partitions.read(disk)
        except FilesystemError as err:
            places.append(Place(name, _WHOLE, disk.size, "", err.message))
            continue
        for one in found:
            places.append(_place(one.device, disk=name, number=one.number))
            if places[-1].kind == detect.LVM:
                physical.append(one.device)
    return places + _volumes(physical)


def _volumes(physical: list[Device]) -> list[Place]:
    try:
        found = lvm.volumes(physical)
    except FilesystemError as err:
        return [Place("", _WHOLE, 0, detect.LVM, err.message, volume="?")]
    return [
        _place(one.device, volume=one.name)
        if one.device
        else Place("", _WHOLE, one.size, "", one.problem, volume=one.name)
        for one in found
    ]


def _place(device: Device, disk: str = "", number: int = _WHOLE, volume: str = "") -> Place:
    kind = detect.kind(device)
    found = Place(disk, number, device.size, kind, volume=volume)
    try:
        filesystem = detect.open_file_system(device)
    except FilesystemError as err:
        return replace(found, problem="" if kind == detect.LVM else err.message)
    return replace(found, warnings=filesystem.warnings, filesystem=filesystem)


def locate(places: tuple[Place, ...], path: bytes) -> Found:
    """Find a path on the one file system that has it.

    Raises UsageError if none has it, or several; FilesystemError.
    """
    readable = [one for one in places if one.filesystem is not None]
    if not readable:
        raise _nothing_readable(places)
    found: list[Found] = []
    failures: list[BackupctlError] = []
    for place in readable:
        assert place.filesystem is not None
        try:
            found.append(Found(place, _plain(path), tree.find(place.filesystem, path)))
        except (UsageError, FilesystemError) as err:
            failures.append(err)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(one.place.name for one in found)
        raise UsageError(
            f"{tree.shown(path)} is on several file systems: {names}",
            state=UNTOUCHED,
            hint="choose one with --disk and --partition, or with --volume",
        )
    raise next((err for err in failures if isinstance(err, FilesystemError)), failures[0]).add(
        state="nothing was copied"
    )


def _plain(path: bytes) -> bytes:
    return b"/" + b"/".join(tree.components(path))


def _nothing_readable(places: tuple[Place, ...]) -> FilesystemError:
    listed = "; ".join(f"{one.name}: {one.problem}" for one in places if one.problem)
    return FilesystemError(
        f"no file system can be read ({listed})",
        state="nothing was copied",
        hint="; ".join(f"{kinds}: {text}" for kinds, text in advice(places))
        or "backupctl reads ext2, ext3, ext4, XFS and FAT",
    )


def advice(places: tuple[Place, ...]) -> tuple[tuple[str, str], ...]:
    """Return what reads the places that we do not read: their kinds, and what to do about them."""
    unread = [one for one in places if one.filesystem is None and one.problem]
    return elsewhere.advice((one.kind, bool(one.volume)) for one in unread)


def listing(found: Found, *, recursive: bool) -> Iterator[tuple[bytes, Node]]:
    """Yield the entries of a directory, or the file itself. Names are relative to the path that was given.

    Raises FilesystemError.
    """
    if found.node.kind != "directory":
        yield found.path.rpartition(b"/")[2] or b"/", found.node
        return
    if recursive:
        for names, node in tree.walk(found.filesystem, found.node):
            yield b"/".join(names), node
        return
    yield from sorted(found.filesystem.entries(found.node), key=lambda each: each[0])
