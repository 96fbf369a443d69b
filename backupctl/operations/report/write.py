# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes a report into a file: absent, the old one, or complete."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from backupctl.errors import UNTOUCHED, TargetExists, UsageError, WriteFailed
from backupctl.events import Event
from backupctl.system import safe_open
from backupctl.targets import output


def destination(path: Path, repositories: Iterable[Path], mark: bytes, *, force: bool) -> Path:
    """Return where a report really goes, before any work is done for it. mark, force: as for `write`.

    Raises UsageError for a place where it must not be, TargetExists, RepositoryUnreadable, OSError.
    """
    where = output.place_of(path, "--html")
    for repository in repositories:
        output.refuse_inside(repository, where)
    if not where.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no directory {where.parent}", state=UNTOUCHED)
    _may_replace(where, mark, force=force)
    return where


def write(path: Path, content: bytes, mark: bytes, *, force: bool, warn: Callable[[Event], None]) -> None:
    """Write a report. A new file is its owner's alone; one that is replaced keeps owner and mode.

    mark: how a report begins. Any other file that is there is replaced only if `force` says so. Raises
    TargetExists, Locked, UsageError, WriteFailed, RepositoryError.
    """
    replace = _may_replace(path, mark, force=force)
    try:
        with output.file(path, force=replace, warn=warn) as made:
            _write(made.descriptor, content)
    except OSError as err:
        raise WriteFailed(f"cannot write {path}: {err.strerror}", state=UNTOUCHED) from err


def _write(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def _may_replace(path: Path, mark: bytes, *, force: bool) -> bool:
    """Whether there is a file that is to be replaced. Raises TargetExists, RepositoryUnreadable."""
    try:
        begin = safe_open.read(path, len(mark))[: len(mark)]
    except safe_open.NotPlain as err:
        raise TargetExists(f"{path} is not a regular file; it was not replaced", state=UNTOUCHED) from err
    except safe_open.NotThere:
        return force
    if begin != mark and not force:
        raise TargetExists(
            f"{path} exists, and is not a report of backupctl",
            state=UNTOUCHED,
            hint="name a new file; or add --force to replace this one",
        )
    return True
