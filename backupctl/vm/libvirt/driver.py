# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver for a domain of libvirt, by libvirt's own backup API.

What it gives up against a monitor of our own: a guest that overwrites more than its scratch file holds is
paused, not slowed down, until the run is rolled back; and libvirt waits 30 s for another of its operations.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.errors import UNTOUCHED, CommandFailed, MonitorUnreachable, Refused
from backupctl.finding import Finding
from backupctl.names import PREFIX, BitmapName, DiskName, Namespace, NodeName
from backupctl.options import LibvirtAccess, RunOptions, ScratchOptions, Timeouts, ViewKind, VmConfig
from backupctl.vm import definition as definitions
from backupctl.vm.bitmap import Bitmap
from backupctl.vm.definition import Definition
from backupctl.vm.disk import Disk, Inventory
from backupctl.vm.driver import Foreseen, PointFacts, ScratchBudget, Session
from backupctl.vm.filling import Filling
from backupctl.vm.libvirt import (
    checkpoints,
    definition,
    diagnosis,
    domain,
    inventory,
    job,
    recovery,
)
from backupctl.vm.libvirt.connection import Connection
from backupctl.vm.libvirt.host import Host, LocalHost
from backupctl.vm.libvirt.session import LibvirtSession
from backupctl.vm.qmp import scratch_space


@contextmanager
def connect(
    vm: VmConfig, access: LibvirtAccess, timeouts: Timeouts, cancel: Cancellation | None = None
) -> Iterator["LibvirtDriver"]:
    """Connect to libvirt for as long as the block lasts. Raises MonitorUnreachable, Interrupted."""
    if cancel is not None:
        cancel.check()
    host = LocalHost(access, timeouts)
    with host.connection() as connection:
        refuse_off(connection, access)
        yield LibvirtDriver(vm, access, timeouts, connection, host)


def refuse_off(connection: Connection, access: LibvirtAccess) -> None:
    """Raise MonitorUnreachable, with `nobody_listens`, for a domain that is off; MonitorError."""
    if not connection.is_running():
        off = MonitorUnreachable(
            f"the domain {access.domain} is not running", hint=f"virsh start {access.domain}"
        )
        off.nobody_listens = True
        raise off


