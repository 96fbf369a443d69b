# SPDX-License-Identifier: GPL-2.0-or-later
"""Where root may write: only where nobody else can put another file in the place of the one that is meant."""

import os
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from backupctl.errors import UsageError
from backupctl.system import path_walk
from backupctl.system.path_walk import Step

_ROOT = 0

SAFE = "/srv/restored/"
"""A directory that root alone may write to, unless somebody changed that."""


def resolve(path: Path) -> Path:
    """Return where a path leads, all links followed; what is not there yet is taken as it is written.

    As root, every directory and every link on the way must be root's own, and no directory may be writable by
    group or others, unless it is sticky. The file at the end may be anybody's, but a link there must be
    root's. Raises UsageError, OSError.
    """
    if os.geteuid() != _ROOT:
        return path.resolve()
    found = Path("/")
    with closing(path_walk.walk(path, may_be_missing=True)) as steps:
        for step in steps:
            if step.is_link:
                _refuse_owner(step, "symbolic link", path)
                continue
            found = step.path
            if step.is_directory or not step.last:
                _refuse_directory(step, path)
    return found


@contextmanager
def opened_where_it_is(path: Path) -> Iterator[int]:
    """Open a directory that others may own or write to, for as long as the block; yields its descriptor.

    They could do as they like with what is in it. But a link of theirs on the way would let them choose
    another directory: links must be root's or ours. Raises OSError, UsageError.
    """
    with closing(path_walk.walk(path)) as steps:
        for step in steps:
            assert step.status is not None
            if step.is_link and step.status.st_uid not in (_ROOT, os.geteuid()):
                raise UsageError(f"{step.path} is a symbolic link of user {step.status.st_uid}")
            if step.last and not step.is_link:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                found = os.open(step.name, flags, dir_fd=step.directory)
    try:
        yield found
    finally:
        os.close(found)


def _refuse_directory(step: Step, path: Path) -> None:
    _refuse_owner(step, "directory", path)
    if step.status is not None and path_walk.others_may_write(step.status):
        mode = stat.S_IMODE(step.status.st_mode)
        raise _refused(path, f"others may write to {step.path} (mode {mode:04o})")


def _refuse_owner(step: Step, what: str, path: Path) -> None:
    if step.status is not None and step.status.st_uid != _ROOT:
        raise _refused(path, f"the {what} {step.path} belongs to user {step.status.st_uid}")


def _refused(path: Path, why: str) -> UsageError:
    return UsageError(
        f"{path} is not safe for root to write to: {why}, so others could put another file in its place"
    )
