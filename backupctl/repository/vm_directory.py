# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's directory in a repository: its recovery points, and what is to become one.

A point is committed if its directory has its final name; nothing else decides it. A prune may have retired it
since (see markers.py): then it is not a point any more, but younger ones may depend on it.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from backupctl.errors import (
    UNTOUCHED,
    BackupctlError,
    DamageFound,
    InvalidName,
    Locked,
    NoSuchPoint,
    RepositoryError,
    RepositoryUnreadable,
    UnknownFormat,
)
from backupctl.names import PointId, RepositoryId, VmName, did_you_mean, point_id, vm_name
from backupctl.repository import former_names, history, markers, point_names, seal, strict_json
from backupctl.repository import journal as journals
from backupctl.repository import manifest as manifests
from backupctl.repository.journal import Journal
from backupctl.repository.manifest import Manifest
from backupctl.repository.pending_point import PARTIAL, PendingPoint
from backupctl.repository.point import Point
from backupctl.system import durable, locks, safe_open

LOCK = "lock"
"""The file that whoever works on a VM has locked: its process id, and what it is doing (activity.py)."""


@dataclass(frozen=True)
class ScannedPoints:
    """All directories that have a point's final name.

    damaged: those with a damaged manifest. unreadable: those that the operating system refused to read, which
    may be undamaged.
    """

    points: tuple[Point, ...]
    damaged: tuple[tuple[Path, BackupctlError], ...]
    unreadable: tuple[tuple[Path, RepositoryUnreadable], ...] = ()


class AllPoints(NamedTuple):
    """All points of a VM. retired: those that were dropped but whose layers younger ones may need."""

    committed: ScannedPoints
    retired: ScannedPoints


