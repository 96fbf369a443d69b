# SPDX-License-Identifier: GPL-2.0-or-later
"""Markers: empty files in a point's folder, each of which says one thing by being there.

::

    protected        prune never drops this point
    retired          this is no recovery point any more; only younger points still need its layers
    <disk>.merging   the disk's image is being overwritten with the content of the one layer that stands
                     on it: its length, size and digests need not be what the manifest says
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
    """Whether a point's folder has a marker. Raises RepositoryUnreadable if that can't be told."""
    return safe_open.there(folder / marker)


def put(folder: Path, marker: str) -> None:
    """Set a marker, durably; one that is there stays. Raises RepositoryError."""
    try:
        with suppress(FileExistsError):
            durable.write_new(folder / marker, b"")
        durable.sync_folder(folder)
    except OSError as err:
        raise RepositoryError(f"{folder / marker} can't be made: {err.strerror}") from err


def take_away(folder: Path, marker: str) -> None:
    """Remove a marker, durably; none is no error. Raises RepositoryError."""
    try:
        durable.remove(folder / marker)
    except OSError as err:
        raise RepositoryError(f"{folder / marker} can't be removed: {err.strerror}") from err
