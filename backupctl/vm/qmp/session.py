# SPDX-License-Identifier: GPL-2.0-or-later
"""One backup of a VM by plain QMP: the view, its exports, the guard, and our NBD clients."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from backupctl.errors import CommandFailed, ViewUnavailable
from backupctl.names import BitmapName, Namespace, VmName
from backupctl.options import Timeouts
from backupctl.vm.driver import DiskSnapshot, Export, PointFacts, Request
from backupctl.vm.guest.guard import GuardClient
from backupctl.vm.guest.guarded_session import GuardedSession
from backupctl.vm.qmp import bitmaps, nbd_export, recovery, snapshot_access, teardown, unchanged
from backupctl.vm.qmp.fleecing import Fleecing
from backupctl.vm.qmp.host import Host
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.qmp.point_in_time import View, ViewDisk
from backupctl.vm.qmp.scratch import ScratchFiles
from backupctl.vm.qmp.snapshot_access import SnapshotAccess


class QmpSession(GuardedSession):
    """See `vm.driver.Session`."""

    def __init__(
        self, name: VmName, host: Host, timeouts: Timeouts, monitor: Monitor, guard: GuardClient
    ) -> None:
        super().__init__(guard, timeouts.agent_seconds, host.thaw_if_frozen)
        self._name = name
        self._host = host
        self._monitor = monitor
        self._clients = ExitStack()
        self._exports: tuple[Export, ...] = ()
        self._server_is_ours = False
        self._view: View | None = None
        self._watching = False
        self._scratch: ScratchFiles | None = None
        self._disks: tuple[DiskSnapshot, ...] = ()
        self._namespace: Namespace | None = None

    def attach(self, request: Request) -> None:
        """Add scratch nodes and filters, then look whether the disks are still as they were listed."""
        self._namespace, self._disks = request.facts.namespace, request.disks
        view = self._view = self._made_view(request)
        self._watching = True
        view.prepare()
        unchanged.refuse_moved(self._monitor, [one.disk for one in self._disks])
        newest = {one.disk.node: one.bases[-1] for one in self._disks if one.bases}
        unchanged.refuse_disabled(self._monitor, newest)
        view.register_guard(self._guard)

    def refuse_unfrozen(self) -> None:
        """Raise ViewUnavailable if the disks would be filtered one after the other while the guest writes."""
        if not self._attached.atomic:
            raise ViewUnavailable("without a freeze, --view snapshot-access takes one disk only")

    def start(self) -> None:
        """Take the point in time, within the freeze budget: a QEMU that hangs must not prolong the freeze."""
        with self._monitor.within(self._frozen_until):
            self._attached.start()

    def exports(self) -> tuple[Export, ...]:
        """Start the NBD server; connect every client, and let the guard know it, before a byte is read."""
        unchanged.refuse_resized(self._monitor, [one.disk for one in self._disks])
        nodes = self._attached.export_nodes()
        specs = [
            nbd_export.ExportSpec(node, one.disk.node, bitmap)
            for node, one, bitmap in zip(nodes, self._disks, self._changes(), strict=True)
        ]
        assert self._namespace is not None
        self._server_is_ours = True
        try:
            self._exports = nbd_export.start_exports(
                self._monitor, self._guard, self._namespace, specs, serve=self._host.serve
            )
        except CommandFailed as err:
            # Somebody else's server: to stop it would take it from under its clients.
            self._server_is_ours = err.command != "nbd-server-start"
            raise
        for one in self._exports:
            self._clients.callback(one.close)
        return self._exports

    def on_close(self, close: Callable[[], None]) -> None:
        """Have a client closed with the others."""
        self._clients.callback(close)

    def check(self) -> None:
        """Hear what QEMU said on its own; look at guard, scratch files and jobs."""
        self._monitor.pump()
        self._guard.check()
        if self._watching:
            self._attached.check()

    def confirm(self) -> None:
        """See `View.verify_active`."""
        self._attached.verify_active()

    def end(self, facts: PointFacts) -> None:
        """Take the view down."""
        teardown.teardown(
            self._monitor, facts.namespace, recovery.active_nodes(facts), clients=self._our_clients()
        )
        self._watching = False  # all is read, so what QEMU says of the view no longer matters

    def resolve(self, facts: PointFacts) -> list[str]:
        """As for anybody's runs, but with clients of our own, which must be drained and closed in time.

        A monitor that broke is connected anew: what it was last told may or may not have happened, so QEMU is
        asked.
        """
        with ExitStack() as fresh:
            monitor = self._monitor
            if not monitor.alive:
                monitor.close()
                monitor = fresh.enter_context(self._host.monitor_again())
            done = recovery.resolve(
                monitor, facts, clients=self._our_clients(), server_is_ours=self._server_is_ours
            )
        self._guard.unwatch()
        return done

    def sweep_scratch(self, namespace: Namespace, directory: Path) -> list[str]:
        """See `scratch_directory.sweep`."""
        return self._host.files.sweep(namespace, self._name, directory)

    def close(self) -> None:
        """Close what this process has open. Never raises.

        Clients are left only if QEMU is out of reach; then the guard has duplicates of their sockets.
        """
        if self._view is not None:
            self._view.close()
        self._clients.close()

    @property
    def _attached(self) -> View:
        assert self._view is not None, "attach comes first"
        return self._view

    def _made_view(self, request: Request) -> View:
        namespace, disks = request.facts.namespace, [one.disk for one in request.disks]
        view = request.view
        if view == "auto":
            # Several disks at one point in time need the freeze, and an agent may still refuse it.
            sure = len(disks) == 1 or request.will_freeze
            can = sure and not snapshot_access.view_error(self._monitor, disks)
            view = "snapshot-access" if can else "fleecing"
        kind = SnapshotAccess if view == "snapshot-access" else Fleecing
        directory = request.scratch_directory
        private = self._private_directory(namespace, directory)
        self._scratch = ScratchFiles(self._monitor, directory, private, self._host.files)
        handed_over = [ViewDisk(one.disk, _bitmap_actions(one, request.facts)) for one in request.disks]
        return kind(self._monitor, namespace, handed_over, request.budgets, self._scratch)

    def _private_directory(self, namespace: Namespace, directory: Path) -> Path | None:
        if self._monitor.passes_descriptors:
            return None
        return self._host.files.make_private(namespace, self._name, directory)

    def _changes(self) -> list[BitmapName | None]:
        """Return the bitmap that tells what changed on each disk; a differential merges several into one."""
        assert self._namespace is not None
        merged = self._namespace.differential_bitmap
        self._monitor.transaction(list(_merges(self._disks, merged)))
        return [_change(one, merged) for one in self._disks]

    def _our_clients(self) -> teardown.Clients:
        return teardown.Clients(
            drain=lambda: nbd_export.drain(self._exports),
            close=self._close_clients,
            free_scratch=lambda: self._scratch.empty() if self._scratch else None,
        )

    def _close_clients(self) -> None:
        """Close our NBD clients and the guard's duplicates; no export is left that they could harm."""
        # `nbd-server-stop` hangs the guest while QEMU has not seen the end of a client in its handshake.
        self._host.leave([sock for one in self._exports for sock in one.sockets])
        self._clients.close()
        self._exports = ()
        self._guard.release()


def _bitmap_actions(one: DiskSnapshot, facts: PointFacts) -> tuple[bitmaps.Action, ...]:
    broken: tuple[BitmapName, ...] = ()
    if not one.bases:
        broken = bitmaps.broken_chain_bitmaps(one.disk.bitmaps, facts.namespace, facts.is_another_vms)
    disk = one.disk
    return tuple(
        bitmaps.handover_actions(disk.node, one.new, one.bases, persistent=disk.persistent, broken=broken)
    )


def _merges(disks: Iterable[DiskSnapshot], merged: BitmapName) -> Iterable[bitmaps.Action]:
    for one in disks:
        if len(one.bases) > 1:
            yield from bitmaps.merge_actions(one.disk.node, merged, one.bases)


def _change(one: DiskSnapshot, merged: BitmapName) -> BitmapName | None:
    return merged if len(one.bases) > 1 else one.bases[0] if one.bases else None
