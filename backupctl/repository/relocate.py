# SPDX-License-Identifier: GPL-2.0-or-later
"""Renaming and removing all that a repository has of a VM: each takes effect by one rename.

::

    rename   VM/former-names gets the old name           nothing has changed yet: it allows more than there is
             VM/ is renamed to NEW/                       THE rename
    remove   VM/ is renamed to .removed-VM-<8 hex>/       from here on there is no such VM
             that is deleted                              a crash leaves the rest; the same command deletes it

Both hold the VM's lock, and an exclusive lock on each point, so that no run and no reader is at work.
"""

import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from backupctl.errors import UNTOUCHED, Locked, RepositoryError, TargetExists
from backupctl.names import VmName
from backupctl.repository import former_names
from backupctl.repository.vm_directory import VmDirectory
from backupctl.system import durable, locks, safe_open

_LOCK_SECONDS = 1.0


@contextmanager
def alone(directory: VmDirectory) -> Iterator[None]:
    """Keep runs and readers away from all points of a VM. Raises Locked, RepositoryError."""
    with ExitStack() as held:
        held.enter_context(directory.lock())
        for point in directory.all_points():
            try:
                with suppress(FileNotFoundError):
                    held.enter_context(locks.directory(directory.path / point, _LOCK_SECONDS))
            except Locked as err:
                raise Locked(
                    f"{point} of {directory.name} is in use, by itself or as the base of a point that is",
                    state=UNTOUCHED,
                    hint="try again when the restore, serve or verify that reads it has ended",
                ) from err
        yield


def rename(directory: VmDirectory, new: VmName) -> None:
    """Give a VM another name. The caller is `alone`. Raises TargetExists, DamageFound, RepositoryError."""
    target = directory.path.with_name(new)
    points = directory.all_points()
    if points:
        # Before the rename: the other way round, a crash would leave points that belong to nobody.
        former_names.add(directory.path, directory.name, points[-1])
    try:
        durable.rename_new(directory.path, target)
    except FileExistsError as err:
        raise TargetExists(f"{target} exists already", state=UNTOUCHED) from err
    except OSError as err:
        raise RepositoryError(f"cannot rename {directory.path}: {err.strerror}", state=UNTOUCHED) from err


def remove(directory: VmDirectory) -> None:
    """Remove a VM and all its points. The caller is `alone`. Raises RepositoryError."""
    removed = directory.path.with_name(f".removed-{directory.name}-{secrets.token_hex(4)}")
    try:
        durable.rename(directory.path, removed)
    except OSError as err:
        raise RepositoryError(f"cannot rename {directory.path}: {err.strerror}", state=UNTOUCHED) from err
    _delete(removed)


def removed(directory: VmDirectory) -> list[Path]:
    """Return what killed removals of a VM left. Raises RepositoryUnreadable."""
    pattern = re.compile(rf"\.removed-{re.escape(directory.name)}-[0-9a-f]{{8}}", re.ASCII)
    parent = directory.path.parent
    return [parent / name for name in safe_open.directories(parent) if pattern.fullmatch(name)]


def finish_removal(directory: VmDirectory) -> bool:
    """Delete what killed removals of a VM left; whether there was anything. Raises RepositoryError."""
    left = removed(directory)
    for path in left:
        _delete(path)
    return bool(left)


def _delete(path: Path) -> None:
    try:
        shutil.rmtree(path)  # follows no symbolic link
        durable.sync_directory(path.parent)
    except OSError as err:
        raise RepositoryError(
            f"cannot delete {path}: {err.strerror}",
            state="the VM is not in the repository any more; some of its files are left",
            hint="run the same command again to delete the rest",
        ) from err
