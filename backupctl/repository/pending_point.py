# SPDX-License-Identifier: GPL-2.0-or-later
"""A point that a run is making: its journal, the commit, and how it is dropped."""

import errno
import logging
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from backupctl.errors import BackupctlError, RepositoryError
from backupctl.names import PointId, VmName
from backupctl.repository import history, stored_files, strict_json
from backupctl.repository import journal as journals
from backupctl.repository import manifest as manifests
from backupctl.repository.history import PointEvent
from backupctl.repository.journal import Journal
from backupctl.repository.manifest import Manifest
from backupctl.repository.point import Point
from backupctl.repository.stored_files import NewFile, StoredFile
from backupctl.system import durable, safe_open

_log = logging.getLogger("backupctl.repository")

PARTIAL = ".partial"


@dataclass(frozen=True)
class PendingPoint:
    """A point that is not committed."""

    directory: Path
    vm: VmName
    point: PointId

    @property
    def path(self) -> Path:
        """Its directory."""
        return self.directory / f"{self.point}{PARTIAL}"

    def journal(self) -> Journal | None:
        """Return the run's journal; None if it is missing, damaged, or of another run.

        Raises RepositoryUnreadable: only the journal says whether the guest's freeze is ours to end.
        """
        try:
            journal = Journal.from_json(safe_open.read(self.path / journals.FILE_NAME, strict_json.MAX_BYTES))
        except (safe_open.NotThere, strict_json.Malformed):
            return None
        return journal if (journal.point, journal.vm) == (self.point, self.vm) else None

    def note(self, step: str, *, froze: bool) -> None:
        """Record durably how far the run is. Raises RepositoryError."""
        journal = self.journal()
        if journal is None:
            raise RepositoryError(f"the journal of {self.path} is missing")
        try:
            changed = replace(journal, step=step, froze=froze)
            durable.replace(self.path / journals.FILE_NAME, changed.to_json())
        except OSError as err:
            raise RepositoryError(f"cannot write to {self.path}: {err.strerror}") from err

    def store(self, files: Iterable[NewFile]) -> tuple[StoredFile, ...]:
        """Store the files that describe the VM, and return their entries for the manifest.

        Raises RepositoryError.
        """
        try:
            return stored_files.write(self.path, files)
        except OSError as err:
            raise RepositoryError(f"cannot write to {self.path}: {err.strerror}") from err
        except ValueError as err:
            raise RepositoryError(f"cannot store the definition of the VM: {err}") from err

    def commit(self, manifest: Manifest) -> Point:
        """Make this a recovery point. The rename in here is the commit of the whole system.

        The images must be complete. Raises RepositoryError; the point is then not committed.
        """
        try:
            # A manifest has names and texts from QEMU. A point that cannot be read again would be lost, with
            # the VM's bitmaps cleared for it.
            readable = Manifest.from_json(manifest.to_json()) == manifest
        except BackupctlError as err:
            raise RepositoryError(f"{self.path} was not committed: its manifest is invalid: {err}") from err
        if not readable:
            raise RepositoryError(f"{self.path} was not committed: its manifest would be read differently")
        try:
            # All that the manifest names is durable before the manifest, and that before the rename: after a
            # power failure a point under its final name is complete.
            for entry in manifest.disks:
                durable.sync_file(self.path / f"{entry.name}.qcow2")
                durable.sync_file(self.path / f"{entry.name}.digests")
            stored_files.sync(self.path, manifest.definition)
            durable.write_new(self.path / manifests.FILE_NAME, manifest.to_json())
            (self.path / journals.FILE_NAME).unlink()
            durable.sync_directory(self.path)
            # Before the rename: a point that is removed later is missed only if the history knows of it.
            history.record(self.directory, PointEvent("committed", self.point, manifest.checksum))
            # A crash before the next line leaves a directory that recovery drops; after it, a complete point.
            durable.rename(self.path, self.directory / self.point)
        except OSError as err:
            raise RepositoryError(f"cannot commit {self.path}: {err.strerror}") from err
        _log.debug("%s is committed", self.directory / self.point)
        return Point(self.directory / self.point, manifest)

    def uncommit(self) -> None:
        """Make a committed point an unfinished one again, for `drop`. Raises RepositoryError."""
        try:
            durable.rename(self.directory / self.point, self.path)
        except OSError as err:
            raise RepositoryError(f"cannot rename {self.directory / self.point}: {err.strerror}") from err

    def drop(self) -> None:
        """Remove the directory and all in it; after a crash in between it can be dropped again.

        Raises RepositoryError.
        """
        _log.debug("drop %s", self.path)
        try:
            with suppress(FileNotFoundError):
                _empty(self.path)  # first: on a full disk this frees the space for the history's line
                # Before the directory goes: a crash in between would leave a point that the history calls
                # committed, and nothing else of it: it would be reported as missing.
                history.undo(self.directory, self.point)
                shutil.rmtree(self.path)  # follows no symbolic link
        except OSError as err:
            raise RepositoryError(f"cannot remove {self.path}: {err.strerror}") from err


def _empty(directory: Path) -> None:
    if directory.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, "it is a symbolic link", str(directory))
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
