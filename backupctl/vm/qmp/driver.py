# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver for a VM with a QEMU monitor of its own, or for a storage daemon: plain QMP."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.errors import UNTOUCHED, CommandFailed, Refused
from backupctl.finding import Finding
from backupctl.names import BitmapName, Namespace, NodeName
from backupctl.options import QmpAccess, RunOptions, ScratchOptions, Timeouts, ViewKind, VmConfig
from backupctl.vm import definition as definitions
from backupctl.vm.bitmap import Bitmap
from backupctl.vm.definition import Definition
from backupctl.vm.disk import Disk, Inventory
from backupctl.vm.driver import Foreseen, PointFacts, ScratchBudget, Session
from backupctl.vm.filling import Filling
from backupctl.vm.qmp import (
    definition,
    diagnosis,
    inventory,
    preflight,
    recovery,
    scratch_space,
    shared_files,
    snapshot_access,
)
from backupctl.vm.qmp.host import Host, LocalHost
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.qmp.session import QmpSession


@contextmanager
def connect(
    vm: VmConfig, access: QmpAccess, timeouts: Timeouts, cancel: Cancellation | None = None
) -> Iterator["QmpDriver"]:
    """Connect to the monitor for as long as the block lasts. Raises MonitorUnreachable, Interrupted."""
    with Monitor.connect(access.qmp, timeouts.command_seconds, cancel) as monitor:
        yield QmpDriver(vm, access, timeouts, monitor)


class QmpDriver:
    """See `vm.driver.Driver`. host: the machine that QEMU runs on; this one by default."""

    def __init__(
        self, vm: VmConfig, access: QmpAccess, timeouts: Timeouts, monitor: Monitor, host: Host | None = None
    ) -> None:
        self._vm = vm
        self._access = access
        self._timeouts = timeouts
        self._monitor = monitor
        self._host = host or LocalHost(access, timeouts)

    @property
    def has_guest(self) -> bool:
        """A QEMU that answers may run one."""
        return True

    @property
    def version(self) -> str:
        """QEMU's version."""
        return str(self._monitor.version)

    def preflight(self) -> None:
        """See `preflight.refuse_qemu`."""
        preflight.refuse_qemu(self._monitor)

    def inventory(self) -> Inventory:
        """Ask QEMU for the VM's disks."""
        return inventory.inventory(self._monitor, self._vm.disk_names)

    def definition(self) -> Definition:
        """Ask QEMU; its command line is that of the process at the other end of the monitor."""
        monitor = self._monitor
        process = monitor.remote_process if monitor.process is None else monitor.process
        line = self._host.files.command_line(process) if process else None
        return definition.definition(monitor, line)

    def included(self, paths: Sequence[Path]) -> Definition:
        """Read them on QEMU's host."""
        return definitions.included(paths, self._host.files.read_plain)

    def state_files(self, *, firmware: bool) -> Definition:  # noqa: ARG002 - the seam's signature
        """Return none: UEFI variables are a disk of QEMU's, and a TPM is another process's."""
        return Definition()

    def bitmaps(self) -> tuple[Bitmap, ...]:
        """Return the bitmaps of every node."""
        return inventory.all_bitmaps(self._monitor)

    def remove_bitmap(self, node: NodeName, name: BitmapName) -> str:
        """Remove one bitmap; return QEMU's refusal, or ""."""
        try:
            self._monitor.execute("block-dirty-bitmap-remove", {"node": node, "name": name})
        except CommandFailed as err:
            return err.description
        return ""

    def view_error(self, view: ViewKind, disks: Sequence[Disk]) -> str:
        """Fleecing is always there."""
        return snapshot_access.view_error(self._monitor, disks) if view == "snapshot-access" else ""

    def check_scratch(self, directory: Path) -> None:
        """Where QEMU gets scratch files as descriptors, it needs no name of their directory."""
        if self._monitor.passes_descriptors:
            return
        try:
            str(directory.absolute()).encode()
        except UnicodeEncodeError as err:
            raise Refused(
                f"the path {directory} is not UTF-8, so it cannot be passed to QEMU; use another name",
                state=UNTOUCHED,
            ) from err

    def plan_scratch(
        self, disks: Sequence[Disk], options: ScratchOptions, guests: str = ""
    ) -> tuple[ScratchBudget, ...]:
        """See `scratch_space`."""
        return scratch_space.plan_scratch(
            self._monitor, disks, options, guests=guests, files=self._host.files
        )

    def filling(self, directories: Sequence[Path], disks: Sequence[Disk]) -> tuple[Filling, ...]:
        """See `shared_files`."""
        return tuple(shared_files.filling(directory, self._monitor, disks) for directory in directories)

    def scratch_filling(self, directory: Path, disks: Sequence[Disk]) -> Filling:
        """See `shared_files`."""
        return self._host.scratch_filling(directory, self._monitor, disks)

    def left_scratch(self, namespace: Namespace, directory: Path) -> list[str]:
        """See `scratch_directory.left_directories`."""
        return self._host.files.left_directories(namespace, self._vm.name, directory)

    def sweep_scratch(self, namespace: Namespace, directory: Path) -> list[str]:
        """See `scratch_directory.sweep`."""
        return self._host.files.sweep(namespace, self._vm.name, directory)

    def foresee(self, facts: PointFacts) -> Foreseen:
        """See `recovery.foresee`."""
        return recovery.foresee(self._monitor, facts, self._vm.disk_names)

    def resolve(self, facts: PointFacts) -> list[str]:
        """See `recovery.resolve`."""
        return recovery.resolve(self._monitor, facts)

    @contextmanager
    def begin(self, lock: int) -> Iterator[Session]:
        """Start the guard, and with it a session. It loads while the caller goes on."""
        with self._host.guard(lock) as guard:
            session = QmpSession(self._vm.name, self._host, self._timeouts, self._monitor, guard)
            try:
                yield session
            finally:
                session.close()

    def findings(self, options: RunOptions) -> Iterator[Finding]:
        """See `diagnosis`."""
        return diagnosis.findings(self._monitor, self._access, options)
