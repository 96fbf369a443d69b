# SPDX-License-Identifier: GPL-2.0-or-later
"""What the demo does: backups of a simulated VM, one of which is made to fail, and the proof by restoring.

The frozen moment that a restored disk is compared with comes from the simulator: its own copy of the
guest's disks, taken at the transaction.
"""

import itertools
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.drills.simulated_vm import SimulatedVm
from backupctl.errors import BackupctlError, Failed, NeedsRecovery, UsageError
from backupctl.names import PointId
from backupctl.operations import status
from backupctl.operations.backup import run as backup
from backupctl.operations.backup.context import RunContext
from backupctl.operations.backup.outcome import RunReport
from backupctl.operations.restore import whole
from backupctl.options import FreezeOptions, Kind, RunOptions, ScratchOptions
from backupctl.progress import Reporter, Silent
from backupctl.repository.point import Point
from backupctl.repository.repository import Repository
from backupctl.vm.qmp import inventory
from backupctl.vm.qmp.monitor import Monitor

VM = "web"
FORMATS = {"vda": "qcow2", "vdb": "raw"}
DISKS = tuple(f"{name}=32M,format={form}" for name, form in FORMATS.items())
WRITES_PER_SECOND = 100
_PIECE_BYTES = 1 << 20
_TOOLS = {"QEMU_IMG": "qemu-img", "QEMU_STORAGE_DAEMON": "qemu-storage-daemon"}


@dataclass(frozen=True)
class Comparison:
    """A restored disk beside the disk's frozen moment. differs_at: the first byte that differs."""

    point: PointId
    disk: str
    size: int
    differs_at: int | None


def check_tools() -> None:
    """Look for what pip does not bring. Raises UsageError, naming what is missing."""
    missing = [name for variable, name in _TOOLS.items() if not shutil.which(os.environ.get(variable, name))]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} can't be found; the repository's images need them, even in a demo",
            state="nothing was touched",
            hint="or name them by QEMU_IMG and QEMU_STORAGE_DAEMON",
            next_command="apt install qemu-utils qemu-system-common",
        )


@dataclass
class Stage:
    """A simulated VM that runs, a repository, and the moments of the points so far.

    folder: where all of it lies. moments: of each point, copies of the disks as raw files.
    """

    folder: Path
    machine: SimulatedVm
    reporter: Reporter
    stop: Cancellation
    moments: dict[PointId, dict[str, Path]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.repository = Repository.create(self.folder / "repository")
        self.scratch = self.folder / "scratch"
        self.scratch.mkdir()

    @classmethod
    def machine_for(cls, folder: Path, seed: int) -> SimulatedVm:
        """Return the VM, not yet started."""
        return SimulatedVm(VM, folder, DISKS, ("--seed", str(seed), "--keep-moments"))

    def guest_writes(self, writes: int) -> None:
        """Let the guest make so many changes at once, then go on in the background."""
        self.machine.order("step", count=writes)
        self.machine.order("workload", **{"per-second": WRITES_PER_SECOND})

    def guest_rests(self) -> None:
        """Let the guest write no more."""
        self.machine.order("workload", **{"per-second": 0})

    def changes(self) -> int:
        """Return how many changes the guest has made. Raises Failed if one of them failed."""
        guest = self.machine.order("status")
        if guest["failed-writes"]:
            raise Failed(f"the guest came to harm: {guest['failed-writes']} of its writes failed")
        return int(guest["writes"])

    def backup(self, kind: Kind) -> RunReport:
        """Make a point, and keep its moment. Raises what a run raises."""
        options = RunOptions(kind, freeze=FreezeOptions("require"), scratch=ScratchOptions(self.scratch))
        report = backup.run(RunContext(self.machine.vm, self.repository, options, self.reporter, self.stop))
        kept = self.machine.order("moment")["disks"]
        self.moments[report.point] = {
            disk: Path(path).rename(self.folder / f"{report.point}-{disk}.moment")
            for disk, path in kept.items()
        }
        return report

    def failing(self, kind: Kind, fault: str) -> BackupctlError:
        """Make a run meet a fault; returns what it failed with. Raises Failed if it did not fail."""
        self.machine.order("fault", spec=fault)
        try:
            self.backup(kind)
        except NeedsRecovery:
            raise
        except Failed as err:
            self.stop.check()
            return err
        finally:
            self.machine.order("clear-faults")
        raise Failed(f"the run was to fail, with the fault {fault}, and did not")

    def dirty_bytes(self) -> dict[str, int]:
        """Return what each disk's bitmap has marked, in bytes. Raises Failed unless all record."""
        with Monitor.connect(self.machine.vm.qmp, 30.0) as monitor:
            found = inventory.inventory(monitor, {}).disks
        idle = [disk.name for disk in found if [b.recording for b in disk.bitmaps] != [True]]
        if idle:
            raise Failed(f"{', '.join(idle)}: there was to be one bitmap, and it was to record")
        return {disk.name: disk.bitmaps[0].dirty_bytes for disk in found}

    def check_at_rest(self) -> None:
        """Look whether anything of ours is left in the VM. Raises Failed, naming it."""
        options = RunOptions("incremental", scratch=ScratchOptions(self.scratch))
        found = status.look(self.machine.vm, self.repository, options)
        left = [*found.leftovers, *([found.problem] if found.problem else [])]
        if self.machine.order("status")["frozen"]:
            left.append("a frozen guest")
        if left:
            raise Failed(f"left behind: {', '.join(left)}")

    def points(self) -> tuple[Point, ...]:
        """Return the points, oldest first."""
        return self.repository.vm(self.machine.vm.name).points()

    def compare(self, point: PointId) -> Iterator[Comparison]:
        """Restore a point and compare each disk with its moment, byte by byte."""
        vm_folder = self.repository.vm(self.machine.vm.name)
        target = self.folder / "restored"
        target.mkdir()
        report = whole.restore(
            vm_folder,
            vm_folder.point(point),
            to=str(target),
            disk=None,
            image_format="raw",
            force=False,
            reporter=Silent(),
            stop=self.stop,
        )
        for one in report.images:
            at = first_difference(Path(one.path), self.moments[point][one.name])
            yield Comparison(point, one.name, one.size, at)
        shutil.rmtree(target)


def first_difference(one: Path, other: Path) -> int | None:
    """Return the offset of the first byte that differs, or where the shorter file ends; None if equal."""
    at = 0
    with one.open("rb") as left, other.open("rb") as right:
        while True:
            mine, theirs = left.read(_PIECE_BYTES), right.read(_PIECE_BYTES)
            if mine != theirs:
                equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(mine, theirs, strict=False))
                return at + sum(1 for _ in equal)
            if not mine:
                return None
            at += len(mine)
