# SPDX-License-Identifier: GPL-2.0-or-later
"""One backup of a VM that is off: no guest, no guard, no scratch files; the images stand still."""

import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from backupctl.errors import AgentUnavailable, Failed, OutcomeUnknown
from backupctl.names import BitmapName, Namespace, VmName
from backupctl.vm.driver import DiskSnapshot, Export, PointFacts, Request, Thawed
from backupctl.vm.offline import recovery
from backupctl.vm.offline.daemon import Daemon
from backupctl.vm.qmp import bitmaps, nbd_export, teardown

_NO_GUEST = "the VM is off, so there is no guest to freeze"


class OfflineSession:
    """See `vm.driver.Session`.

    Bitmaps change hands in `end`, when all is read: nobody writes meanwhile, and until then a run that is
    killed leaves the images as they were. Whose bitmaps they are, and what they are called, is told by three
    methods (`differential_bitmap`, `hand_over`, `recover`), which libvirt's domains have otherwise.
    """

    def __init__(self, name: VmName, daemon: Daemon) -> None:
        self._name = name
        self._daemon = daemon
        self._clients = ExitStack()
        self._request: Request | None = None
        self._exports: tuple[Export, ...] = ()
        self._before: list[tuple[int, int]] = []

    @property
    def has_guest(self) -> bool:
        """Nothing runs."""
        return False

    @property
    def guarded(self) -> bool:
        """There is nothing to guard: if this process ends, the kernel ends the daemon."""
        return False

    def stand_by(self) -> None:
        """Nothing is waited for."""

    def ping_guest(self) -> None:
        """Raise AgentUnavailable."""
        raise AgentUnavailable(_NO_GUEST)

    def attach(self, request: Request) -> None:
        """Note what is asked for. The images are locked since before they were listed."""
        self._request = request
        self._before = self._states()

    def refuse_unfrozen(self) -> None:
        """Without a guest all disks are of one point in time."""

    def freeze(self, budget_seconds: float) -> int:  # noqa: ARG002 - the protocol's signature
        """Raise AgentUnavailable."""
        raise AgentUnavailable(_NO_GUEST)

    def start(self) -> None:
        """The images are what they have been since they were locked."""

    def thaw(self) -> Thawed:
        """Nothing was frozen."""
        return Thawed(0.0, "")

    def exports(self) -> tuple[Export, ...]:
        """Export the images themselves, each with a disabled bitmap that unites those that are asked for.

        QEMU does not export a bitmap that records from a node that is read-only.
        """
        namespace, monitor = self._namespace, self._daemon.monitor
        merged = namespace.differential_bitmap
        monitor.transaction(
            [action for one in self._disks for action in self.differential_bitmap(one, merged)]
        )
        specs = [
            nbd_export.ExportSpec(one.disk.node, one.disk.node, merged if one.bases else None)
            for one in self._disks
        ]
        self._exports = nbd_export.start_exports(
            monitor, _Nobody(), namespace, specs, serve=self._daemon.host.serve
        )
        for one in self._exports:
            self._clients.callback(one.close)
        return self._exports

    def on_close(self, close: Callable[[], None]) -> None:
        """Have a client closed with the others."""
        self._clients.callback(close)

    def check(self) -> None:
        """Look whether the daemon is there."""
        self._daemon.check()

    def confirm(self) -> None:
        """Raise Failed if an image was written to, by somebody who does not heed QEMU's lock."""
        self._daemon.check()
        if self._states() != self._before:
            raise Failed("an image was changed by a process that ignores QEMU's lock, while it was read")

    def end(self, facts: PointFacts) -> None:
        """Remove the exports; then hand the bitmaps over, and have QEMU store them."""
        monitor = self._daemon.monitor
        teardown.teardown(monitor, facts.namespace, {}, clients=self._our_clients())
        recovery.drop_unions(monitor, facts.namespace)
        self.hand_over(self._disks, facts)

    def differential_bitmap(self, one: DiskSnapshot, name: BitmapName) -> list[bitmaps.Action]:
        """Return what makes a disabled bitmap that tells all that changed since the disk's base."""
        return bitmaps.merge_actions(one.disk.node, name, one.bases) if one.bases else []

    def hand_over(self, disks: Sequence[DiskSnapshot], facts: PointFacts) -> None:
        """Have the new bitmaps record, and be stored. Raises MonitorError."""
        actions = [action for one in disks for action in _handover(one, facts)]
        if actions:
            with self._daemon.writable():
                self._daemon.monitor.transaction(actions)

    def recover(self, facts: PointFacts, clients: teardown.Clients) -> list[str]:
        """See `recovery.resolve`."""
        return recovery.resolve(self._daemon, facts, clients)

    def resolve(self, facts: PointFacts) -> list[str]:
        """As for anybody's runs. A daemon that ended or does not answer is replaced, and asked once more."""
        try:
            return self._resolved(facts)
        except OutcomeUnknown:
            return self._resolved(facts)

    def _resolved(self, facts: PointFacts) -> list[str]:
        if self._daemon.restart():
            self._close_clients()
        return self.recover(facts, self._our_clients())

    def sweep_scratch(self, namespace: Namespace, directory: Path) -> list[str]:
        """See `scratch_directory.sweep`."""
        return self._daemon.host.files.sweep(namespace, self._name, directory)

    def await_thaw(self) -> None:
        """Nothing is frozen."""

    def close(self) -> None:
        """Close our clients. Never raises."""
        self._clients.close()

    def _states(self) -> list[tuple[int, int]]:
        return self._daemon.host.states()

    @property
    def _disks(self) -> tuple[DiskSnapshot, ...]:
        assert self._request is not None, "attach comes first"
        return self._request.disks

    @property
    def _namespace(self) -> Namespace:
        assert self._request is not None, "attach comes first"
        return self._request.facts.namespace

    def _our_clients(self) -> teardown.Clients:
        return teardown.Clients(drain=lambda: nbd_export.drain(self._exports), close=self._close_clients)

    def _close_clients(self) -> None:
        self._clients.close()
        self._exports = ()


class _Nobody:
    """Takes the place of the guard, which holds sockets for a QEMU that runs a guest."""

    def hold(self, connection: socket.socket, export: str) -> None:
        """Hold nothing: a daemon that ends with us cannot be harmed by our end."""


def _handover(one: DiskSnapshot, facts: PointFacts) -> list[bitmaps.Action]:
    """Return what hands a disk's bitmaps over; nothing for a disk that cannot store them."""
    disk = one.disk
    if not disk.persistent:
        return []
    broken: tuple[BitmapName, ...] = ()
    if not one.bases:
        broken = bitmaps.broken_chain_bitmaps(disk.bitmaps, facts.namespace, facts.is_another_vms)
    return bitmaps.handover_actions(disk.node, one.new, one.bases, persistent=True, broken=broken)
