# SPDX-License-Identifier: GPL-2.0-or-later
"""What happens during a command, for whoever watches it: one class for each thing a program may react to.

An event has fields, a stable `code`, a `severity` and one English sentence, `text`. Screens show the
text. Programs go by code and fields, because texts may be reworded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from backupctl.names import DiskName, PointId, VmName

Severity = Literal["step", "note", "warning"]
"""A step has begun; something to know, e.g. why a disk is read in full; something to act on."""


@dataclass(frozen=True)
class Event:
    """Base of all. code: stable, whatever the class or the text is called later."""

    code: ClassVar[str]

    @property
    def severity(self) -> Severity:
        """How much it matters."""
        return "note"

    @property
    def text(self) -> str:
        """What happened, as one line."""
        return self._text()

    def _text(self) -> str:
        raise NotImplementedError


class _Warning(Event):
    @property
    def severity(self) -> Severity:
        return "warning"


@dataclass(frozen=True)
class StepStarted(Event):
    """A step of the command begins. step: its name; the steps of a backup are in docs/protocol.md."""

    code = "step-started"
    step: str

    @property
    def severity(self) -> Severity:
        """Return "step"."""
        return "step"

    def _text(self) -> str:
        return self.step


# --- backup and recovery ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recovered(Event):
    """Something that an earlier run left was finished or undone."""

    code = "recovered"
    action: str

    def _text(self) -> str:
        return f"from an earlier run: {self.action}"


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
class DiskSkipped(Event):
    """A disk of the VM is never backed up, e.g. a read-only medium."""

    code = "disk-skipped"
    disk: str
    reason: str

    def _text(self) -> str:
        return f"{self.disk} is left out: {self.reason}"


@dataclass(frozen=True)
class DiskMissing(_Warning):
    """Earlier points hold a disk that the VM does not have any more. point: the newest that holds it."""

    code = "disk-missing"
    disk: DiskName
    point: PointId

    def _text(self) -> str:
        return f"{self.disk} is not backed up: it is not among the VM's disks; {self.point} still holds it"


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
class CrashConsistent(_Warning):
    """The guest was not frozen, or may not have been when the point in time was taken."""

    code = "crash-consistent"
    reason: str

    def _text(self) -> str:
        return f"not frozen, this recovery point is only crash-consistent: {self.reason}"


@dataclass(frozen=True)
class ScratchMayNotSuffice(_Warning):
    """The scratch files are smaller than a guest that overwrites all of its data would need."""

    code = "scratch-may-not-suffice"
    disks: tuple[DiskName, ...]
    folder: Path
    allocated_bytes: int
    needed_bytes: int

    def _text(self) -> str:
        return (
            f"the scratch file of {', '.join(self.disks)} may not suffice: {self.allocated_bytes >> 20} MiB "
            f"are allocated in {self.folder}; {self.needed_bytes >> 20} MiB are needed if the guest "
            "overwrites all of its data. If it fills up, the backup is aborted and the guest goes on"
        )


# --- what is stored -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class HistoryMismatch(_Warning):
    """A VM's folder is not as its history says. point: which point; None if the history was changed."""

    code = "history-mismatch"
    vm: VmName
    point: PointId | None
    reason: str

    def _text(self) -> str:
        return f"{self.reason}; see `backupctl verify {self.vm}`"


@dataclass(frozen=True)
class PointDamaged(_Warning):
    """A disk of a point cannot be restored; disk is None if the whole point is damaged."""

    code = "point-damaged"
    point: str
    disk: DiskName | None
    reason: str

    def _text(self) -> str:
        return f"{self.disk or 'all'} of {self.point} cannot be restored: {self.reason}"


@dataclass(frozen=True)
class DamageUnknown(_Warning):
    """The older points could not be checked for damage."""

    code = "damage-unknown"
    reason: str

    def _text(self) -> str:
        return f"cannot check older points for damage: {self.reason}"


