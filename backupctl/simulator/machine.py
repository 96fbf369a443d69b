# SPDX-License-Identifier: GPL-2.0-or-later
"""A virtual machine: everything from its power-on to its end, clean or not."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backupctl.simulator import disks, guest
from backupctl.simulator.descriptors import Descriptors
from backupctl.simulator.disks import Device, DiskSpec
from backupctl.simulator.failure import CommandError
from backupctl.simulator.faults import Faults
from backupctl.simulator.graph import Graph
from backupctl.simulator.jobs import Jobs
from backupctl.simulator.nbd.export import Export
from backupctl.simulator.nbd.server import NbdServer
from backupctl.simulator.nodes import Node
from backupctl.simulator.opening import Opener
from backupctl.simulator.transaction import Actions

ABORTS = ((7, 2, 14), (8, 0, 0))
"""From the first version and before the second, QEMU aborts when an NBD client of an iothread's disk
disconnects (measured: tests/integration/test_guest.py)."""


@dataclass(frozen=True)
class Settings:
    """What a simulated QEMU is started with.

    directory: of its disks. version: that it reports. cdroms: names of empty drives. paused: like -S.
    keep_moments: copy the disks at the point in time of each backup.
    """

    directory: Path
    disks: tuple[DiskSpec, ...]
    version: tuple[int, int, int] = (7, 2, 22)
    seed: int = 0
    cdroms: tuple[str, ...] = ()
    paused: bool = False
    keep_moments: bool = False


@dataclass
class Power:
    """How the machine ends, done by the process that runs it.

    end: takes one of kill, quit, crash, restart, abort, segv.
    """

    end: Callable[[str], None]


@dataclass
class Moment:
    """A point in time that was kept. at: seconds since the epoch. disks: raw files by the disk's name."""

    number: int
    at: float
    disks: dict[str, Path] = field(default_factory=dict)


class Machine:
    """A simulated QEMU with its guest."""

    def __init__(
        self, settings: Settings, faults: Faults, send: Callable[[dict[str, Any]], None], power: Power
    ) -> None:
        self.settings = settings
        self.faults = faults
        self.power = power
        self._send = send
        self.graph = Graph()
        self.descriptors = Descriptors()
        self.jobs = Jobs(self.graph, self.emit_event)
        self.actions = Actions(self.graph, self.jobs, settings.version, lambda: power.end("segv"))
        self.opener = Opener(self.graph, self.descriptors, self.emit_event, lambda: self.closes_fds_at_once)
        self.opener.capacity, self.opener.version = faults.capacity, settings.version
        self.nbd = NbdServer(faults, self._client_left)
        self.exports: dict[str, Export] = {}
        self.devices: dict[str, Device] = {}
        self.status = "prelaunch" if settings.paused else "running"
        self.moment: Moment | None = None
        self.received_fd: int | None = None  # passed over the monitor's socket, not yet used by a command
        self._nodes = {spec.name: self._plug(spec) for spec in settings.disks}
        self.devices |= {name: Device(name, "ide-cd", None, removable=True) for name in settings.cdroms}
        writable = [spec.name for spec in settings.disks if not spec.read_only]
        self.guest = guest.Guest(settings.seed, self.top, writable)
        self.guest.running = self.running

    @property
    def running(self) -> bool:
        """Whether the guest's processors run."""
        return self.status == "running"

    @property
    def closes_fds_at_once(self) -> bool:
        """Whether removed descriptors are closed at once: before 9.1 only while the processors run.

        Measured: the conformance script `a_stopped_machine_may_keep_a_removed_set`.
        """
        return self.running or self.settings.version >= (9, 1, 0)

    @property
    def nbd_clients(self) -> int:
        """How many NBD clients have chosen an export."""
        return sum(export.clients for export in self.exports.values())

    def top(self, disk: str) -> Node:
        """Return the node that a disk's device writes to. Raises CommandError."""
        device = self.devices.get(disk)
        if device is None or device.link is None:
            raise CommandError(f"there is no disk {disk!r}")
        return device.link.node

    def emit_event(self, event: str, data: dict[str, object] | None = None) -> None:
        """Send an event to the monitors' clients."""
        now = time.time_ns() // 1000
        stamp = {"seconds": now // 1_000_000, "microseconds": now % 1_000_000}
        self._send({"timestamp": stamp, "event": event} | ({"data": data} if data is not None else {}))

    def receive_fd(self, fd: int | None) -> None:
        """Keep a descriptor for the next command; an unused one is closed."""
        if self.received_fd is not None:
            os.close(self.received_fd)
        self.received_fd = fd

    def clients_left(self) -> None:
        """Close the unused descriptors: the last client of a monitor has disconnected."""
        self.receive_fd(None)
        if self.closes_fds_at_once:
            self.descriptors.sweep()

    def set_status(self, status: str) -> None:
        """Start or stop the guest's processors."""
        self.status = status
        self.guest.running = self.running

    def keep_moment(self) -> None:
        """Copy all disks as they are now, if the settings say so."""
        if not self.settings.keep_moments:
            return
        moment = Moment(self.moment.number + 1 if self.moment else 1, time.time())
        for name in [name for name, device in self.devices.items() if device.link]:
            path = self.settings.directory / f"{name}.moment"
            guest.copy_out(self.top(name), path)
            moment.disks[name] = path
        self.moment = moment

    def drop_export(self, export: Export) -> None:
        """Remove an export, with the event of its removal."""
        self.nbd.withdraw(export)
        self._export_gone(export)

    def stop_nbd(self) -> None:
        """Stop the NBD server and with it all its exports. Raises CommandError."""
        for export in self.nbd.stop():
            export.shutting_down = True
            self._export_gone(export)

    def end(self, *, clean: bool) -> None:
        """End: cleanly, which stores bitmaps, or as by SIGKILL."""
        self.guest.stop()
        if self.nbd.running:
            self.stop_nbd()
        for export in list(self.exports.values()):
            self._export_gone(export)
        if clean:
            for job in list(self.jobs.jobs.values()):
                if job.status == "running":
                    self.jobs.cancel(job)
            for node in self._nodes.values():
                if not node.read_only:
                    node.store_bitmaps()
        self.graph.close()
        self.receive_fd(None)
        self.descriptors.close()

    def _plug(self, spec: DiskSpec) -> Node:
        node = disks.open_disk(spec, self.settings.directory, self.graph, self.emit_event, self.opener)
        iothread = f"io-{spec.name}" if spec.iothread else ""
        device = Device(spec.name, "virtio-blk-pci", None, iothread)
        device.write_to(self.graph, node)
        self.devices[spec.name] = device
        return node

    def _export_gone(self, export: Export) -> None:
        for bitmap in export.bitmaps:
            bitmap.busy -= 1
        self.graph.unlink(export.link)
        del self.exports[export.id]
        self.emit_event("BLOCK_EXPORT_DELETED", {"id": export.id})

    def _client_left(self, export: Export) -> None:
        """A client disconnected before its export was removed: on an iothread's disk some QEMUs abort."""
        first, fixed = ABORTS
        if first <= self.settings.version < fixed and self._on_iothread(export):
            self.power.end("abort")

    def _on_iothread(self, export: Export) -> bool:
        iothreads = [device for device in self.devices.values() if device.iothread and device.link]
        return any(
            device.link and self.graph.connected(device.link.node, export.node) for device in iothreads
        )
