# SPDX-License-Identifier: GPL-2.0-or-later
"""Proving what is stored: each layer is read back once and compared with its digest map.

::

    for every VM     manifests, leftovers
    for every layer  its links, its size, its digest map, its own tables          ─┐ `fast` ends here
                     what it stores and what its digest map names: the same         ─┘
                     every cluster that it stores: the bytes that were read from the VM

A layer is read without those below it, so each byte is read once however many points stand on it. What is
found damaged is then told as the user sees it: which bytes of which disks at which points.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from backupctl import clusters
from backupctl.clusters import Logical, Records
from backupctl.errors import BackupctlError, DamageFound, Locked, NoSuchPoint, ReadFailed, RepositoryError
from backupctl.names import DiskName, PointId, VmName
from backupctl.report import Reporter, Stop
from backupctl.repository import digests, header, images, locks, markers, qemu
from backupctl.repository.chain import Layer
from backupctl.repository.digests import DigestMap
from backupctl.repository.layout import Point, Repository, Survey, VmFolder
from backupctl.repository.manifest import DiskEntry
from backupctl.repository.reach import Range, Reach, Touched
from backupctl.transfer import reading
from backupctl.transfer.reading import Clusters
from backupctl.transfer.source import Source

Kind = Literal["manifest", "chain", "image", "digests", "data"]
_BLOCK = 16  # clusters: a sample is taken in mebibytes, since a disk seeks as long as it reads one
_CONNECTIONS = 2
_PATIENCE_SECONDS = 30.0
_LOOKS = 5


@dataclass(frozen=True)
class Depth:
    """How deep to look. data: read it at all. percent: of it, a sample if below 100. seed: of the sample."""

    data: bool = True
    percent: float = 100.0
    seed: int = field(default_factory=lambda: secrets.randbits(32))


@dataclass(frozen=True)
class Damage:
    """One thing found wrong.

    kind: what it is in (data: the stored bytes). path: the file or folder. disk: "" if it is not of one.
    ranges: of the disk, damaged in this layer. touches: what of which points that spoils.
    """

    vm: VmName
    kind: Kind
    path: Path
    disk: str
    message: str
    ranges: tuple[Range, ...]
    touches: tuple[Touched, ...]


@dataclass(frozen=True)
class VerifyReport:
    """What a verification came to. read_bytes: of data, compared. notes: to know, but no damage."""

    vms: tuple[VmName, ...]
    points: int
    layers: int
    read_bytes: int
    damage: tuple[Damage, ...]
    notes: tuple[str, ...]
    seconds: float


def verify(
    repository: Repository, vm: VmName | None, point: str | None, depth: Depth, reporter: Reporter, stop: Stop
) -> VerifyReport:
    """Check the whole repository, one VM (`vm`), or what one point of it needs. Changes nothing.

    Damage is in the report. Raises NoSuchPoint, DamageFound if the point asked for has no manifest to
    start from, RepositoryError, Interrupted.
    """
    begun = time.monotonic()
    qemu.require_tools()
    folders = [repository.vm(name) for name in (repository.vms() if vm is None else [vm])]
    if vm is not None and not folders[0].exists():
        raise NoSuchPoint(f"nothing of the VM {vm} is in {repository.path}")
    works = [_Work(folder, depth, reporter, stop) for folder in folders]
    for work in works:
        work.run(point)
    return VerifyReport(
        vms=tuple(work.folder.name for work in works),
        points=sum(work.points for work in works),
        layers=sum(work.layers for work in works),
        read_bytes=sum(work.read_bytes for work in works),
        damage=tuple(found for work in works for found in work.damage),
        notes=tuple(note for work in works for note in work.notes),
        seconds=time.monotonic() - begun,
    )


class _Work:
    """The verification of one VM."""

    def __init__(self, folder: VmFolder, depth: Depth, reporter: Reporter, stop: Stop) -> None:
        self.folder = folder
        self.damage: list[Damage] = []
        self.notes: list[str] = []
        self.points = self.layers = self.read_bytes = 0
        self._depth = depth
        self._reporter = reporter
        self._stop = stop
        self._random = np.random.default_rng(depth.seed)
        self._maps: dict[tuple[PointId, str, str], DigestMap | DamageFound] = {}

    def run(self, wanted: str | None) -> None:
        """Check all of the VM's points, or what one needs."""
        self._reporter.step(f"verify {self.folder.name}")
        chosen = None if wanted is None else _as_it_is(self.folder.point(wanted))
        survey, retired = self._survey()
        self._known = {point.id: _as_it_is(point) for point in (*survey.points, *retired.points)}
        hidden = {point.id for point in retired.points}
        standing = {(e.parent, e.name) for point in self._known.values() for e in point.manifest.disks}
        self._needless = {
            (point.id, entry.name)
            for point in retired.points
            for entry in point.manifest.disks
            if (point.id, entry.name) not in standing
        }
        self._reach = Reach(self._known.values(), self._records, hidden)
        layers = self._chosen(chosen)
        self.points = len(survey.points) if chosen is None else 1
        self.layers = len(layers)
        if chosen is None:
            for path, err in (*survey.damaged, *retired.damaged):
                self._found("manifest", path, "", err.message, self._reach.standing_on(PointId(path.name)))
            self.notes += [f"{partial.path}: an unfinished point" for partial in self.folder.partials()]
        self._missing_parents(layers)
        self._prove_all(layers)

    def _survey(self) -> tuple[Survey, Survey]:
        """Look at all points, the retired ones too, again if a prune seems to have been at work meanwhile."""
        found = self.folder.survey(), self.folder.retired()
        for _ in range(_LOOKS):
            again = self.folder.survey(), self.folder.retired()
            if [(each.points, [path for path, _ in each.damaged]) for each in again] == [
                (each.points, [path for path, _ in each.damaged]) for each in found
            ]:
                break
            found = again
        return found

    def _chosen(self, point: Point | None) -> list[tuple[Point, DiskEntry]]:
        if point is None:
            return [
                (one, entry)
                for one in self._known.values()
                for entry in one.manifest.disks
                if (one.id, entry.name) not in self._needless  # merged already; the next prune drops it
            ]
        return [layer for entry in point.manifest.disks for layer in self._below(point, entry)]

    def _below(self, point: Point, entry: DiskEntry) -> Iterator[tuple[Point, DiskEntry]]:
        """Yield a layer and all below it, as far as there are any."""
        at: Point | None = point
        held: DiskEntry | None = entry
        while at is not None and held is not None:
            yield at, held
            at = self._known.get(held.parent) if held.parent else None
            held = at.manifest.disk(entry.name) if at else None

    def _missing_parents(self, layers: Iterable[tuple[Point, DiskEntry]]) -> None:
        for point, entry in layers:
            below = self._known.get(entry.parent) if entry.parent else None
            if entry.parent is None or (below is not None and below.manifest.disk(entry.name)):
                continue
            path = self.folder.path / entry.parent
            if below is not None:
                why = "does not hold that disk"
            elif path.exists():
                why = "is damaged"
            else:
                why = "is missing"
            text = f"{point.path / entry.name} stands on the point {entry.parent}, which {why}"
            self._found("chain", path, entry.name, text, self._reach.whole(point.id, entry.name))

    def _prove_all(self, layers: list[tuple[Point, DiskEntry]]) -> None:
        total = sum(self._data_bytes(point, entry) for point, entry in layers)
        bar = DiskName(self.folder.name)  # one for all layers: there may be thousands
        done = 0
        for point, entry in layers:
            self._stop.check()
            before = done

            def progress(done_bytes: int, before: int = before) -> None:
                self._reporter.progress(bar, before + done_bytes, total)

            with self._held(point) as now:
                held = now.manifest.disk(entry.name) if now else None
                if now and held and self._is_readable(now, held):
                    self._read(now, held, progress)
            done += self._data_bytes(point, entry)

    @contextmanager
    def _held(self, point: Point) -> Iterator[Point | None]:
        """Keep prune off a point's layers; gives the point as it is now, None if it has been pruned."""
        now = None
        with ExitStack() as held:
            try:
                held.enter_context(locks.folder(point.path, _PATIENCE_SECONDS, shared=True))
                now = _as_it_is(self.folder.holder(point.id))
            except (FileNotFoundError, NoSuchPoint):
                self.notes.append(f"{point.path}: pruned meanwhile")
            except Locked:
                self.notes.append(f"{point.path}: not verified, since a prune is changing it")
            yield now

    def _is_readable(self, point: Point, entry: DiskEntry) -> bool:
        """Check all of a layer but its data; whether that can be read and compared."""
        layer = Layer(point.path / f"{entry.name}.qcow2", entry)
        try:
            if self._merging(point, entry):
                self.notes.append(f"{layer.path}: a prune has not ended yet; the next one goes on with it")
                header.read(layer.path)
            else:
                layer.check()
        except DamageFound as err:
            whole = self._reach.whole(point.id, entry.name)
            self._found("image", layer.path, entry.name, err.message, whole)
            if not self._opens(layer):
                return False
        tables = images.check(layer.path)
        if tables.leaks:
            self.notes.append(f"{layer.path}: {tables.leaks} clusters that nothing uses: no harm")
        if tables.errors:
            self._found("image", layer.path, entry.name, f"{layer.path}: qemu-img check: {tables.said}", ())
        found = self._map(point, entry)
        if isinstance(found, DamageFound):
            whole = self._reach.whole(point.id, entry.name)
            self._found("digests", digests.path_of(layer.path), entry.name, found.message, whole)
            return False
        return True

    @staticmethod
    def _opens(layer: Layer) -> bool:
        """Whether QEMU can open an image without harm; a cut off one tells by its data what is lost."""
        try:
            return header.read(layer.path).size == layer.entry.size
        except DamageFound:
            return False

    def _read(self, point: Point, entry: DiskEntry, progress: Callable[[int], None]) -> None:
        try:
            self._compare_all(point, entry, progress)
        except (ReadFailed, RepositoryError) as err:
            path = point.path / f"{entry.name}.qcow2"
            whole = self._reach.whole(point.id, entry.name)
            self._found("image", path, entry.name, f"{path} can't be read: {err.message}", whole)

    def _compare_all(self, point: Point, entry: DiskEntry, progress: Callable[[int], None]) -> None:
        """Compare what a layer stores with its digest map."""
        path = point.path / f"{entry.name}.qcow2"
        records = self._records(point, entry)
        assert records is not None
        with (
            images.serve((path,)) as address,
            closing(
                Source.connect([address] * _CONNECTIONS, images.EXPORT, depth=True, borne=True)
            ) as source,
        ):
            data, zero = reading.stored(source)
            self._compare_names(point, entry, records, np.concatenate([data, zero]))
            named = records["cluster"]
            blank = np.intersect1d(zero, named[~clusters.is_zero(records)], assume_unique=True)
            self._spoilt(point, entry, "stored as zeroes, which they were not", blank)
            if self._depth.data:
                wanted = self._sample(np.intersect1d(data, named, assume_unique=True))
                self._prove(point, entry, records, source, wanted, progress)

    def _prove(
        self,
        point: Point,
        entry: DiskEntry,
        records: Records,
        source: Source,
        wanted: Clusters,
        progress: Callable[[int], None],
    ) -> None:
        expected = Logical([(records, entry.size)], entry.size)
        differing: list[Clusters] = [np.empty(0, np.uint64)]

        def look(found: Records) -> None:
            should = expected.window(int(found["cluster"][0]), len(found))
            differing.append(found["cluster"][clusters.differ(found, should)])

        lost = reading.read(source, wanted, look, check=self._stop.check, progress=progress)
        self.read_bytes += len(wanted) * clusters.CLUSTER_BYTES
        self._spoilt(point, entry, "can't be read", lost)
        self._spoilt(point, entry, "not what was read from the VM", np.sort(np.concatenate(differing)))

    def _compare_names(self, point: Point, entry: DiskEntry, records: Records, stored: Clusters) -> None:
        """Compare what is stored with what is named, without a look at the bytes."""
        named = records["cluster"]
        self._spoilt(point, entry, "missing from the image", np.setdiff1d(named, stored))
        self._spoilt(point, entry, "stored, but not by us", np.setdiff1d(stored, named))

    def _sample(self, stored: Clusters) -> Clusters:
        """Choose a sample by mebibytes, at least one."""
        if self._depth.percent >= 100 or not len(stored):
            return stored
        blocks = np.unique(stored // _BLOCK)
        count = max(1, round(len(blocks) * self._depth.percent / 100))
        chosen = self._random.choice(blocks, count, replace=False)
        return stored[np.isin(stored // _BLOCK, chosen)]

    @staticmethod
    def _merging(point: Point, entry: DiskEntry) -> bool:
        return markers.has(point.path, markers.merging(entry.name))

    def _data_bytes(self, point: Point, entry: DiskEntry) -> int:
        records = self._records(point, entry)
        data = 0 if records is None else int(np.count_nonzero(~clusters.is_zero(records)))
        return data * clusters.CLUSTER_BYTES

    def _map(self, point: Point, entry: DiskEntry) -> DigestMap | DamageFound:
        """Open a digest map once: every byte of it is checked by that."""
        key = point.id, entry.name, entry.digests
        if key not in self._maps:
            try:
                self._maps[key] = Layer(point.path / f"{entry.name}.qcow2", entry).digests()
            except DamageFound as err:
                self._maps[key] = err
        return self._maps[key]

    def _records(self, point: Point, entry: DiskEntry) -> Records | None:
        found = self._map(point, entry)
        return None if isinstance(found, BackupctlError) else found.records

    def _spoilt(self, point: Point, entry: DiskEntry, what: str, damaged: Clusters) -> None:
        if not len(damaged):
            return
        path = point.path / f"{entry.name}.qcow2"
        ranges = tuple(clusters.ranges(damaged, entry.size))
        number = f"{len(damaged)} {'cluster' if len(damaged) == 1 else 'clusters'}"
        touches = self._reach.part(point.id, entry.name, damaged)
        if not touches and self._merging(point, entry):
            return  # it is being overwritten, below the very layer that it gets this from
        self._found("data", path, entry.name, f"{path}: {number} {what}", touches, ranges)

    def _found(
        self,
        kind: Kind,
        path: Path,
        disk: str,
        message: str,
        touches: tuple[Touched, ...],
        ranges: tuple[Range, ...] = (),
    ) -> None:
        self.damage.append(Damage(self.folder.name, kind, path, disk, message, ranges, touches))
        self._reporter.warn(message)


def _as_it_is(point: Point) -> Point:
    """Return a point with, of two descriptions that a prune left of a disk, the one that holds."""
    manifest = point.manifest
    for entry in manifest.disks:
        with suppress(DamageFound):  # told when the layer itself is looked at
            manifest = manifest.with_disk(Layer.of(point, entry).entry)
    return replace(point, manifest=manifest)
