# SPDX-License-Identifier: GPL-2.0-or-later
"""Events of full, incremental and recover."""

from dataclasses import dataclass
from pathlib import Path

from backupctl.events import Event, Severity, WarningEvent
from backupctl.names import DiskName, PointId, VmName


@dataclass(frozen=True)
class RecoveredFromEarlierRun(Event):
    """Something that an earlier run left was finished or undone."""

    code = "recovered-from-earlier-run"
    action: str

    def _text(self) -> str:
        return f"from an earlier run: {self.action}"


@dataclass(frozen=True)
class ImagesRead(Event):
    """The VM is off, so its images are backed up."""

    code = "images-read"
    vm: VmName

    def _text(self) -> str:
        return f"{self.vm} is off: its images are backed up as they are"


@dataclass(frozen=True)
class RepositoryCreated(Event):
    """There was no repository, so the first full made one."""

    code = "repository-created"
    path: Path

    def _text(self) -> str:
        return (
            f"created a new repository in {self.path}; "
            "if you expected an existing one, check that its file system is mounted"
        )


@dataclass(frozen=True)
class OtherToolFound(Event):
    """Another program left bitmaps or checkpoints in the VM of which this is the first point."""

    code = "other-tool-found"
    said: str
    removal: tuple[str, ...]

    def _text(self) -> str:
        return f"{self.said}; if you have left it, this removes them: {'; '.join(self.removal):.400}"


@dataclass(frozen=True)
class DiskSkipped(Event):
    """A disk of the VM is never backed up, e.g. a read-only medium."""

    code = "disk-skipped"
    disk: str
    reason: str

    def _text(self) -> str:
        return f"{self.disk} is left out: {self.reason}"


@dataclass(frozen=True)
class DefinitionIncomplete(WarningEvent):
    """A part of what describes the VM cannot be stored with the point; the disks are not affected."""

    code = "definition-incomplete"
    reason: str

    def _text(self) -> str:
        return f"the definition of the VM is stored without a part: {self.reason}"


@dataclass(frozen=True)
class DiskMissing(WarningEvent):
    """Earlier points hold a disk that the VM does not have any more. point: the newest that holds it."""

    code = "disk-missing"
    disk: DiskName
    point: PointId

    def _text(self) -> str:
        return f"{self.disk} is not backed up: it is not among the VM's disks; {self.point} still holds it"


@dataclass(frozen=True)
class VmRenamed(WarningEvent):
    """The VM has no points under its name, and another VM of the repository was once called so."""

    code = "vm-renamed"
    vm: VmName
    new_name: VmName

    def _text(self) -> str:
        return (
            f"{self.vm} was renamed to {self.new_name} in this repository, and begins anew under its old "
            "name; to go on with its points, change its name in the configuration"
        )


@dataclass(frozen=True)
class NoPointToBuildOn(Event):
    """An incremental was asked for, and there is no point yet: it becomes a full."""

    code = "no-point-to-build-on"

    def _text(self) -> str:
        return "there is no point to build on yet: this is a full"


@dataclass(frozen=True)
class DiskScanned(Event):
    """A disk is read in full and compared with `base`, because no bitmap tells what changed.

    damaged: the reason is damage in the repository.
    """

    code = "disk-scanned"
    disk: DiskName
    base: PointId
    reason: str
    damaged: bool

    @property
    def severity(self) -> Severity:
        """Return "warning" for damage."""
        return "warning" if self.damaged else "note"

    def _text(self) -> str:
        return f"{self.disk} is read in full and compared with {self.base}: {self.reason}"


@dataclass(frozen=True)
class DiskTakenFull(Event):
    """A disk is stored in full inside an incremental. damaged: the reason is damage in the repository."""

    code = "disk-taken-full"
    disk: DiskName
    reason: str
    damaged: bool

    @property
    def severity(self) -> Severity:
        """Return "warning" for damage."""
        return "warning" if self.damaged else "note"

    def _text(self) -> str:
        return f"{self.disk} is taken full: {self.reason}"


@dataclass(frozen=True)
class BitmapNotPersistent(Event):
    """A disk's format stores no dirty bitmap. full: the point is a full.

    A warning for a full only: repeated with every incremental it would hide what is new.
    """

    code = "bitmap-not-persistent"
    disk: DiskName
    format: str
    full: bool

    @property
    def severity(self) -> Severity:
        """Return "warning" for a full."""
        return "warning" if self.full else "note"

    def _text(self) -> str:
        return (
            f"{self.disk} is {self.format}, so its dirty bitmap does not survive a restart of QEMU; "
            "the next incremental will then read the whole disk"
        )


@dataclass(frozen=True)
class DiskEncrypted(Event):
    """A disk is encrypted in the VM, and its backup is not. full: as for `BitmapNotPersistent`."""

    code = "disk-encrypted"
    disk: DiskName
    full: bool

    @property
    def severity(self) -> Severity:
        """Return "warning" for a full."""
        return "warning" if self.full else "note"

    def _text(self) -> str:
        return (
            f"{self.disk} is encrypted in the VM, and its backup is not: it is stored as the guest sees it. "
            "Encrypt the repository's file system if that matters"
        )


@dataclass(frozen=True)
class CrashConsistent(WarningEvent):
    """The guest was not frozen, or may not have been when the point in time was taken."""

    code = "crash-consistent"
    reason: str

    def _text(self) -> str:
        return f"not frozen, this recovery point is only crash-consistent: {self.reason}"


@dataclass(frozen=True)
class ScratchMayNotSuffice(WarningEvent):
    """The scratch files are smaller than a guest that overwrites all of its data would need."""

    code = "scratch-may-not-suffice"
    disks: tuple[DiskName, ...]
    directory: Path
    allocated_bytes: int
    needed_bytes: int

    def _text(self) -> str:
        return (
            f"the scratch file of {', '.join(self.disks)} may not suffice: {self.allocated_bytes >> 20} MiB "
            f"are allocated in {self.directory}; {self.needed_bytes >> 20} MiB are needed if the guest "
            "overwrites all of its data. If it fills up, the backup is aborted and the guest goes on"
        )
