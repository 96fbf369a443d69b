# SPDX-License-Identifier: GPL-2.0-or-later
"""Paths whose way nobody else can turn: what root writes to, or believes, must lie behind none but those.

Whoever owns a folder, or may write to it, can exchange what is in it at any moment: for a link that leads
to a file of the host's, or for a file of his own. A sticky folder (``/tmp``) is no danger to what is ours in
it, since nobody else may rename or remove that.
"""

import errno
import os
import stat
from pathlib import Path

from backupctl.errors import UsageError

_MOST_LINKS = 40  # as the kernel allows
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_ROOT = 0

SAFE = "/srv/restored/"
"""A folder that root alone may write to, unless somebody changed that."""


def resolve(path: Path) -> Path:
    """Return where a path leads, all links followed; what is not there yet is taken as it stands.

    As root every folder and every link on the way must be root's own, and no folder may be written by group
    or others, unless it is sticky. What stands at the end may be anybody's, but for a link. Raises
    UsageError, OSError.
    """
    if os.geteuid() != _ROOT:
        return path.resolve()
    waiting = list(reversed(path.absolute().parts[1:]))
    found, links = Path("/"), 0
    _refuse_folder(found, path)
    while waiting:
        part = waiting.pop()
        at = found.parent if part == ".." else found / part
        try:
            status = at.lstat()
        except FileNotFoundError:
            found = at
            continue
        if stat.S_ISLNK(status.st_mode):
            links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            _refuse_link(at, status, path)
            target = at.readlink()
            waiting += reversed([part for part in target.parts if part != target.anchor])
            found = Path("/") if target.is_absolute() else found
            continue
        found = at
        if waiting or stat.S_ISDIR(status.st_mode):
            _refuse_folder(found, path)
    return found


def _refuse_folder(folder: Path, path: Path) -> None:
    status = folder.lstat()
    if status.st_uid != _ROOT:
        raise _refused(path, f"the folder {folder} belongs to user {status.st_uid}")
    if status.st_mode & _OTHERS_WRITE and not status.st_mode & stat.S_ISVTX:
        raise _refused(path, f"others may write to {folder} (mode {status.st_mode & 0o7777:04o})")


def _refuse_link(link: Path, status: os.stat_result, path: Path) -> None:
    if status.st_uid != _ROOT:
        raise _refused(path, f"the symbolic link {link} belongs to user {status.st_uid}")


def _refused(path: Path, why: str) -> UsageError:
    return UsageError(
        f"{path} is not safe for root to write to: {why}, so others could put another file in its place"
    )
