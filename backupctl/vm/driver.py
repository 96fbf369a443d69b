# SPDX-License-Identifier: GPL-2.0-or-later
"""THE seam between a backup and the kind of VM: what a driver can do, and the plain data that cross it.

::

    operations/  run, recover, status, doctor, bitmaps
         │   PointFacts, Request                     (what the repository knows; plain data)
         ▼
      Driver ── begin ──► Session                    (vm/open_driver.py opens the right one)
         │                   │
         ▼                   ▼
      vm/qmp/            QEMU's monitor, the guard, the guest agent

A `Driver` is one open connection to one VM. It answers questions (`inventory`, `bitmaps`, `leftovers`), and
it can finish or undo what any earlier run left (`resolve`). A `Session` is one backup of that VM, from the
start of the guard to its end. The order of its calls is that of the ten steps (see
`operations/backup/run.py`)::

    ping_guest?  attach  (freeze?  start  thaw?)  exports  check…  confirm  end  resolve

What each kind of VM does in them:

==========  ===========================  ==============================  ===========================
call        plain QMP                    libvirt                         images of a VM that is off
==========  ===========================  ==============================  ===========================
attach      scratch nodes, filters       scratch files                   nothing: the images are locked
freeze      guest agent's socket         virDomainFSFreeze               no guest: AgentUnavailable
start       one transaction              virDomainBackupBegin            nothing: they do not change
exports     NBD server, one per disk     the sockets of that backup      as plain QMP, of the images
end         remove exports, jobs, nodes  virDomainAbortJob, and drain    and change the stored bitmaps
resolve     merge or remove bitmaps      delete checkpoints              merge or remove bitmaps
==========  ===========================  ==============================  ===========================

A domain of libvirt that is off is as any VM that is off, with checkpoints for bitmaps.

Rules for every driver:

1. Nothing is remembered between runs. `resolve` asks the VM what there is, and the repository one question:
is the point committed? So it may be cut off anywhere, and the next call goes on. 2. The name of a bitmap (or
checkpoint) is its state: see `names.Namespace.bitmap`. 3. No NBD client of ours goes away before its export
has: on an iothread QEMU 7.2 aborts (``test_sigkill_in_mid_copy_leaves_a_guest_on_an_iothread_alive``). While
exports go, their clients are drained. 4. Every call ends in time. If it is not known whether a command took
effect, that is `OutcomeUnknown`.
"""

import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from backupctl.finding import Finding
from backupctl.names import BitmapName, DiskName, Namespace, NodeName, PointId
from backupctl.options import RunOptions, ScratchOptions, ViewKind
from backupctl.vm.bitmap import Bitmap
from backupctl.vm.definition import Definition
from backupctl.vm.disk import Disk, Inventory
from backupctl.vm.filling import Filling


@dataclass(frozen=True)
class RunDisk:
    """One disk of an unfinished run, as its journal has it.

    node: the active node when the run began. number: its place in the run; part of the names of all that was
    made for it.
    """

    name: DiskName
    node: NodeName
    number: int


@dataclass(frozen=True)
class UnfinishedRun:
    """What the journal of an unfinished run tells, and the VM cannot.

    may_export: whether it may have started an NBD server.
    """

    disks: tuple[RunDisk, ...]
    may_export: bool


class PointFacts(Protocol):
    """What the repository knows of a VM's points. Each call looks anew; each may raise RepositoryError."""

    @property
    def namespace(self) -> Namespace:
        """The names of what this repository has in the VM."""

    def is_committed(self, point: PointId) -> bool:
        """Whether the point's directory has its final name: THE question of every recovery."""

    def is_another_vms(self, point: PointId) -> bool:
        """Whether a point belongs to another VM of the repository, whose disk this one was."""

    def what_became_of(self, named: Iterable[PointId]) -> Mapping[PointId, str]:
        """Return, in words behind their name, why points are not there, of those that were once committed.

        A point of an unfinished run, or of another VM, is not among them.
        """

    def checkpoints(self) -> int:
        """Return how many bitmaps of older points stay in the VM for differentials."""

    def unfinished(self) -> Sequence[UnfinishedRun]:
        """Return what the journals of unfinished runs tell."""


