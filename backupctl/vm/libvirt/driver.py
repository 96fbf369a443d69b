# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver for a domain of libvirt, by libvirt's own backup API.

What it gives up against a monitor of our own: a guest that overwrites more than its scratch file holds is
paused, not slowed down, until the run is rolled back; and libvirt waits 30 s for another of its operations.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.errors import UNTOUCHED, CommandFailed, MonitorUnreachable, Refused
from backupctl.finding import Finding
from backupctl.names import PREFIX, BitmapName, DiskName, NodeName
from backupctl.options import LibvirtAccess, RunOptions, ScratchOptions, Timeouts, ViewKind, VmConfig
from backupctl.system import bounded_read
from backupctl.system.open_files import Place
from backupctl.vm import definition as definitions
from backupctl.vm.bitmap import Bitmap
from backupctl.vm.definition import Definition
from backupctl.vm.disk import Disk, Inventory
from backupctl.vm.driver import Foreseen, PointFacts, ScratchBudget, Session
from backupctl.vm.filling import Filling
from backupctl.vm.guest.guard import GuardClient
from backupctl.vm.libvirt import (
    agent,
    checkpoints,
    definition,
    diagnosis,
    domain,
    inventory,
    job,
    recovery,
    run_files,
)
from backupctl.vm.libvirt.connection import Connection, module_directory
from backupctl.vm.libvirt.guard_hands import Hands
from backupctl.vm.libvirt.session import LibvirtSession
from backupctl.vm.local_scratch import LocalScratch
from backupctl.vm.qmp import scratch_space

LOCK_SECONDS = 5.0
"""libvirt waits 30 s for another operation to end; we wait a little longer, and have its answer."""


@contextmanager
def connect(
    vm: VmConfig, access: LibvirtAccess, timeouts: Timeouts, cancel: Cancellation | None = None
) -> Iterator["LibvirtDriver"]:
    """Connect to libvirt for as long as the block lasts. Raises MonitorUnreachable, Interrupted."""
    if cancel is not None:
        cancel.check()
    seconds = timeouts.command_seconds + LOCK_SECONDS
    with Connection.open(access.uri, access.domain, seconds) as connection:
        if not connection.is_running():
            off = MonitorUnreachable(
                f"the domain {access.domain} is not running; libvirt backs up running domains only",
                hint=f"virsh start {access.domain}",
            )
            off.nobody_listens = True
            raise off
        yield LibvirtDriver(vm, access, timeouts, connection)


class LibvirtDriver(LocalScratch):
    """See `vm.driver.Driver`."""

    def __init__(
        self, vm: VmConfig, access: LibvirtAccess, timeouts: Timeouts, connection: Connection
    ) -> None:
        super().__init__(vm.name)
        self._vm = vm
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
        """Read them here."""
        return definitions.included(paths, bounded_read.read)

    def state_files(self, *, firmware: bool) -> Definition:
        """Read the UEFI variables and the TPM's state: libvirt's backups do not hold them."""
        return definition.state_files(self._connection, firmware=firmware)

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
        run_files.check(directory, f"{PREFIX}00000000-{self._vm.name}@", qemu_user)

    def plan_scratch(
        self, disks: Sequence[Disk], options: ScratchOptions, guests: str = ""
    ) -> tuple[ScratchBudget, ...]:
        """See `scratch_space`. A guest that would get errors needs a scratch file that cannot be full."""
        found = domain.describe(self._connection)
        made = scratch_space.plan(disks, options, limited=False, guests=guests)
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
        """Look which disks are on a directory's file system."""
        return tuple(Filling(each, _disks_on(each, disks)) for each in directories)

    def scratch_filling(self, directory: Path, disks: Sequence[Disk]) -> Filling:
        """Look which disks are on the scratch directory's file system."""
        return self.filling((directory,), disks)[0]

    def foresee(self, facts: PointFacts) -> Foreseen:
        """See `recovery.foresee`."""
        return recovery.foresee(self._connection, facts, self._vm.name, self._vm.disk_names)

    def resolve(self, facts: PointFacts) -> list[str]:
        """See `recovery.resolve`."""
        return recovery.resolve(self._connection, facts, self._vm.name)

    @contextmanager
    def begin(self, lock: int) -> Iterator[Session]:
        """Start the guard, and with it a session. It loads while the caller goes on."""
        access, timeouts = self._access, self._timeouts
        hands = Hands(access.uri, access.domain, module_directory(), timeouts.command_seconds)
        thaw = partial(agent.thaw_if_frozen, access.uri, access.domain, timeouts.agent_seconds)
        with GuardClient.launch((hands.argument(), ""), thaw, timeouts.agent_seconds, lock) as guard:
            session = LibvirtSession(self._vm.name, access, timeouts, self._connection, guard)
            try:
                yield session
            finally:
                session.close()

    def findings(self, options: RunOptions) -> Iterator[Finding]:
        """See `diagnosis`."""
        return diagnosis.findings(self._connection, self._access, options, self.version)


def _dotted(number: int) -> str:
    return f"{number // 1000000}.{number // 1000 % 1000}.{number % 1000}"


def _disks_on(directory: Path, disks: Sequence[Disk]) -> str:
    place = Place.of(directory)
    names = [one.name for one in disks if _is_on(one.filename, place)]
    return f"{', '.join(names)} is on it too" if names else ""


def _is_on(filename: str, place: Place) -> bool:
    try:
        return filename.startswith("/") and Path(filename).is_file() and Place.of(filename).shared_with(place)
    except (OSError, ValueError):
        return False
