# SPDX-License-Identifier: GPL-2.0-or-later
"""Markers: empty files in a point's folder; each is a flag that is set if the file exists.

::

    protected        prune never drops this point retired          this is not a recovery point any more;
    only younger points still need its layers <disk>.merging   the one layer above the disk's image is being
    merged into it: its length, size and digests
                     need not match the manifest
"""

from contextlib import suppress
from pathlib import Path

from backupctl.errors import RepositoryError
from backupctl.system import durable, safe_open

PROTECTED = "protected"
RETIRED = "retired"


def merging(disk: str) -> str:
    """Name the marker of a disk whose image is being merged into."""
    return f"{disk}.merging"


def has(folder: Path, marker: str) -> bool:
    """Whether a point's folder has a marker. Raises RepositoryUnreadable if that cannot be found out."""
    return safe_open.there(folder / marker)


def put(folder: Path, marker: str) -> None:
    """Set a marker, durably, if it is not set. Raises RepositoryError."""
    try:
        with suppress(FileExistsError):
            durable.write_new(folder / marker, b"")
        durable.sync_folder(folder)
    except OSError as err:
        raise RepositoryError(f"cannot create {folder / marker}: {err.strerror}") from err


def remove(folder: Path, marker: str) -> None:
    """Remove a marker, durably, if it is set. Raises RepositoryError."""
    try:
        durable.remove(folder / marker)
    except OSError as err:
        raise RepositoryError(f"cannot remove {folder / marker}: {err.strerror}") from err