@dataclass(frozen=True)
class ScratchBudget:
    """How much scratch space one disk gets. All in bytes.

    size: what is reserved. ideal_bytes: what would do if the guest overwrote all that the disk holds.
    abort_at: with so much used the run is given up; None if the file cannot be used up. throttle_at: QEMU
    itself makes the guest wait there; None if it cannot.
    """

    size: int
    ideal_bytes: int
    abort_at: int | None
    throttle_at: int | None


@dataclass(frozen=True)
class DiskSnapshot:
    """One disk's part of the point in time.

    new: the bitmap that records from then on. bases: those that recorded up to it, oldest first; none for a
    full, which leaves the old chain's bitmap as it is, and for a scan.
    """

    disk: Disk
    new: BitmapName
    bases: tuple[BitmapName, ...] = ()


@dataclass(frozen=True)
class Request:
    """What a session is asked for. budgets: the scratch space of each disk, in the order of `disks`.

    will_freeze: whether the guest will certainly be frozen when the point in time is taken.
    """

    facts: PointFacts
    disks: tuple[DiskSnapshot, ...]
    budgets: tuple[ScratchBudget, ...]
    scratch_directory: Path
    view: ViewKind
    will_freeze: bool


@dataclass(frozen=True)
class Export:
    """One exported disk, with connected sockets on which nothing was said yet.

    name: NBD's name of the export. bitmap: the name in ``qemu:dirty-bitmap:NAME``, None for a full.
    """

    name: str
    bitmap: str | None
    sockets: tuple[socket.socket, ...]

    def close(self) -> None:
        """Close the sockets."""
        for sock in self.sockets:
            sock.close()


@dataclass(frozen=True)
class Thawed:
    """The end of a freeze. doubt: why it may have ended before the point in time; "" if it did not."""

    milliseconds: float
    doubt: str


@dataclass(frozen=True)
class Foreseen:
    """A VM as it will be when recovery is done, without anything being done.

    leftovers: what there is to clean up, in words.
    """

    inventory: Inventory
    leftovers: tuple[str, ...]


class Resolver(Protocol):
    """Whatever can finish or undo runs: a driver those of others, a session its own as well."""

    @property
    def has_guest(self) -> bool:
        """Whether a guest may run. False for the images of a VM that is off: then nothing can be frozen."""

    def resolve(self, facts: PointFacts) -> list[str]:
        """Finish the runs whose points are committed, and undo the others; return what was done, in words.

        Exports, jobs, nodes and scratch files of ours go; then, in one step for all disks, the bitmaps: what
        an unfinished one recorded goes back to its base, and a base that a committed one replaces is removed.
        Doing it again does nothing more. Raises MonitorError; what is left is found by the next call.
        """

    def sweep_scratch(self, namespace: Namespace, directory: Path) -> list[str]:
        """Remove the scratch files with names that dead runs left; return what was done, in words.

        directory: on the machine that the VM runs on, for all scratch files. Raises Failed, MonitorError.
        """


class Session(Resolver, Protocol):
    """One backup of one VM. As long as it lasts, a guard thaws the guest if this process dies."""

    @property
    def guarded(self) -> bool:
        """Whether the guard is alive, and so has the guest agent, which serves one client at a time."""

    def stand_by(self) -> None:
        """Wait until the guard is there. To be called before the VM is touched. Raises GuardLost."""

    def ping_guest(self) -> None:
        """Check that the guest can be frozen, and is not. Raises AgentError, Refused if it is frozen.

        AgentUnavailable where there is nothing to freeze; the run then goes on unless it must freeze.
        """

    def attach(self, request: Request) -> None:
        """Prepare all that may take time and changes nothing for the guest; then register it with the guard.

        Raises Failed if a disk changed since it was listed, MonitorError, GuardLost, Refused.
        """

    def refuse_unfrozen(self) -> None:
        """Raise ViewUnavailable if, without a freeze, the disks would not be of one point in time."""

    def freeze(self, budget_seconds: float) -> int:
        """Freeze the guest's file systems for at most so long; return how many there are, not 0.

        Raises Refused if somebody else froze it, AgentRefused if the guest is not frozen, AgentError,
        GuardLost.
        """

    def start(self) -> None:
        """Take THE point in time of all disks: bitmaps change hands, and copy-before-write begins.

        While the guest is frozen it waits for its answer no longer than the freeze may last. Raises
        MonitorError.
        """

    def thaw(self) -> Thawed:
        """Thaw the guest. Raises FreezeOverrun if the guard had to do that before, AgentError, GuardLost."""

    def exports(self) -> tuple[Export, ...]:
        """Export each disk as it was at the point in time, in the order of the request.

        Raises Failed if a disk was resized meanwhile, MonitorError, GuardLost.
        """

    def on_close(self, close: Callable[[], None]) -> None:
        """Have a client of an export closed when no export is left that its leaving could harm."""

    def check(self) -> None:
        """Raise what must end the run now: a dead VM or guard, a scratch file that fills up. Never waits."""

    def confirm(self) -> None:
        """Raise Failed unless all that was read is of the point in time. To be called after the last byte."""

    def end(self, facts: PointFacts) -> None:
        """Remove exports, jobs and nodes; bitmaps stay as they are until `resolve`. Raises MonitorError."""

    def await_thaw(self) -> None:
        """Wait until the guest is certainly thawed, by the guard or without it. Raises AgentError."""