class LibvirtDriver:
    """See `vm.driver.Driver`."""

    def __init__(
        self,
        vm: VmConfig,
        access: LibvirtAccess,
        timeouts: Timeouts,
        connection: Connection,
        host: Host,
    ) -> None:
        self._vm = vm
        self._host = host
        self._access = access
        self._timeouts = timeouts
        self._connection = connection
        self._asked: dict[str, set[str]] = defaultdict(set)

    @property
    def version(self) -> str:
        """The versions of QEMU and libvirt."""
        handle = self._connection.handle
        return self._connection.call(
            "virConnectGetVersion",
            lambda: f"{_dotted(handle.getVersion())} (libvirt {_dotted(handle.getLibVersion())})",
        )

    @property
    def has_guest(self) -> bool:
        """A domain that runs may have one."""
        return True

    def preflight(self) -> None:
        """Refuse a domain on which libvirt works, except for backups, which `inventory` tells of."""
        diagnosis.refuse_libvirt(self._connection)
        if job.socket_of_job(self._connection) is None:
            kind = self._connection.call("virDomainGetJobInfo", self._connection.domain.jobInfo)[0]
            if kind:
                raise Refused(
                    "another job of libvirt (such as a migration or a save) works on this domain",
                    state=UNTOUCHED,
                )

    def inventory(self) -> Inventory:
        """Ask libvirt for the domain's disks."""
        return inventory.inventory(self._connection, self._vm.disk_names)

    def definition(self) -> Definition:
        """Return the domain's XML as it will be started next time."""
        return definition.definition(self._connection)

    def included(self, paths: Sequence[Path]) -> Definition:
        """Read them on libvirt's machine."""
        return definitions.included(paths, self._host.files.read_plain)

    def state_files(self, *, firmware: bool) -> Definition:
        """Read the UEFI variables and the TPM's state: libvirt's backups do not hold them."""
        return definition.state_files(self._connection, self._host.files, firmware=firmware)

    def bitmaps(self) -> tuple[Bitmap, ...]:
        """Return the domain's checkpoints, each once for each of its disks."""
        return inventory.bitmaps(self._connection, self._vm.disk_names)

    def remove_bitmap(self, node: NodeName, name: BitmapName) -> str:
        """Remove a checkpoint, which is one for all of its disks, when it was called for each of them."""
        found = domain.describe(self._connection).disk(node)
        disk = found.stored_name(self._vm.disk_names) if found else DiskName(node)
        wanted = checkpoints.checkpoint_of(name, disk)
        self._asked[wanted].add(node)
        there = {one.name: one for one in checkpoints.listed(self._connection)}
        if wanted not in there:
            return ""
        if others := sorted(there[wanted].sizes.keys() - self._asked[wanted]):
            return f"its checkpoint has bitmaps on {', '.join(others)} too, and goes only with all of them"
        try:
            checkpoints.delete(self._connection, wanted)
        except CommandFailed as err:
            return err.description
        return ""

    def view_error(self, view: ViewKind, disks: Sequence[Disk]) -> str:  # noqa: ARG002 - the seam's signature
        """Libvirt has one view: fleecing."""
        return "libvirt offers fleecing only" if view == "snapshot-access" else ""

    def check_scratch(self, directory: Path) -> None:
        """Refuse a directory that QEMU's user cannot enter, or in which no socket has room for its path."""
        qemu_user = domain.describe(self._connection).qemu_user
        self._host.check_run_directory(directory, f"{PREFIX}00000000-{self._vm.name}@", qemu_user)

    def plan_scratch(
        self, disks: Sequence[Disk], options: ScratchOptions, guests: str = ""
    ) -> tuple[ScratchBudget, ...]:
        """See `scratch_space`. A guest that would get errors needs a scratch file that cannot be full."""
        found = domain.describe(self._connection)
        made = scratch_space.plan(disks, options, limited=False, guests=guests, files=self._host.files)
        for disk, budget in zip(disks, made, strict=True):
            described = found.disk(disk.node)
            if described and not described.pauses and budget.abort_at is not None:
                raise Refused(
                    f"{disk.name} has error_policy='{described.error_policy}': were its scratch file full, "
                    f"the guest's own writes would fail; {scratch_space.whole(disk.size) >> 20} MiB of "
                    "scratch space prevent that, or error_policy='enospace'",
                    state=UNTOUCHED,
                )
        return made

    def filling(self, directories: Sequence[Path], disks: Sequence[Disk]) -> tuple[Filling, ...]:
        """Ask the host."""
        return self._host.filling(directories, disks)

    def scratch_filling(self, directory: Path, disks: Sequence[Disk]) -> Filling:
        """Ask the host."""
        return self._host.scratch_filling(directory, disks)

    def left_scratch(self, namespace: Namespace, directory: Path) -> list[str]:
        """Ask the host."""
        return self._host.files.left_directories(namespace, self._vm.name, directory)

    def sweep_scratch(self, namespace: Namespace, directory: Path) -> list[str]:
        """Have the host do it."""
        return self._host.files.sweep(namespace, self._vm.name, directory)

    def foresee(self, facts: PointFacts) -> Foreseen:
        """See `recovery.foresee`."""
        return recovery.foresee(self._connection, facts, self._vm.name, self._vm.disk_names)

    def resolve(self, facts: PointFacts) -> list[str]:
        """See `recovery.resolve`."""
        return recovery.resolve(self._connection, facts, self._vm.name)

    @contextmanager
    def begin(self, lock: int) -> Iterator[Session]:
        """Start the guard, and with it a session. It loads while the caller goes on."""
        with self._host.guard(lock) as guard:
            session = LibvirtSession(
                self._vm.name, self._host, self._timeouts.agent_seconds, self._connection, guard
            )
            try:
                yield session
            finally:
                session.close()

    def findings(self, options: RunOptions) -> Iterator[Finding]:
        """See `diagnosis`."""
        return diagnosis.findings(self._connection, self._access, options, self.version, self._host)


def _dotted(number: int) -> str:
    return f"{number // 1000000}.{number // 1000 % 1000}.{number % 1000}"
