# SPDX-License-Identifier: GPL-2.0-or-later
"""Events of restore and serve."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from backupctl.events import Event, WarningEvent
from backupctl.names import DiskName, PointId, VmName


@dataclass(frozen=True)
class DisksNotRestored(WarningEvent):
    """A point does not hold every disk. newest: of each such disk, the newest earlier point with it."""

    code = "disks-not-restored"
    point: PointId
    newest: Mapping[DiskName, PointId]

    def _text(self) -> str:
        named = ", ".join(f"{disk} (newest point {point})" for disk, point in self.newest.items())
        return (
            f"{self.point} does not hold every disk of the VM. Not restored: {named}. "
            "--all-disks restores these from there."
        )


@dataclass(frozen=True)
class DiskFromEarlierPoint(Event):
    """With --all-disks: a disk that the point does not hold is restored as it was at `earlier`."""

    code = "disk-from-earlier-point"
    disk: DiskName
    point: PointId
    earlier: PointId

    def _text(self) -> str:
        return f"{self.disk} is not in {self.point}: it is restored as it was at {self.earlier}"


@dataclass(frozen=True)
class RestoredWithDamage(WarningEvent):
    """Damaged data was let through, as it was asked for. ranges: where, in words."""

    code = "restored-with-damage"
    disk: DiskName
    ranges: str

    def _text(self) -> str:
        return f"{self.disk}: restored with damaged data: {self.ranges}"


@dataclass(frozen=True)
class RestoredUnverified(WarningEvent):
    """The digests that would prove a restored disk cannot be read."""

    code = "restored-unverified"
    disk: DiskName
    reason: str

    def _text(self) -> str:
        return f"{self.disk}: restored, but not verified: {self.reason}"


@dataclass(frozen=True)
class AttributesNotKept(WarningEvent):
    """A file that was replaced had an owner, mode or label that the new one could not get."""

    code = "attributes-not-kept"
    path: Path
    attributes: tuple[str, ...]

    def _text(self) -> str:
        return (
            f"{self.path} replaced a file, but could not be given its {', '.join(self.attributes)}. "
            "Check that the VM can open it"
        )


@dataclass(frozen=True)
class TargetResized(Event):
    """An image that is changed in place gets the disk's size. Sizes in bytes."""

    code = "target-resized"
    path: Path
    old_size: int
    new_size: int

    def _text(self) -> str:
        return f"{self.path} is resized from {self.old_size} to {self.new_size} bytes, the size of the disk"


@dataclass(frozen=True)
class TargetLarger(Event):
    """A device is larger than the disk; the rest of it is left unchanged."""

    code = "target-larger"
    path: Path
    disk: DiskName
    extra_bytes: int

    def _text(self) -> str:
        return (
            f"{self.path} is {self.extra_bytes} bytes larger than {self.disk}; "
            "the rest of the device is left unchanged"
        )


@dataclass(frozen=True)
class PointMustStay(Event):
    """Overlays were made whose backing file is in a point."""

    code = "point-must-stay"
    vm: VmName
    point: PointId

    def _text(self) -> str:
        return (
            f"these overlays need the recovery point {self.point} to stay: "
            f"backupctl protect {self.vm} {self.point}"
        )


@dataclass(frozen=True)
class ServedToLocalUsers(WarningEvent):
    """Disks are served over TCP, where every local user can read them. overlay: they can write to it."""

    code = "served-to-local-users"
    disk: str | None
    overlay: Path | None

    def _text(self) -> str:
        what = self.disk or "these disks"
        may = f"read {what}" + (f", and write to the overlay {self.overlay}" if self.overlay else "")
        return (
            f"NBD over TCP has no authentication: every local user of this machine can {may}. "
            "--socket PATH serves on a unix socket that only you and root can use; from another machine: "
            "ssh -L 10809:PATH HOST"
        )


@dataclass(frozen=True)
class OverlayKept(Event):
    """The writable overlay of a serve stays when the server ends."""

    code = "overlay-kept"
    path: Path

    def _text(self) -> str:
        return f"written data is in {self.path}; delete it when it is no longer needed"


@dataclass(frozen=True)
class FileSystemIncomplete(WarningEvent):
    """A file system of a guest can be read, but something in it may be missing. place: such as vda1."""

    code = "file-system-incomplete"
    place: str
    reason: str

    def _text(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(frozen=True)
class FilesSkipped(WarningEvent):
    """Some things of a guest were not copied. path: the first one. reason: why that was not."""

    code = "files-skipped"
    count: int
    path: str
    reason: str

    def _text(self) -> str:
        return f"{self.count} not copied, among them {self.path} ({self.reason})"


@dataclass(frozen=True)
class DomainNote(WarningEvent):
    """Something in a domain that --define has made needs a look before it is started."""

    code = "domain-note"
    domain: str
    note: str

    def _text(self) -> str:
        return f"domain {self.domain}: {self.note}"