@dataclass(frozen=True)
class VmDirectory:
    """One VM's part of a repository."""

    path: Path
    name: VmName
    repository: RepositoryId

    def exists(self) -> bool:
        """Whether there was any run of this VM. Raises RepositoryUnreadable."""
        with safe_open.unreadable(self.path):
            return self.path.is_dir()

    @contextmanager
    def lock(self, patience_seconds: float = 4.0) -> Iterator[int]:
        """Keep other runs out; yields the lock's descriptor. Raises Locked, RepositoryError.

        A process that inherits the descriptor holds the lock too. A run's guard does, so no run begins while
        the guard of a killed run is still thawing the guest. That mostly takes an instant, hence the
        patience.
        """
        try:
            if not self.path.is_dir():
                with suppress(FileExistsError):
                    durable.make_directory(self.path)
            descriptor = os.open(
                self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
        except OSError as err:
            raise RepositoryError(
                f"cannot write to the repository's directory {self.path}: {err.strerror}",
                state=UNTOUCHED,
            ) from err
        try:
            self._acquire(descriptor, patience_seconds)
            self._refuse_moved(descriptor)
            self.break_seal()
            yield descriptor
        finally:
            os.close(descriptor)

    def break_seal(self) -> None:
        """Have each point looked at, until the summary is renewed. Raises RepositoryError.

        Whoever changes anything in the directory of a point does this before; without the VM's lock, which
        does it, afterwards as well.
        """
        try:
            seal.break_of(self.path)
        except OSError as err:
            raise RepositoryError(f"cannot write to {self.path}: {err.strerror}", state=UNTOUCHED) from err
        # What is changed next must not be durable without it.
        self._sync_names()

    def lock_holder(self) -> str | None:
        """Describe who holds the lock; None if nobody does or there is no lock yet. Changes nothing."""
        try:
            descriptor = os.open(self.path / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return None if locks.take(descriptor, 0, shared=True) else self._holder(descriptor)
        except RepositoryError:  # the file system has no locks: a run cannot hold one either
            return None
        finally:
            os.close(descriptor)

    def _acquire(self, descriptor: int, patience_seconds: float) -> None:
        if not locks.take(descriptor, patience_seconds):
            raise Locked(
                self._holder(descriptor),
                state=UNTOUCHED,
                hint="try again when that run has ended",
                next_command=f"backupctl status {self.name}",
            )
        with suppress(OSError):  # for messages only; a full disk must not stop the run here
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def _refuse_moved(self, descriptor: int) -> None:
        """Raise Locked if the directory got another name, or was removed, while we waited for the lock."""
        # Without this look, two runs could work on one VM: the lock that was taken is that of another name.
        mine = os.fstat(descriptor)
        try:
            there = (self.path / LOCK).lstat()
        except OSError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            raise Locked(
                f"{self.name} was renamed or removed in this repository just now",
                state=UNTOUCHED,
                next_command="backupctl list",
            )

    def _holder(self, descriptor: int) -> str:
        number = ""
        with suppress(OSError):
            first, _, _ = os.pread(descriptor, 20, 0).decode("ascii", "replace").partition("\n")
            number = first.strip()
        taker = locks.taker(descriptor)
        if taker and str(taker) != number:  # flock(1) writes nothing into the file
            return f"process {taker}{_program(taker)} keeps {self.name} of this repository locked"
        if number.isdigit() and not Path("/proc", number).exists():
            return (
                f"the guard of a killed run (process {number}) is still working on {self.name}: "
                "it thaws the guest or waits for QEMU's monitor; it gives up thawing after 5 minutes"
            )
        return f"another run (process {number or '?'}) is working on {self.name} in this repository"

    def _sync_names(self) -> None:
        """Make durable what a killed run renamed."""
        # Recovery decides by the names: it must not clear bitmaps for a commit that a power failure undoes.
        try:
            durable.sync_directory(self.path)
        except OSError as err:
            raise RepositoryError(f"cannot sync {self.path}: {err.strerror}") from err

    def points(self) -> tuple[Point, ...]:
        """Return the committed points, oldest first. Raises DamageFound for the first that is damaged."""
        found = self.scan_points()
        if found.damaged:
            raise found.damaged[0][1]
        return found.points

    def scan_points(self, *, tolerant: bool = False) -> ScannedPoints:
        """Return the committed points, oldest first, and the damaged ones.

        tolerant: list what cannot be read, too, instead of raising RepositoryUnreadable.
        """
        (found,) = self._scan(False, tolerant=tolerant)
        return found

    def retired(self, *, tolerant: bool = False) -> ScannedPoints:
        """Return, like `scan_points`, the points that were dropped but whose layers younger ones may need."""
        (found,) = self._scan(True, tolerant=tolerant)
        return found

    def scan_some(self, points: Iterable[PointId]) -> AllPoints:
        """Return those of some points that are there, as `scan_points` and `retired` do; tolerant."""
        return AllPoints(*self._scan(False, True, tolerant=True, points=points))

    def scan_all(self) -> AllPoints:
        """Return what `scan_points` and `retired` do, with one look at each. Raises RepositoryUnreadable."""
        return AllPoints(*self._scan(False, True, tolerant=False))

    def point_or_retired(self, point: PointId) -> Point:
        """Return a point that others depend on, retired or not. Raises NoSuchPoint, DamageFound."""
        if not self._exists(point):
            raise self._nothing_of(point)
        return self._open(point)

    def point(self, wanted: str) -> Point:
        """Return one point, by any of its names. Raises NoSuchPoint, AmbiguousPoint, DamageFound.

        wanted: see `point_names`.
        """
        return self._open(self.resolve(wanted))

    def resolve(self, wanted: str) -> PointId:
        """Return the id of the point that a name means. Raises NoSuchPoint, AmbiguousPoint, InvalidName."""
        if point_names.is_id(wanted) and self.is_committed(PointId(wanted)):
            return PointId(wanted)
        try:
            return point_names.resolve(wanted, self._committed(), self.name)
        except InvalidName as err:
            raise err.add(next_command=f"backupctl list {self.name}") from err
        except NoSuchPoint as err:
            raise err.add(hint=self._meant_vm()) from err

    def all_points(self) -> list[PointId]:
        """Return the ids of all points, retired ones and damaged ones too, oldest first."""
        return _ids(safe_open.directories(self.path))

    def newest(self) -> PointId | None:
        """Return the newest id of the committed, retired, dropped and unfinished points.

        Raises RepositoryError.
        """
        known = history.read(self.path)
        # Dropped ones, too: the newest may have been deleted, and an id must never be used twice.
        dropped = [point for point, one in known.points.items() if one.dropped] if known else []
        pending = (partial.point for partial in self.pending_points())
        return max((*self.all_points(), *pending, *dropped), default=None)

    def uses(self, point: PointId) -> bool:
        """Whether a committed point or an unfinished one has this id."""
        return any(
            os.path.lexists(path)
            for path in (self.path / point, PendingPoint(self.path, self.name, point).path)
        )

    def user_elsewhere(self, point: PointId) -> VmName | None:
        """Return the other VM of this repository that has a point of this id, finished or not.

        No two VMs have one id (`Repository.next_point`). Raises RepositoryError.
        """
        for name in safe_open.directories(self.path.parent):
            with suppress(InvalidName):
                other = VmDirectory(self.path.parent / name, vm_name(name), self.repository)
                if other.name != self.name and other.uses(point):
                    return other.name
        return None

    def is_committed(self, point: PointId) -> bool:
        """Whether the point's directory has its final name, and is not retired.

        Raises RepositoryError if that cannot be found out: "no" would roll back what may be committed.
        """
        return self._exists(point) and not self._is_retired(point)

    def pending_points(self) -> list["PendingPoint"]:
        """Return the unfinished points, of a run in progress or of killed ones."""
        names = [
            name.removesuffix(PARTIAL) for name in safe_open.directories(self.path) if name.endswith(PARTIAL)
        ]
        return [PendingPoint(self.path, self.name, found) for found in _ids(names)]

    def begin(self, point: PointId, journal: Journal) -> "PendingPoint":
        """Create the directory of a new point, with its journal. Raises RepositoryError."""
        partial = PendingPoint(self.path, self.name, point)
        try:
            durable.make_directory(partial.path)
            durable.replace(partial.path / journals.FILE_NAME, journal.to_json())
        except OSError as err:
            raise RepositoryError(f"cannot write to {partial.path}: {err.strerror}") from err
        return partial

    def refuse_unknown(self) -> None:
        """Raise NoSuchPoint if there was no run of this VM."""
        if not self.exists():
            raise NoSuchPoint(
                f"{self.path.parent} has no backup of the VM {self.name}",
                state=UNTOUCHED,
                hint=self._meant_vm(),
                next_command="backupctl list",
            )

    def _meant_vm(self) -> str:
        """Return the hint for the name of a VM that was renamed or may be misspelt; "" if it is there."""
        if self.exists():
            return ""
        if renamed := former_names.bearer(self.path.parent, self.name):
            return f"{self.name} was renamed to {renamed} in this repository"
        return did_you_mean(self.name, safe_open.directories(self.path.parent))

    def _missing(self, message: str, hint: str = "") -> NoSuchPoint:
        return NoSuchPoint(message, state=UNTOUCHED, hint=hint, next_command=f"backupctl list {self.name}")

    def _exists(self, point: PointId) -> bool:
        try:
            return stat.S_ISDIR((self.path / point).lstat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as err:
            raise RepositoryUnreadable(f"cannot access {self.path / point}: {err.strerror}") from err

    def _committed(self) -> list[PointId]:
        return [found for found in self.all_points() if not self._is_retired(found)]

    def _is_retired(self, point: PointId) -> bool:
        return markers.has(self.path / point, markers.RETIRED)

    def _scan(
        self, *retired: bool, tolerant: bool, points: Iterable[PointId] | None = None
    ) -> list[ScannedPoints]:
        """Return the points that are retired, and those that are not, as asked for; points: None for all."""
        found = {one: _Found() for one in retired}
        for point in self.all_points() if points is None else points:
            into = list(found.values())
            try:
                one = found.get(self._is_retired(point))
                if one is not None:
                    into = [one]
                    one.good.append(self._open(point))
            except NoSuchPoint:
                continue  # a prune has just removed it
            except (DamageFound, UnknownFormat) as err:
                # The traceback keeps what was read of the manifest: many damaged ones would fill the memory.
                err.__cause__ = err.__context__ = None
                for one in into:
                    one.damaged.append((self.path / point, err.with_traceback(None)))
            except RepositoryUnreadable as err:
                if not tolerant:
                    raise
                for one in into:
                    one.unreadable.append((self.path / point, err))
        return [one.scanned() for one in found.values()]

    def _nothing_of(self, point: PointId) -> NoSuchPoint:
        return self._missing(f"{self.name} has no point {point} in this repository, not even a retired one")

    def _open(self, point: PointId) -> Point:
        path = self.path / point
        try:
            content = safe_open.read(path / manifests.FILE_NAME, strict_json.MAX_BYTES)
        except (safe_open.NotThere, RepositoryUnreadable) as err:
            if not self._exists(point):
                raise self._nothing_of(point) from err
            if isinstance(err, RepositoryUnreadable):
                raise
            raise DamageFound(f"cannot read the manifest of {path}: {err}") from err
        try:
            manifest = Manifest.from_json(content)
        except BackupctlError as err:
            err.add(subject=str(path))
            raise
        if (manifest.point, manifest.repository) != (point, self.repository) or not self._bears(manifest):
            raise DamageFound(f"{path}: the manifest belongs to another point, VM or repository")
        return Point(path, manifest)

    def _bears(self, manifest: Manifest) -> bool:
        """Whether a manifest is of this VM, by the name that it has or had."""
        return manifest.vm == self.name or former_names.may_bear(self.path, manifest.point, manifest.vm)


@dataclass
class _Found:
    """A scan under way."""

    good: list[Point] = field(default_factory=list)
    damaged: list[tuple[Path, BackupctlError]] = field(default_factory=list)
    unreadable: list[tuple[Path, RepositoryUnreadable]] = field(default_factory=list)

    def scanned(self) -> ScannedPoints:
        return ScannedPoints(tuple(self.good), tuple(self.damaged), tuple(self.unreadable))


def _ids(names: list[str]) -> list[PointId]:
    found = []
    for name in names:
        with suppress(InvalidName):
            found.append(point_id(name))
    return sorted(found)


def _program(process: int) -> str:
    """Return the name of a process's program in brackets; "" if it cannot be read."""
    try:
        return f" ({Path(f'/proc/{process}/comm').read_text(errors='replace').strip()})"
    except OSError:
        return ""
