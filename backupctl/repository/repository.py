# SPDX-License-Identifier: GPL-2.0-or-later
"""The repository's folders.

::

    REPOSITORY/repository.json            format version, id
    REPOSITORY/VM/lock                    held (flock) by the one run at a time
    REPOSITORY/VM/history                 what became of each point (history.py)
    REPOSITORY/VM/POINT/                  a committed recovery point
    REPOSITORY/VM/POINT.partial/          a run under way, or one that died

What is in a VM's folder is told in vm_folder.py.
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
from backupctl.repository.vm_folder import VmFolder
from backupctl.system import durable, locks, safe_open

FORMAT = 1
_FILE_NAME = "repository.json"
IN_THE_MAKING = f".{_FILE_NAME}."
"""How names begin that are there for an instant only, in a repository or where one is being made."""
_NAMING_SECONDS = 10.0
_LOST_AND_FOUND = "lost+found"  # in every new ext4 file system


@dataclass(frozen=True)
class _Identity(strict_json.Document):
    """The content of `repository.json`."""

    id: strict_json.RepositoryHex


@dataclass(frozen=True)
class Repository:
    """A folder of recovery points of any number of VMs."""

    path: Path
    id: RepositoryId

    @classmethod
    def create(cls, path: Path) -> "Repository":
        """Make a repository in an empty or missing folder. Raises RepositoryError."""
        try:
            return cls._make(path)
        except FileExistsError as err:
            raise RepositoryError(f"{path} can't be made a repository: it is there already") from err

    @classmethod
    def open(cls, path: Path) -> "Repository":
        """Open a repository. Raises NotARepository, UnknownFormat, DamageFound, RepositoryError."""
        if unnamed := unspeakable(path):
            raise RepositoryError(unnamed, state=UNTOUCHED)
        try:
            content = safe_open.read(path / _FILE_NAME, strict_json.MAX_BYTES)
        except safe_open.NotPlain as err:
            raise RepositoryError(f"{path / _FILE_NAME} can't be read: {err}") from err
        except safe_open.NotThere as err:
            raise NotARepository(f"{path} is no repository: there is no {_FILE_NAME} in it") from err
        try:
            return cls(path, strict_json.read(content, _Identity, _FILE_NAME, FORMAT).id)
        except strict_json.NewerFormat as err:
            raise UnknownFormat(f"{path}: {err}") from err
        except strict_json.Malformed as err:
            raise DamageFound(f"{path}: {err}") from err

    @classmethod
    def open_or_create(cls, path: Path) -> "Repository":
        """Open a repository, or make one in an empty or missing folder."""
        try:
            return cls.open(path)
        except NotARepository:
            try:
                return cls._make(path)
            except FileExistsError:  # another run was faster; two ids would be two owners
                return cls.open(path)

    @classmethod
    def _make(cls, path: Path) -> "Repository":
        """Make a repository. Raises FileExistsError if there is one (or a file), RepositoryError."""
        made = RepositoryId(secrets.token_hex(16))
        content = (json.dumps({"format": FORMAT, "id": made}) + "\n").encode()
        try:
            durable.make_folders(path)
            cls.refuse_foreign(path)
            durable.publish(path / _FILE_NAME, content)
            durable.sync_folder(path.absolute().parent)
        except FileExistsError:
            raise
        except OSError as err:
            raise RepositoryError(f"{path} can't be made a repository: {err.strerror}") from err
        return cls(path, made)

    @staticmethod
    def refuse_foreign(path: Path) -> None:
        """Raise NotARepository if a folder is somebody else's; OSError if it is none."""
        present = {entry.name for entry in path.iterdir()}
        if _FILE_NAME not in present and any(map(_is_foreign, present)):
            raise NotARepository(
                f"{path} is not empty and holds no repository; name a new or an empty folder"
            )

    @property
    def owner(self) -> Namespace:
        """Whose the things are that our runs make in QEMU."""
        return Namespace.of(self.id)

    def vms(self) -> list[VmName]:
        """Name the VMs that have a folder here."""
        found = []
        for name in safe_open.folders(self.path):
            with suppress(InvalidName):
                found.append(vm_name(name))
        return sorted(found)

    def vm(self, name: VmName) -> VmFolder:
        """Return a VM's folder, which need not exist yet. Raises RepositoryError."""
        if os.path.islink(self.path / vm_name(name)):  # noqa: PTH114 - who opens it tells of other errors
            raise RepositoryError(
                f"{self.path / name} is a symbolic link; a VM's points lie in the repository itself",
                state=UNTOUCHED,
            )
        return VmFolder(self.path / vm_name(name), name, self.id)

    @contextmanager
    def next_point(
        self, folder: VmFolder, now: datetime, recorded: PointId | None = None
    ) -> Iterator[PointId]:
        """Choose the id of a VM's next point, which no other VM here uses; its folder is made in the block.

        recorded: the newest id that was met in QEMU.

        A disk that moves to another VM takes its bitmaps along. Were they named after a point of that VM
        too, they would be taken for its own, and what the disk held before would be missing for ever.
        Raises Locked, RepositoryError.
        """
        path = self.path / _FILE_NAME
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as err:
            raise RepositoryError(f"{path} can't be opened: {err.strerror}") from err
        try:
            if not locks.take(descriptor, _NAMING_SECONDS):
                raise Locked(f"another run keeps {path} locked for longer than it takes to choose a name")
            used = [known for known in (folder.newest(), recorded) if known]
            point = next_point_id(now, max(used, default=None))
            others = [other for name in self.vms() if (other := self.vm(name)).path != folder.path]
            while any(other.uses(point) for other in others):
                point = next_point_id(now, point)
            yield point
        finally:
            os.close(descriptor)


def unspeakable(path: Path) -> str:
    """Say that a path can't be told to QEMU, which takes JSON; "" if it can."""
    try:
        os.fsencode(path.absolute()).decode()
    except UnicodeDecodeError:
        return f"the path {os.fsencode(path)!r} is no UTF-8: QEMU can't open anything in it"
    return ""


def _is_foreign(name: str) -> bool:
    """Whether a file of that name shows that a folder is somebody else's."""
    # A death while a repository was being made leaves its temporary file: that is ours.
    return name != _LOST_AND_FOUND and not name.startswith(IN_THE_MAKING)
