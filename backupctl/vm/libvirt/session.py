# SPDX-License-Identifier: GPL-2.0-or-later
"""One backup of a domain by libvirt: its job, its checkpoint, the guard, and our NBD clients."""

import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from backupctl.errors import Failed, OutcomeUnknown
from backupctl.names import Namespace, VmName
from backupctl.vm.driver import DiskSnapshot, Export, PointFacts, Request, ScratchBudget
from backupctl.vm.guest.guard import GuardClient
from backupctl.vm.guest.guarded_session import GuardedSession
from backupctl.vm.libvirt import checkpoints, domain, inventory, job, recovery, run_files, xml
from backupctl.vm.libvirt.connection import PAUSED, PAUSED_BY_IO_ERROR, Connection, Pending
from backupctl.vm.libvirt.host import Host
from backupctl.vm.qmp import nbd_export
from backupctl.vm.qmp.scratch import Scratch  # noqa: TC001 - quick to load

CONNECTIONS = 2
"""Sockets for each export."""
_STATE_SECONDS = 1.0
_REUSE_SCRATCH = 1
"""VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL: the scratch files are there already, which shortens the freeze."""


class LibvirtSession(GuardedSession):
    """See `vm.driver.Session`."""

    def __init__(
        self,
        name: VmName,
        host: Host,
        agent_seconds: float,
        connection: Connection,
        guard: GuardClient,
    ) -> None:
        super().__init__(guard, agent_seconds, host.thaw_if_frozen)
        self._name = name
        self._host = host
        self._connection = connection
        self._clients = ExitStack()
        self._exports: tuple[Export, ...] = ()
        self._connected: list[tuple[str, socket.socket]] = []
        self._ready = 0
        self._files: run_files.RunFiles | None = None
        self._scratch: list[tuple[Scratch, ScratchBudget]] = []
        self._disks: tuple[DiskSnapshot, ...] = ()
        self._documents = ("", "")
        self._is_ours: job.IsOurs = lambda _path: False
        self._watching = False
        self._state: Pending[tuple[int, int]] | None = None
        self._asked = 0.0

    def attach(self, request: Request) -> None:
        """Make the scratch files, and look whether the disks are still as they were listed."""
        found = domain.describe(self._connection)
        self._disks = request.disks
        self._is_ours = recovery.owns(request.facts, self._name)
        files = run_files.RunFiles(
            request.facts.namespace, self._name, request.scratch_directory, found.qemu_user, self._host
        )
        self._files = files
        for one, budget in zip(request.disks, request.budgets, strict=True):
            scratch = files.make_scratch(one.disk.node, one.disk.size, budget.size)
            self._scratch.append((scratch, budget))
            self._guard.watch(str(files.socket), scratch.descriptor, budget.abort_at, None)
        inventory.refuse_changed(self._connection, [one.disk for one in request.disks])
        self._documents = self._described(request, found, files)

    def refuse_unfrozen(self) -> None:
        """A job of libvirt has one point in time for all disks, frozen or not."""

    def start(self) -> None:
        """Begin the backup and the checkpoint, in one transaction of libvirt's."""
        backup, checkpoint = self._documents
        seconds = self._connection.seconds
        if self._frozen_until is not None:
            seconds = min(seconds, max(self._frozen_until - time.monotonic(), 0.0))
        handle = self._connection.domain
        self._connection.call(
            "virDomainBackupBegin", lambda: handle.backupBegin(backup, checkpoint, _REUSE_SCRATCH), seconds
        )
        self._watching = True

    def exports(self) -> tuple[Export, ...]:
        """Connect every client, and let the guard know it, before a byte is read."""
        for one in self._disks:
            inventory.refuse_resized(self._connection, one.disk)
        made = []
        for one in self._disks:
            target = str(one.disk.node)
            sockets = tuple(self._connect(target) for _ in range(CONNECTIONS))
            made.append(Export(target, _changes(target) if one.bases else None, sockets))
        self._exports = tuple(made)
        return self._exports

    def on_close(self, close: Callable[[], None]) -> None:
        """Have an export's clients closed with the others; they have ended their handshake."""
        self._clients.callback(close)
        self._guard.ready(self._exports[self._ready].name)
        self._ready += 1

    def check(self) -> None:
        """Look at the guard, the scratch files, and now and then whether the guest runs."""
        self._guard.check()
        if self._watching:
            self._check_scratch()
            self._check_state()

    def confirm(self) -> None:
        """Raise Failed unless our job is still the one under way, and the guest was not paused by it."""
        path = job.socket_of_job(self._connection)
        if path is None or not self._is_ours(path):
            raise Failed("the backup job ended before everything was read: somebody aborted it")
        if self._connection.state() == (PAUSED, PAUSED_BY_IO_ERROR):
            raise self._paused()

    def end(self, facts: PointFacts) -> None:
        """End the job, and then our clients."""
        self._watching = False
        job.end(self._connection, recovery.owns(facts, self._name), self._drain, self._hang_up)
        self._close_clients()

    def resolve(self, facts: PointFacts) -> list[str]:
        """As for anybody's runs, but with clients of our own. A connection that broke is made anew."""
        with ExitStack() as fresh:
            connection = self._connection
            if not connection.alive:
                connection = fresh.enter_context(self._host.connection())
            self._watching = False
            done = recovery.resolve(
                connection,
                facts,
                self._name,
                drain=self._drain,
                hang_up=self._hang_up,
                close=self._close_clients,
            )
        self._guard.unwatch()
        return done

    def left_scratch(self, namespace: Namespace, directory: Path) -> list[str]:
        """Ask the host."""
        return self._host.files.left_directories(namespace, self._name, directory)

    def sweep_scratch(self, namespace: Namespace, directory: Path) -> list[str]:
        """Have the host do it."""
        return self._host.files.sweep(namespace, self._name, directory)

    def close(self) -> None:
        """Close what this process has open; the guard has duplicates of the sockets. Never raises."""
        self._clients.close()
        if self._files is not None:
            self._files.close()

    def _described(
        self, request: Request, found: domain.Description, files: run_files.RunFiles
    ) -> tuple[str, str]:
        targets = [str(one.disk.node) for one in request.disks]
        others = [one.target for one in found.disks if one.target not in targets]
        recorded = [
            each.target for each in found.disks if each.target in targets and each.records and each.files
        ]
        disks = []
        for one in request.disks:
            target = str(one.disk.node)
            base = checkpoints.checkpoint_of(one.bases[0], one.disk.name) if one.bases else None
            disks.append(xml.BackupDisk(target, files.scratch(target), base, _changes(target)))
        if not recorded:
            return xml.backup(disks, others, files.socket), ""
        name = checkpoints.checkpoint_of(request.disks[0].new, request.disks[0].disk.name)
        description = checkpoints.description(
            {each.target: each.files for each in found.disks if each.target in recorded}
        )
        left = [one.target for one in found.disks if one.target not in recorded]
        return (
            xml.backup(disks, others, files.socket),
            xml.checkpoint(name, description, recorded, left),
        )

    def _connect(self, target: str) -> socket.socket:
        assert self._files is not None
        made = self._files.connect()
        self._connected.append((target, made))
        self._clients.callback(made.close)
        self._guard.hold(made, target)
        return made

    def _check_scratch(self) -> None:
        assert self._files is not None
        self._files.check()
        for scratch, budget in self._scratch:
            if budget.abort_at is not None and self._files.used_bytes(scratch) > budget.abort_at:
                raise Failed(
                    f"a scratch file in {self._files.directory} is nearly full: gave up before it could "
                    "pause the guest; more space for it is needed (--scratch, --scratch-size)"
                )

    def _check_state(self) -> None:
        """Ask for the domain's state now and then, and look at the answer at later calls."""
        if self._state is None:
            if time.monotonic() - self._asked > _STATE_SECONDS and self._connection.alive:
                self._asked = time.monotonic()
                self._state = self._connection.start(self._connection.domain.state)
        elif self._state.is_done:
            pending, self._state = self._state, None
            state, reason = self._connection.finished("virDomainGetState", pending)
            if (state, reason) == (PAUSED, PAUSED_BY_IO_ERROR):
                raise self._paused()
        elif time.monotonic() - self._asked > self._connection.seconds:
            self._connection.give_up()
            raise OutcomeUnknown("virDomainGetState", "time-out")

    def _paused(self) -> Failed:
        return Failed(
            "an I/O error paused the guest while it was backed up; the scratch directory "
            f"{self._files.directory.parent if self._files else ''} may be full"
        )

    def _drain(self) -> None:
        nbd_export.drain(self._exports)

    def _hang_up(self) -> None:
        """Disconnect the clients that are in their handshake."""
        ready = {one.name for one in self._exports[: self._ready]}
        self._host.leave([one for name, one in self._connected if name not in ready])

    def _close_clients(self) -> None:
        self._clients.close()
        self._exports, self._connected = (), []
        self._guard.release()


def _changes(target: str) -> str:
    """Return the name of the bitmap that an export tells changes by."""
    return f"backup-{target}"
