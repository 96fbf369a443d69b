# SPDX-License-Identifier: GPL-2.0-or-later
"""Markers: empty files in a point's directory; each is a flag that is set if the file exists.

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


def has(directory: Path, marker: str) -> bool:
    """Whether a point's directory has a marker. Raises RepositoryUnreadable if that cannot be found out."""
    return safe_open.there(directory / marker)


def put(directory: Path, marker: str) -> None:
    """Set a marker, durably, if it is not set. Raises RepositoryError."""
    try:
        with suppress(FileExistsError):
            durable.write_new(directory / marker, b"")
        durable.sync_directory(directory)
    except OSError as err:
        raise RepositoryError(f"cannot create {directory / marker}: {err.strerror}") from err


def remove(directory: Path, marker: str) -> None:
    """Remove a marker, durably, if it is set. Raises RepositoryError."""
    try:
        durable.remove(directory / marker)
    except OSError as err:
        raise RepositoryError(f"cannot remove {directory / marker}: {err.strerror}") from err
