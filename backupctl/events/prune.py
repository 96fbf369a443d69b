# SPDX-License-Identifier: GPL-2.0-or-later
"""Events of prune."""

from collections.abc import Mapping
from dataclasses import dataclass

from backupctl.events import Event, WarningEvent
from backupctl.names import DiskName, PointId, VmName


@dataclass(frozen=True)
class PointDropped(Event):
    """A prune dropped a point; its data is merged or removed afterwards."""

    code = "point-dropped"
    point: PointId

    def _text(self) -> str:
        return f"dropped {self.point}"


@dataclass(frozen=True)
class NextRunReadsAll(Event):
    """The newest point of a disk was deleted, for which the VM has its bitmap."""

    code = "next-run-reads-all"
    disk: DiskName
    point: PointId

    def _text(self) -> str:
        return (
            f"{self.disk}: the newest point {self.point} is deleted, so the next incremental reads all of "
            "the disk, unless the VM keeps the bitmap of the point before"
        )


@dataclass(frozen=True)
class LeftForNextPrune(WarningEvent):
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
class VmFailed(WarningEvent):
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
        return f"{self.vm}: only the command line's rules apply; configured rules not used: {listed}"
