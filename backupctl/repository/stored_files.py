# SPDX-License-Identifier: GPL-2.0-or-later
"""The files of a point that describe its VM, in the directory `definition` of the point.

A disk's files end in `.qcow2`, `.digests` or `.merging`, and markers are files, so nothing else of a point
can have the directory's name. People may read and copy these files without backupctl.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from blake3 import blake3
from msgspec import Meta

from backupctl.errors import DamageFound
from backupctl.names import FileKind, file_name
from backupctl.repository.strict_json import Hex, Text
from backupctl.sizes import MAX_DEFINITION_BYTES, MAX_DEFINITION_FILE_BYTES, MAX_DEFINITION_FILES
from backupctl.system import durable, safe_open

DIRECTORY = "definition"


@dataclass(frozen=True)
class StoredFile:
    """A file that describes the VM. name: in the directory. origin: its path on the VM's host, "" for none.

    digest: BLAKE3 of its content, 16 bytes. size: in bytes.
    """

    name: str
    kind: FileKind
    origin: Text
    size: Annotated[int, Meta(ge=0, le=MAX_DEFINITION_FILE_BYTES)]
    digest: Hex

    def path_in(self, point: Path) -> Path:
        """Return where it is, in the directory of a point."""
        return point / DIRECTORY / self.name


@dataclass(frozen=True)
class NewFile:
    """A file to store. name, kind, origin: see `StoredFile`."""

    name: str
    kind: FileKind
    origin: str
    content: bytes

    def entry(self) -> StoredFile:
        """Describe it for the manifest."""
        digest = blake3(self.content).hexdigest(16)
        return StoredFile(self.name, self.kind, self.origin, len(self.content), digest)


def check(files: tuple[StoredFile, ...]) -> None:
    """Check the entries of a manifest. Raises ValueError, InvalidName."""
    names = [file_name(one.name) for one in files]
    if len(files) > MAX_DEFINITION_FILES or len(set(names)) != len(names):
        raise ValueError("too many files of the definition, or one of them twice")
    if sum(one.size for one in files) > MAX_DEFINITION_BYTES:
        raise ValueError(f"the files of the definition are larger than {MAX_DEFINITION_BYTES >> 20} MiB")


def write(point: Path, files: Iterable[NewFile]) -> tuple[StoredFile, ...]:
    """Write files into the directory of an unfinished point; `sync` is still to come.

    Raises OSError, InvalidName.
    """
    made = tuple(files)
    entries = tuple(one.entry() for one in made)
    if not entries:
        return ()
    check(entries)
    durable.make_directory(point / DIRECTORY)
    for one, entry in zip(made, entries, strict=True):
        durable.write_new(entry.path_in(point), one.content)
    return entries


def sync(point: Path, files: tuple[StoredFile, ...]) -> None:
    """Sync all files that a manifest names, and the directory that names them. Raises OSError."""
    for one in files:
        durable.sync_file(one.path_in(point))
    if files:
        durable.sync_directory(point / DIRECTORY)


def read(point: Path, entry: StoredFile) -> bytes:
    """Return the content of a file, compared with its digest. Raises DamageFound, RepositoryUnreadable."""
    path = entry.path_in(point)
    try:
        _refuse_link(point / DIRECTORY)
        content = safe_open.read(path, entry.size)
    except safe_open.NotThere as err:
        raise DamageFound(f"cannot open {path}: {err}") from err
    if len(content) != entry.size:
        longer = "longer" if len(content) > entry.size else "shorter"
        raise DamageFound(f"{path} is {longer} than the {entry.size} bytes that the manifest names")
    if blake3(content).hexdigest(16) != entry.digest:
        raise DamageFound(f"{path} does not match its digest")
    return content


def first(files: Iterable[StoredFile], *kinds: FileKind) -> StoredFile | None:
    """Return the first file of one of these kinds; None without one."""
    return next((one for one in files if one.kind in kinds), None)


def _refuse_link(directory: Path) -> None:
    """Refuse a link in the place of the directory, which would lead root elsewhere."""
    with safe_open.unreadable(directory):
        if directory.is_symlink():
            raise safe_open.NotPlain("its directory is a symbolic link")
