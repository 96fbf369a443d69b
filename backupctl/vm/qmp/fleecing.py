# SPDX-License-Identifier: GPL-2.0-or-later
"""Fleecing: a scratch node over the active disk, filled by a backup job before each write of the guest.

::

    guest ──► [active node] ◄── backing ── [tmp: empty qcow2] ◄── NBD export
                    │                          ▲
                    └── blockdev-backup sync=none: old content, before it is overwritten

A scratch file that may not be large enough is behind a throttle group (see `scratch_space`), and its file
node has a name and a write threshold.

Source: V. Sementsov-Ogievskiy on the qemu-block list, 26 Dec 2017 and 15 Mar 2022. QEMU serialises the
NBD reads against the copying itself. All disks and all bitmaps change in one transaction.
"""

import time
from collections.abc import Collection, Sequence

from backupctl.errors import Failed
from backupctl.names import Namespace, NodeKind, NodeName
from backupctl.vm.driver import ScratchBudget
from backupctl.vm.guest.guard import GuardClient
from backupctl.vm.qmp import throttle
from backupctl.vm.qmp.bitmaps import Action
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.qmp.point_in_time import ViewDisk
from backupctl.vm.qmp.reply import understood
from backupctl.vm.qmp.scratch import Scratch, ScratchFiles

_LIMIT_SECONDS = 1.0
_WORKING = frozenset({"running", "paused", "ready", "standby"})


class Fleecing:
    """The default view; needs QEMU 5.2.

    budgets: for the scratch file of each disk.
    """

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
        self._relaxed_at = time.monotonic()  # each group is made with what its file has
        self._started = False
        self.atomic = True

    def prepare(self) -> None:
        """Add the scratch nodes."""
        for number, (one, budget) in enumerate(zip(self._disks, self._budgets, strict=True)):
            node = self._namespace.node(NodeKind.SCRATCH, number)
            made = self._scratch.make(node, one.disk.size, budget.size)
            self._monitor.execute(
                "blockdev-add",
                {
                    "driver": "qcow2",
                    "node-name": node,
                    "file": self._file(number, made, budget),
                    "backing": one.disk.node,
                },
            )
            if budget.abort_at is not None:
                watched = {
                    "node-name": self._namespace.node(NodeKind.FILE, number),
                    "write-threshold": budget.abort_at,
                }
                self._monitor.execute("block-set-write-threshold", watched)

    def register_guard(self, guard: GuardClient) -> None:
        """Have the guard end the jobs if this process dies, and watch that no scratch file is used up."""
        for number, (made, budget) in enumerate(zip(self._scratch.made, self._budgets, strict=True)):
            job, limited = self._namespace.node(NodeKind.JOB, number), budget.throttle_at is not None
            group = self._namespace.node(NodeKind.LIMIT, number) if limited else None
            guard.watch(job, made.descriptor, budget.abort_at, group)

    def start(self) -> None:
        """One transaction: new bitmaps, old bitmaps disabled, copy-before-write on; for all disks."""
        actions: list[Action] = []
        for number, one in enumerate(self._disks):
            actions += one.bitmap_actions
            actions.append(self._backup(number, one))
        self._monitor.jobs_ended()  # those of a dead run, which had the same names
        self._monitor.transaction(actions)
        self._started = True

    def export_nodes(self) -> tuple[NodeName, ...]:
        """Return the scratch nodes: what isn't in one is read from its backing, the active node."""
        return tuple(self._namespace.node(NodeKind.SCRATCH, number) for number in range(len(self._disks)))

    def check(self) -> None:
        """Raise Failed when a scratch file or its directory is filling up: a full one fails GUEST writes."""
        passed = self._monitor.thresholds_passed()
        for number, (one, budget) in enumerate(zip(self._disks, self._budgets, strict=True)):
            if self._namespace.node(NodeKind.FILE, number) in passed:
                raise Failed(
                    f"the guest overwrote much of {one.disk.name}, and its scratch file is filling up "
                    f"({budget.size >> 20} MiB were reserved in {self._scratch.directory}, "
                    f"{budget.ideal_bytes >> 20} MiB would be enough for all that the disk holds): "
                    "gave up before the guest's own writes could fail"
                )
        if self._started:
            self._refuse_ended(self._monitor.jobs_ended())
        self._renew_limits()
        self._scratch.check()

    def verify_active(self) -> None:
        """Raise Failed if somebody ended a job of ours: what the guest overwrote after that is lost."""
        jobs = self._monitor.execute("query-jobs")
        with understood("query-jobs"):
            working = {job["id"] for job in jobs if job["status"] in _WORKING}
        ours = {self._namespace.node(NodeKind.JOB, number) for number in range(len(self._disks))}
        self._refuse_ended(ours - working)

    def close(self) -> None:
        """Close our descriptors of the scratch files."""
        self._scratch.close()

    def _refuse_ended(self, ended: Collection[str]) -> None:
        for number, one in enumerate(self._disks):
            if self._namespace.node(NodeKind.JOB, number) in ended:
                raise Failed(
                    f"somebody else ended the job that kept {one.disk.name} as it was at the point in time, "
                    "so what was read may be newer"
                )

    def _renew_limits(self) -> None:
        """Set each throttle group's burst to what really is left; by itself its bucket leaks."""
        now = time.monotonic()
        if now - self._relaxed_at < _LIMIT_SECONDS:
            return
        self._relaxed_at = now
        for number, (made, budget) in enumerate(zip(self._scratch.made, self._budgets, strict=True)):
            if budget.throttle_at is not None:
                left = throttle.burst_limits(budget.throttle_at - self._scratch.used_bytes(made))
                throttle.change(self._monitor, self._namespace.node(NodeKind.LIMIT, number), left)

    def _file(self, number: int, made: Scratch, budget: ScratchBudget) -> dict[str, object]:
        file: dict[str, object] = {"driver": "file", "filename": made.filename}
        if budget.abort_at is not None:
            file["node-name"] = self._namespace.node(NodeKind.FILE, number)
        if budget.throttle_at is None:
            return file
        group = self._namespace.node(NodeKind.LIMIT, number)
        throttle.make(self._monitor, group, budget.throttle_at)
        return {"driver": "throttle", "throttle-group": group, "file": file}

    def _backup(self, number: int, one: ViewDisk) -> Action:
        arguments = {
            "job-id": self._namespace.node(NodeKind.JOB, number),
            "device": one.disk.node,
            "target": self._namespace.node(NodeKind.SCRATCH, number),
            "sync": "none",
        }
        return {"type": "blockdev-backup", "data": arguments}