@dataclass(frozen=True)
class DamageDetected(_Warning):
    """A verify found damage. kind: of what, as in its report."""

    code = "damage-detected"
    vm: VmName
    kind: str
    path: Path
    disk: str
    reason: str

    def _text(self) -> str:
        return self.reason


@dataclass(frozen=True)
class NotChecked(_Warning):
    """A verify could not read something, so nothing is known about it. disk: "" for more than one disk."""

    code = "not-checked"
    vm: VmName
    path: Path
    disk: str
    reason: str

    def _text(self) -> str:
        return f"not checked: {self.reason}"


@dataclass(frozen=True)
class NothingToVerify(_Warning):
    """A repository has no recovery points."""

    code = "nothing-to-verify"
    path: Path

    def _text(self) -> str:
        return f"nothing to verify: there are no recovery points in {self.path}"


@dataclass(frozen=True)
class SampleChosen(Event):
    """A verify reads only a part of the data. The same seed chooses the same part."""

    code = "sample-chosen"
    percent: float
    seed: int

    def _text(self) -> str:
        return f"a sample of {self.percent:g} %; for the same sample: --seed {self.seed}"


# --- prune --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PointDropped(Event):
    """A prune dropped a point; its data is merged or removed afterwards."""

    code = "point-dropped"
    point: PointId

    def _text(self) -> str:
        return f"dropped {self.point}"


@dataclass(frozen=True)
class LeftForNextPrune(_Warning):
    """A prune could not do everything now; the next one goes on."""

    code = "left-for-next-prune"
    reason: str

    def _text(self) -> str:
        return self.reason


@dataclass(frozen=True)
class VmSkipped(Event):
    """A prune of all VMs had nothing to do for one."""

    code = "vm-skipped"
    vm: str
    reason: str

    def _text(self) -> str:
        return f"skipped {self.vm}: {self.reason}"


@dataclass(frozen=True)
class VmFailed(_Warning):
    """A command for all VMs failed for one, and goes on with the others."""

    code = "vm-failed"
    vm: str
    reason: str

    def _text(self) -> str:
        return f"{self.vm}: {self.reason}"


@dataclass(frozen=True)
class ConfiguredRulesNotUsed(Event):
    """The retention rules on the command line replace all rules of the configuration."""

    code = "configured-rules-not-used"
    vm: VmName
    rules: Mapping[str, object]

    def _text(self) -> str:
        listed = ", ".join(f"{key} = {value}" for key, value in self.rules.items())
        return (
            f"{self.vm}: the rules on the command line are the whole policy; "
            f"configured rules not used: {listed}"
        )


# --- restore and serve --------------------------------------------------------------------------------


@dataclass(frozen=True)
class DisksNotRestored(_Warning):
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
class RestoredWithDamage(_Warning):
    """Damaged data was let through, as it was asked for. ranges: where, in words."""

    code = "restored-with-damage"
    disk: DiskName
    ranges: str

    def _text(self) -> str:
        return f"{self.disk}: restored with damage: {self.ranges}"


@dataclass(frozen=True)
class RestoredUnverified(_Warning):
    """The digests that would prove a restored disk cannot be read."""

    code = "restored-unverified"
    disk: DiskName
    reason: str

    def _text(self) -> str:
        return f"{self.disk}: restored, but not verified: {self.reason}"


@dataclass(frozen=True)
class AttributesNotKept(_Warning):
    """A file that was replaced had an owner, mode or label that the new one could not get."""

    code = "attributes-not-kept"
    path: Path
    attributes: tuple[str, ...]

    def _text(self) -> str:
        return (
            f"{self.path} replaces a file, of which could not be kept: {', '.join(self.attributes)}. "
            "Check that the VM may open it"
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
        return f"these images need {self.vm} {self.point} to stay: backupctl protect {self.vm} {self.point}"


@dataclass(frozen=True)
class ServedToLocalUsers(_Warning):
    """Disks are served over TCP, where every local user can read them. overlay: they can write to it."""

    code = "served-to-local-users"
    disk: str | None
    overlay: str | None

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
    path: str

    def _text(self) -> str:
        return f"the writes are in {self.path}; remove it when it is not needed any more"
