# SPDX-License-Identifier: GPL-2.0-or-later
"""The repository's directories.

::

    REPOSITORY/repository.json            format version, id
    REPOSITORY/VM/lock                    locked (flock) by the one run at a time
    REPOSITORY/VM/history                 what became of each point (history.py)
    REPOSITORY/VM/POINT/                  a committed recovery point
    REPOSITORY/VM/POINT.partial/          a run in progress, or one that was killed

vm_directory.py says what is in a VM's directory.
"""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from backupctl.errors import (
    UNTOUCHED,
    DamageFound,
    InvalidName,
    Locked,
    NotARepository,
    RepositoryError,
    UnknownFormat,
)
from backupctl.names import Namespace, PointId, RepositoryId, VmName, next_point_id, vm_name
from backupctl.repository import strict_json
from backupctl.repository.vm_directory import VmDirectory
from backupctl.system import durable, locks, safe_open

FORMAT = 1
_FILE_NAME = "repository.json"
IN_THE_MAKING = f".{_FILE_NAME}."
"""How the names of temporary files begin while repository.json is written."""
_NAMING_SECONDS = 10.0
_LOST_AND_FOUND = "lost+found"  # in every new ext4 file system


@dataclass(frozen=True)
class _Identity(strict_json.Document):
    """The content of `repository.json`."""

    id: strict_json.RepositoryHex


@dataclass(frozen=True)
class Repository:
    """A directory of recovery points of any number of VMs."""

    path: Path
    id: RepositoryId

    @classmethod
    def create(cls, path: Path) -> "Repository":
        """Make a repository in an empty or missing directory. Raises RepositoryError."""
        try:
            return cls._make(path)
        except FileExistsError as err:
            raise RepositoryError(f"cannot create a repository in {path}: it exists already") from err

    @classmethod
    def open(cls, path: Path) -> "Repository":
        """Open a repository. Raises NotARepository, UnknownFormat, DamageFound, RepositoryError."""
        if why := path_error(path):
            raise RepositoryError(why, state=UNTOUCHED)
        try:
            content = safe_open.read(path / _FILE_NAME, strict_json.MAX_BYTES)
        except safe_open.NotPlain as err:
            raise RepositoryError(f"cannot read {path / _FILE_NAME}: {err}") from err
        except safe_open.NotThere as err:
            raise NotARepository(f"{path} is not a backupctl repository ({_FILE_NAME} not found)") from err
        try:
            return cls(path, strict_json.read(content, _Identity, _FILE_NAME, FORMAT).id)
        except strict_json.NewerFormat as err:
            raise UnknownFormat(f"{path}: {err}") from err
        except strict_json.Malformed as err:
            raise DamageFound(f"{path}: {err}") from err

    @classmethod
    def open_or_create(cls, path: Path) -> "Repository":
        """Open a repository, or make one in an empty or missing directory."""
        try:
            return cls.open(path)
        except NotARepository:
            try:
                return cls._make(path)
            except FileExistsError:  # another run was faster; with two ids, bitmaps of one would be foreign
                return cls.open(path)

    @classmethod
    def _make(cls, path: Path) -> "Repository":
        """Make a repository. Raises FileExistsError if there is one (or a file), RepositoryError."""
        made = RepositoryId(secrets.token_hex(16))
        content = (json.dumps({"format": FORMAT, "id": made}) + "\n").encode()
        try:
            durable.make_directories(path)
            cls.refuse_foreign(path)
            durable.publish(path / _FILE_NAME, content)
            durable.sync_directory(path.absolute().parent)
        except FileExistsError:
            raise
        except OSError as err:
            raise RepositoryError(f"cannot create a repository in {path}: {err.strerror}") from err
        return cls(path, made)

    @staticmethod
    def refuse_foreign(path: Path) -> None:
        """Raise NotARepository if a directory holds other files; OSError if it is not a directory."""
        present = {entry.name for entry in path.iterdir()}
        if _FILE_NAME not in present and any(map(_is_foreign, present)):
            raise NotARepository(
                f"{path} is not empty and is not a repository; use a new or an empty directory"
            )

    @property
    def owner(self) -> Namespace:
        """The names of what our runs make in QEMU."""
        return Namespace.of(self.id)

    def vms(self) -> list[VmName]:
        """Return the VMs that have a directory here."""
        found = []
        for name in safe_open.directories(self.path):
            with suppress(InvalidName):
                found.append(vm_name(name))
        return sorted(found)

    def vm(self, name: VmName) -> VmDirectory:
        """Return a VM's directory, which need not exist yet. Raises RepositoryError."""
        if os.path.islink(self.path / vm_name(name)):  # noqa: PTH114 - other errors are reported by the open
            raise RepositoryError(
                f"{self.path / name} is a symbolic link; a VM's points must be in the repository itself",
                state=UNTOUCHED,
            )
        return VmDirectory(self.path / vm_name(name), name, self.id)

    @contextmanager
    def next_point(
        self, directory: VmDirectory, now: datetime, recorded: PointId | None = None
    ) -> Iterator[PointId]:
        """Choose the id of a VM's next point; its directory is made in the block.

        recorded: the newest id that was found in QEMU. Raises Locked, RepositoryError.
        """
        # No two VMs have one id. A disk that moves to another VM takes its bitmaps along: with an id that
        # both have, they would be used for the other VM's point, and what the disk held before would never
        # be read.
        path = self.path / _FILE_NAME
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as err:
            raise RepositoryError(f"cannot open {path}: {err.strerror}") from err
        try:
            if not locks.take(descriptor, _NAMING_SECONDS):
                raise Locked(f"another run keeps {path} locked for longer than {_NAMING_SECONDS:g} s")
            used = [known for known in (directory.newest(), recorded) if known]
            point = next_point_id(now, max(used, default=None))
            others = [other for name in self.vms() if (other := self.vm(name)).path != directory.path]
            while any(other.uses(point) for other in others):
                point = next_point_id(now, point)
            yield point
        finally:
            os.close(descriptor)


def path_error(path: Path) -> str | None:
    """Return why QEMU, which takes file names in JSON, cannot open files below a path; None if it can."""
    try:
        os.fsencode(path.absolute()).decode()
    except UnicodeDecodeError:
        return f"the path {os.fsencode(path)!r} is not UTF-8, so QEMU cannot open files in it"
    return None


def _is_foreign(name: str) -> bool:
    """Whether a file of that name shows that a directory is used for something else."""
    # A crash while a repository was being created leaves its temporary file: that is ours.
    return name != _LOST_AND_FOUND and not name.startswith(IN_THE_MAKING)
