# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshot access: a copy-before-write filter between the device and its active node.

::

    guest ──► [cbw: copy-before-write, on-cbw-error=break-snapshot] ──► [active node]
                   │                    ▲
       old content ▼                    └── [acc: snapshot-access] ◄── NBD export
              [tmp: empty qcow2]

What it is for: a scratch file that can't grow breaks the SNAPSHOT here, and with it our run; with fleecing
it fails the guest's own write (``test_a_full_scratch_fails_the_guests_write_under_fleecing``). Needs devices
whose ``drive`` property can be set while they run, and QEMU 10.0: the drivers are older (7.1), but on 7.2.22
whole clusters that the guest overwrites with zeroes read as zeroes in the snapshot, although their old data
are copied; never on 10.0.2 (``test_what_zeroes_overwrite_is_lost_from_snapshot_access_before_10_0``). A
backup that is silently wrong is worse than none.

Putting the filter in can't be part of a transaction, so the order carries the safety
(`test_known_moment.py`, with a guest that writes): first the new bitmap records, then the filter goes in,
then the base bitmap stops. In between both bitmaps record, so each holds at least what it must; any other
order loses writes. The filter is not limited to the base bitmap: it is made before the base stops, so writes
in between would be missing from its limit, and could then not be read.

Several disks are filtered one after the other. That is one point in time only while the guest is frozen, so
without a freeze this view takes one disk only (`atomic`).
"""

from collections.abc import Sequence

from backupctl.errors import Failed, ViewUnavailable
from backupctl.names import Namespace, NodeKind, NodeName
from backupctl.vm.disk import Disk
from backupctl.vm.driver import ScratchBudget
from backupctl.vm.guest.guard import GuardClient
from backupctl.vm.qmp import bitmaps, inventory, unchanged
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.qmp.point_in_time import ViewDisk, device_path
from backupctl.vm.qmp.scratch import ScratchFiles

CBW_TIMEOUT_SECONDS = 30
"""How long a guest's write may wait for its copy before the snapshot is broken instead."""


def view_error(monitor: Monitor, chosen: Sequence[Disk]) -> str:
    """Say why this VM cannot have this view; "" if it can."""
    if not monitor.version.at_least(10, 0):
        return f"QEMU {monitor.version} is older than 10.0, from which on it is known to be right"
    if "qom-set" not in monitor.commands or any(not disk.qdev for disk in chosen):
        return "a disk has no device whose drive can be exchanged"
    if shared := [disk.name for disk in chosen if disk.shared]:
        return f"several devices write to {', '.join(shared)}, and the filter would stand under one of them"
    return ""


class SnapshotAccess:
    """The view that keeps the guest safe from a full scratch file."""

    def __init__(
        self,
        monitor: Monitor,
        namespace: Namespace,
        disks: Sequence[ViewDisk],
        budgets: Sequence[ScratchBudget],
        scratch: ScratchFiles,
    ) -> None:
        self._monitor = monitor
        self._namespace = namespace
        self._disks = tuple(disks)
        self._budgets = tuple(budgets)
        self._scratch = scratch
        self.atomic = len(self._disks) == 1

    def prepare(self) -> None:
        """Add scratch nodes and filters; no device uses them yet. Raises Refused, MonitorError."""
        if reason := view_error(self._monitor, [one.disk for one in self._disks]):
            raise ViewUnavailable(f"--view snapshot-access is not available: {reason}")
        for number, (one, budget) in enumerate(zip(self._disks, self._budgets, strict=True)):
            node = self._namespace.node(NodeKind.SCRATCH, number)
            made = self._scratch.make(node, one.disk.size, budget.size)
            file = {"driver": "file", "filename": made.filename}
            self._monitor.execute("blockdev-add", {"driver": "qcow2", "node-name": node, "file": file})
            self._monitor.execute("blockdev-add", self._filter(number, one))

    def register_guard(self, guard: GuardClient) -> None:
        """Nothing can harm the guest: a scratch file that can't grow breaks the snapshot."""

    def start(self) -> None:
        """New bitmaps record, the filters go in, the base bitmaps stop: in this order."""
        self._monitor.transaction(
            [action for one in self._disks for action in one.bitmap_actions if _adds(action)]
        )
        for number, one in enumerate(self._disks):
            # Of a snapshot taken meanwhile this would take the guest's newest layer from it.
            unchanged.refuse_moved(self._monitor, [one.disk])
            drive = {"path": device_path(one.disk.qdev), "property": "drive"}
            self._monitor.execute(
                "qom-set", {**drive, "value": self._namespace.node(NodeKind.FILTER, number)}
            )
        self._monitor.transaction(
            [action for one in self._disks for action in one.bitmap_actions if not _adds(action)]
        )

    def export_nodes(self) -> tuple[NodeName, ...]:
        """Add the nodes that read from active node and scratch what the filter keeps apart."""
        nodes = tuple(self._namespace.node(NodeKind.ACCESS, number) for number in range(len(self._disks)))
        for number, node in enumerate(nodes):
            source = self._namespace.node(NodeKind.FILTER, number)
            self._monitor.execute(
                "blockdev-add", {"driver": "snapshot-access", "node-name": node, "file": source}
            )
        return nodes

    def check(self) -> None:
        """Nothing to watch: a full scratch breaks the snapshot, and the copy's next read fails."""

    def verify_active(self) -> None:
        """Raise Failed if a device no longer writes through its filter."""
        root_nodes = inventory.root_nodes(self._monitor)
        for number, one in enumerate(self._disks):
            if root_nodes.get(one.disk.qdev) != self._namespace.node(NodeKind.FILTER, number):
                raise Failed(
                    f"{one.disk.name} no longer writes through the filter that kept it as it was: somebody "
                    "else removed it or put another node over it, so what was read may be newer"
                )

    def close(self) -> None:
        """Close our descriptors of the scratch files."""
        self._scratch.close()

    def _filter(self, number: int, one: ViewDisk) -> dict[str, object]:
        return {
            "driver": "copy-before-write",
            "node-name": self._namespace.node(NodeKind.FILTER, number),
            "file": one.disk.node,
            "target": self._namespace.node(NodeKind.SCRATCH, number),
            "on-cbw-error": "break-snapshot",
            "cbw-timeout": CBW_TIMEOUT_SECONDS,
        }


def _adds(action: bitmaps.Action) -> bool:
    return action["type"] != "block-dirty-bitmap-disable"
