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
"""QEMU from the first and before the second version aborts when an NBD client leaves an iothread's disk."""


@dataclass(frozen=True)
class Settings:
    """What a simulated QEMU is started with.

    folder: where its disks lie. version: that it claims. cdroms: names of empty drives. paused: as by -S.
    keep_moments: copy the disks at each moment of a backup.
    """

    folder: Path
    disks: tuple[DiskSpec, ...]
    version: tuple[int, int, int] = (7, 2, 22)
    seed: int = 0
    cdroms: tuple[str, ...] = ()
    paused: bool = False
    keep_moments: bool = False


@dataclass
class Power:
    """Ways in which the machine ends, done by who runs it.

    end: takes one of kill, quit, crash, restart, abort, segv.
    """

    end: Callable[[str], None]


@dataclass
class Moment:
    """A kept moment. disks: raw files by the disk's name."""

    number: int
    at: float
    disks: dict[str, Path] = field(default_factory=dict)


class Machine:
    """A simulated QEMU with its guest."""

    def __init__(
        self, settings: Settings, faults: Faults, tell: Callable[[dict[str, Any]], None], power: Power
    ) -> None:
        self.settings = settings
        self.faults = faults
        self.power = power
        self._tell = tell
        self.graph = Graph()
        self.descriptors = Descriptors()
        self.jobs = Jobs(self.graph, self.tell)
        self.actions = Actions(self.graph, self.jobs, settings.version, lambda: power.end("segv"))
        self.opener = Opener(self.graph, self.descriptors, self.tell, lambda: self.lets_go)
        self.opener.capacity, self.opener.version = faults.capacity, settings.version
        self.nbd = NbdServer(faults, self._client_left)
        self.exports: dict[str, Export] = {}
        self.devices: dict[str, Device] = {}
        self.status = "prelaunch" if settings.paused else "running"
        self.moment: Moment | None = None
        self.received_fd: int | None = None  # came over the monitor's socket, not yet taken by a command
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
    def lets_go(self) -> bool:
        """Whether descriptors that were removed go at once: before 9.1 only while the processors run."""
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

    def tell(self, event: str, data: dict[str, object] | None = None) -> None:
        """Send an event to whoever is at the monitor."""
        now = time.time_ns() // 1000
        stamp = {"seconds": now // 1_000_000, "microseconds": now % 1_000_000}
        self._tell({"timestamp": stamp, "event": event} | ({"data": data} if data is not None else {}))

    def receive_fd(self, fd: int | None) -> None:
        """Keep a descriptor for the command that follows; one that nobody took is closed."""
        if self.received_fd is not None:
            os.close(self.received_fd)
        self.received_fd = fd

    def clients_left(self) -> None:
        """The last client of a monitor is gone, and with it what was sent and nothing uses."""
        self.receive_fd(None)
        if self.lets_go:
            self.descriptors.sweep()

    def set_status(self, status: str) -> None:
        """Run or stop the guest's processors."""
        self.status = status
        self.guest.running = self.running

    def keep_moment(self) -> None:
        """Copy all disks as they are now, if that was asked for."""
        if not self.settings.keep_moments:
            return
        moment = Moment(self.moment.number + 1 if self.moment else 1, time.time())
        for name in [name for name, device in self.devices.items() if device.link]:
            path = self.settings.folder / f"{name}.moment"
            guest.copy_out(self.top(name), path)
            moment.disks[name] = path
        self.moment = moment

    def drop_export(self, export: Export) -> None:
        """Take an export away; the event says when it is gone."""
        self.nbd.withdraw(export)
        self._export_gone(export)

    def stop_nbd(self) -> None:
        """Stop the NBD server and with it all its exports. Raises CommandError."""
        for export in self.nbd.stop():
            export.shutting_down = True
            self._export_gone(export)

    def end(self, *, clean: bool) -> None:
        """End: cleanly, with bitmaps stored, or as by SIGKILL."""
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
        node = disks.open_disk(spec, self.settings.folder, self.graph, self.tell, self.opener)
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
        self.tell("BLOCK_EXPORT_DELETED", {"id": export.id})

    def _client_left(self, export: Export) -> None:
        """A client went away while its export stood: fatal to some QEMUs on an iothread's disk."""
        first, fixed = ABORTS
        if first <= self.settings.version < fixed and self._on_iothread(export):
            self.power.end("abort")

    def _on_iothread(self, export: Export) -> bool:
        iothreads = [device for device in self.devices.values() if device.iothread and device.link]
        return any(
            device.link and self.graph.connected(device.link.node, export.node) for device in iothreads
        )
