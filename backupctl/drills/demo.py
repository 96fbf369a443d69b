# SPDX-License-Identifier: GPL-2.0-or-later
"""The actions of the demo: backups of a simulated VM, one of which fails, and restores that are compared.

A restored disk is compared with the simulator's own copy of that disk, made in the transaction.
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
from backupctl.operations.restore.request import RestoreRequest
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
    """A restored disk compared with the original. differs_at: first differing byte, None if equal."""

    point: PointId
    disk: str
    size: int
    differs_at: int | None


def check_tools() -> None:
    """Check that QEMU's tools, which pip does not install, are there. Raises UsageError."""
    missing = [name for variable, name in _TOOLS.items() if not shutil.which(os.environ.get(variable, name))]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} not found; backupctl needs QEMU's tools for its images, even in a demo",
            state="nothing changed",
            hint="or set QEMU_IMG and QEMU_STORAGE_DAEMON to their paths",
            next_command="apt install qemu-utils qemu-system-common",
        )


@dataclass
class Stage:
    """A running simulated VM, a repository, and the expected disks of the points so far.

    directory: of everything. moments: by point, copies of the disks as raw files.
    """

    directory: Path
    machine: SimulatedVm
    reporter: Reporter
    stop: Cancellation
    moments: dict[PointId, dict[str, Path]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.repository = Repository.create(self.directory / "repository")
        self.scratch = self.directory / "scratch"
        self.scratch.mkdir()

    @classmethod
    def machine_for(cls, directory: Path, seed: int) -> SimulatedVm:
        """Return the VM, not yet started."""
        return SimulatedVm(VM, directory, DISKS, ("--seed", str(seed), "--keep-moments"))

    def guest_writes(self, writes: int) -> None:
        """Let the guest make this many changes now, and then go on writing in the background."""
        self.machine.order("step", count=writes)
        self.machine.order("workload", **{"per-second": WRITES_PER_SECOND})

    def guest_rests(self) -> None:
        """Stop the guest's writes."""
        self.machine.order("workload", **{"per-second": 0})

    def changes(self) -> int:
        """Return how many changes the guest has made. Raises Failed if one of them failed."""
        guest = self.machine.order("status")
        if guest["failed-writes"]:
            raise Failed(f"{guest['failed-writes']} guest writes failed")
        return int(guest["writes"])

    def backup(self, kind: Kind) -> RunReport:
        """Make a backup, and keep the expected disks. Raises what a run raises."""
        options = RunOptions(kind, freeze=FreezeOptions("require"), scratch=ScratchOptions(self.scratch))
        report = backup.run(RunContext(self.machine.vm, self.repository, options, self.reporter, self.stop))
        kept = self.machine.order("moment")["disks"]
        self.moments[report.point] = {
            disk: Path(path).rename(self.directory / f"{report.point}-{disk}.moment")
            for disk, path in kept.items()
        }
        return report

    def failing(self, kind: Kind, fault: str) -> BackupctlError:
        """Make a backup that meets a fault, and return its error. Raises Failed if it did not fail."""
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
        raise Failed(f"the run did not fail, in spite of the fault {fault}")

    def dirty_bytes(self) -> dict[str, int]:
        """Return the dirty bytes of each disk's one recording bitmap. Raises Failed if it has none."""
        with Monitor.connect(self.machine.access.qmp, 30.0) as monitor:
            found = inventory.inventory(monitor, {}).disks
        idle = [disk.name for disk in found if [b.recording for b in disk.bitmaps] != [True]]
        if idle:
            raise Failed(f"{', '.join(idle)}: expected exactly one dirty bitmap, which records")
        return {disk.name: disk.bitmaps[0].dirty_bytes for disk in found}

    def check_clean(self) -> None:
        """Check that backupctl left nothing in the VM. Raises Failed."""
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
        """Restore a point and compare each disk with the original, byte by byte."""
        vm_directory = self.repository.vm(self.machine.vm.name)
        target = self.directory / "restored"
        target.mkdir()
        request = RestoreRequest(directory=vm_directory, point=point, to=str(target), image_format="raw")
        report = whole.restore(request, Silent(), self.stop)
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