class Driver(Resolver, Protocol):
    """One VM, connected. `open_driver.open_driver` opens it; nobody else talks to the VM meanwhile."""

    @property
    def version(self) -> str:
        """The version of what runs the VM, for the manifest and for people."""

    def preflight(self) -> None:
        """Raise Refused if this VM cannot be backed up now, or a backup could harm it; MonitorError."""

    def inventory(self) -> Inventory:
        """Return the VM's disks as they are. Raises Refused, MonitorError."""

    def definition(self) -> Definition:
        """Return what the VM is beside its disks. Asked before the guest is frozen.

        What cannot be found out is left out, and named. Raises MonitorError if the VM is lost.
        """

    def included(self, paths: Sequence[Path]) -> Definition:
        """Read the files of the VM's host that the user named.

        Raises UsageError for one that cannot be read, MonitorError.
        """

    def state_files(self, *, firmware: bool) -> Definition:
        """Return the files in which the VM keeps a state beside its disks: UEFI variables, a TPM's state.

        firmware: whether the UEFI variables are wanted.
        Asked right after the point in time, when the guest is not frozen any more: a state that the guest
        changes just then may be newer. Raises MonitorError.
        """

    def bitmaps(self) -> tuple[Bitmap, ...]:
        """Return all dirty bitmaps, of whatever node. Raises MonitorError."""

    def remove_bitmap(self, node: NodeName, name: BitmapName) -> str:
        """Remove one bitmap. Return why the VM refused, "" if it did not. Raises MonitorError."""

    def view_error(self, view: ViewKind, disks: Sequence[Disk]) -> str:
        """Say why these disks cannot have this view; "" if they can. Raises MonitorError."""

    def check_scratch(self, directory: Path) -> None:
        """Refuse a scratch directory whose path cannot be passed to the VM. Raises Refused."""

    def scratch_filling(self, directory: Path, disks: Sequence[Disk]) -> Filling:
        """Return who else needs the file system of the scratch directory, on the VM's machine.

        Raises MonitorError, Refused if the directory cannot be used.
        """

    def left_scratch(self, namespace: Namespace, directory: Path) -> list[str]:
        """Name what `sweep_scratch` would remove. Raises Failed, MonitorError."""

    def plan_scratch(
        self, disks: Sequence[Disk], options: ScratchOptions, guests: str = ""
    ) -> tuple[ScratchBudget, ...]:
        """Share out the scratch space. guests: which guests need the same file system, in words.

        Raises Refused if there is too little, MonitorError.
        """

    def filling(self, directories: Sequence[Path], disks: Sequence[Disk]) -> tuple[Filling, ...]:
        """Return for each directory of this machine that a run fills who else needs its file system.

        Raises MonitorError.
        """

    def foresee(self, facts: PointFacts) -> Foreseen:
        """Return the VM as it will be after `resolve`. Changes nothing. Raises MonitorError, Refused."""

    def begin(self, lock: int) -> AbstractContextManager[Session]:
        """Start the guard, and with it a session; the VM is not touched, and the driver goes on.

        lock: the descriptor of the VM's lock, which the guard holds for as long as it works. Raises
        GuardLost, Refused.
        """

    def findings(self, options: RunOptions) -> Iterator[Finding]:
        """Yield what `doctor` tells of this kind of VM. Raises MonitorError."""
