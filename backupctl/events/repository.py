# SPDX-License-Identifier: GPL-2.0-or-later
"""Events of whoever reads a repository: what is damaged, missing or could not be checked."""

from dataclasses import dataclass
from pathlib import Path

from backupctl.events import Event, WarningEvent
from backupctl.names import DiskName, PointId, VmName


@dataclass(frozen=True)
class HistoryMismatch(WarningEvent):
    """A VM's directory is not as its history says. point: which point; None if the history was changed."""

    code = "history-mismatch"
    vm: VmName
    point: PointId | None
    reason: str

    def _text(self) -> str:
        return f"{self.reason}; see `backupctl verify {self.vm}`"


@dataclass(frozen=True)
class PointGone(WarningEvent):
    """A bitmap in the VM names a point of which the repository knows nothing. path: of the repository."""

    code = "point-gone"
    vm: VmName
    point: PointId
    path: Path

    def _text(self) -> str:
        return (
            f"the recovery point {self.point}, from which a bitmap of {self.vm} records, is not in "
            f"{self.path}: somebody removed it, or put an older copy of the repository back"
        )


@dataclass(frozen=True)
class PointDamaged(WarningEvent):
    """A disk of a point cannot be restored; disk is None if the whole point is damaged."""

    code = "point-damaged"
    point: str
    disk: DiskName | None
    reason: str

    def _text(self) -> str:
        return f"{self.disk or 'all'} of {self.point} cannot be restored: {self.reason}"


@dataclass(frozen=True)
class DamageUnknown(WarningEvent):
    """The older points could not be checked for damage."""

    code = "damage-unknown"
    reason: str

    def _text(self) -> str:
        return f"cannot check older points for damage: {self.reason}"


@dataclass(frozen=True)
class DamageDetected(WarningEvent):
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
class NotChecked(WarningEvent):
    """A verify could not read something, so nothing is known about it. disk: "" for more than one disk."""

    code = "not-checked"
    vm: VmName
    path: Path
    disk: str
    reason: str

    def _text(self) -> str:
        return f"not checked: {self.reason}"


@dataclass(frozen=True)
class NothingToVerify(WarningEvent):
    """A repository has no recovery points."""

    code = "nothing-to-verify"
    path: Path

    def _text(self) -> str:
        return f"nothing to verify: there are no recovery points in {self.path}"


@dataclass(frozen=True)
class NoBackup(WarningEvent):
    """A VM of the configuration, or of a repository, has no recovery point there."""

    code = "no-backup"
    vm: VmName
    path: Path

    def _text(self) -> str:
        return f"there is no recovery point of {self.vm} in {self.path}"


@dataclass(frozen=True)
class SampleChosen(Event):
    """A verify reads only a part of the data. The same seed chooses the same part."""

    code = "sample-chosen"
    percent: float
    seed: int

    def _text(self) -> str:
        return f"a sample of {self.percent:g} % of the data is verified (--seed {self.seed} chooses it again)"
