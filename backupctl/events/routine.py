# SPDX-License-Identifier: GPL-2.0-or-later
"""Events of `run`: what is due for a VM, and what becomes of each of several."""

from dataclasses import dataclass

from backupctl.events import Event
from backupctl.names import VmName


@dataclass(frozen=True)
class FullDue(Event):
    """A full is taken in place of an incremental, because its policy says so."""

    code = "full-due"
    vm: VmName

    def _text(self) -> str:
        return f"{self.vm} has no full of this period yet (full_every): all disks are read"


@dataclass(frozen=True)
class TaskSkipped(Event):
    """A task of a run is left out. task: backup (the VM is off), prune or verify."""

    code = "task-skipped"
    vm: VmName
    task: str
    reason: str

    def _text(self) -> str:
        return f"no {self.task}: {self.reason}"


@dataclass(frozen=True)
class WaitingForLock(Event):
    """Another run works on the VM; this one waits for its end."""

    code = "waiting-for-lock"
    vm: VmName
    seconds: float
    reason: str

    def _text(self) -> str:
        return f"{self.reason}; waiting for at most {self.seconds:g} s"


@dataclass(frozen=True)
class StartDelayed(Event):
    """The start is put off by a random time."""

    code = "start-delayed"
    seconds: float

    def _text(self) -> str:
        return f"starting in {self.seconds:.0f} s (--random-delay)"


@dataclass(frozen=True)
class VmStarted(Event):
    """Work on one of several VMs begins."""

    code = "vm-started"
    vm: VmName

    def _text(self) -> str:
        return f"{self.vm}: started"


@dataclass(frozen=True)
class VmEnded(Event):
    """Work on one of several VMs has ended."""

    code = "vm-ended"
    vm: VmName
    exit_code: int
    seconds: float

    def _text(self) -> str:
        done = "done" if self.exit_code == 0 else f"ended with exit code {self.exit_code}"
        return f"{self.vm}: {done} after {self.seconds:.1f} s"
