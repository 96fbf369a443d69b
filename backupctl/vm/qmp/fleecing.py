# SPDX-License-Identifier: GPL-2.0-or-later
"""Fleecing: a scratch node over the active disk, filled by a backup job before each write of the guest.

::

    guest ──► [active node] ◄── backing ── [tmp: empty qcow2] ◄── NBD export
                    │                          ▲
                    └── blockdev-backup sync=none: old content, before it is overwritten

A scratch file that may not be large enough lies behind a limit (see `room`), and its file node has a name
and a write threshold.

Source: V. Sementsov-Ogievskiy on the qemu-block list, 26 Dec 2017 and 15 Mar 2022. QEMU serialises the
NBD reads against the copying itself. All disks and all bitmaps change in one transaction.
"""

import time
from collections.abc import Collection, Sequence

from backupctl.errors import Failed
from backupctl.names import Namespace, NodeName
from backupctl.system import files
from backupctl.vm.guest.guard import GuardClient
from backupctl.vm.qmp import throttle
from backupctl.vm.qmp.bitmaps import Action
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.qmp.point_in_time import DiskSnapshot
from backupctl.vm.qmp.reply import understood
from backupctl.vm.qmp.scratch import Scratch, Scratches
from backupctl.vm.qmp.scratch_space import ScratchBudget

_LIMIT_SECONDS = 1.0
_WORKING = frozenset({"running", "paused", "ready", "standby"})


class Fleecing:
    """The default view; needs QEMU 5.2.

    cuts: the disks and their bitmaps. rooms: for the scratch of each.
    """

    def __init__(
        self,
        monitor: Monitor,
        owner: Namespace,
        cuts: Sequence[DiskSnapshot],
        rooms: Sequence[ScratchBudget],
        scratches: Scratches,
    ) -> None:
        self._monitor = monitor
        self._owner = owner
        self._cuts = tuple(cuts)
        self._rooms = tuple(rooms)
        self._scratches = scratches
        self._limited_at = 0.0
        self._stands = False
        self.atomic = True

    def prepare(self) -> None:
        """Add the scratch nodes."""
        for number, (cut, room) in enumerate(zip(self._cuts, self._rooms, strict=True)):
            node = self._owner.node("tmp", number)
            made = self._scratches.make(node, cut.disk.size, room.size)
            self._monitor.execute(
                "blockdev-add",
                {
                    "driver": "qcow2",
                    "node-name": node,
                    "file": self._file(number, made, room),
                    "backing": cut.disk.node,
                },
            )
            if room.abort_at is not None:
                watched = {"node-name": self._owner.node("fil", number), "write-threshold": room.abort_at}
                self._monitor.execute("block-set-write-threshold", watched)

    def register_guard(self, guard: GuardClient) -> None:
        """Have the guard end the jobs if we die, and look that no scratch file is used up."""
        for number, (made, room) in enumerate(zip(self._scratches.made, self._rooms, strict=True)):
            job, limited = self._owner.node("job", number), room.stop is not None
            guard.watch(job, made.descriptor, room.abort_at, limited=limited)

    def cut(self) -> None:
        """One transaction: new bitmaps, old bitmaps disabled, copy-before-write on; for all disks."""
        actions: list[Action] = []
        for number, cut in enumerate(self._cuts):
            actions += cut.bitmap_actions()
            actions.append(self._backup(number, cut))
        self._monitor.jobs_ended()  # those of a dead run, which had the same names
        self._monitor.transaction(actions)
        self._stands = True

    def export_nodes(self) -> tuple[NodeName, ...]:
        """Return the scratch nodes: what isn't in one is read from its backing, the active node."""
        return tuple(self._owner.node("tmp", number) for number in range(len(self._cuts)))

    def check(self) -> None:
        """Raise Failed when a scratch file or its folder is filling up: a full one fails GUEST writes."""
        passed = self._monitor.thresholds_passed()
        for number, (cut, room) in enumerate(zip(self._cuts, self._rooms, strict=True)):
            if self._owner.node("fil", number) in passed:
                raise Failed(
                    f"the guest overwrote so much of {cut.disk.name} that its scratch file is filling up "
                    f"({room.size >> 20} MiB were set aside in {self._scratches.folder}, "
                    f"{room.ideal_bytes >> 20} MiB would do for all that the disk holds): "
                    "gave up before the guest's own writes could fail"
                )
        if self._stands:
            self._refuse_ended(self._monitor.jobs_ended())
        self._set_limits()
        self._scratches.check()

    def verify_active(self) -> None:
        """Raise Failed if somebody has ended a job of ours: what the guest wrote then was not kept apart."""
        jobs = self._monitor.execute("query-jobs")
        with understood("query-jobs"):
            working = {job["id"] for job in jobs if job["status"] in _WORKING}
        ours = {self._owner.node("job", number) for number in range(len(self._cuts))}
        self._refuse_ended(ours - working)

    def close(self) -> None:
        """Close our descriptors of the scratch files."""
        self._scratches.close()

    def _refuse_ended(self, ended: Collection[str]) -> None:
        for number, cut in enumerate(self._cuts):
            if self._owner.node("job", number) in ended:
                raise Failed(
                    f"the job that kept {cut.disk.name} at its moment was ended by somebody else, "
                    "so what was read may be of later"
                )

    def _set_limits(self) -> None:
        """Set each limit's bucket to what really is left; by itself it leaks."""
        now = time.monotonic()
        if now - self._limited_at < _LIMIT_SECONDS:
            return
        self._limited_at = now
        for number, (made, room) in enumerate(zip(self._scratches.made, self._rooms, strict=True)):
            if room.stop is not None:
                left = throttle.burst_limits(room.stop - files.used_bytes(made.descriptor))
                throttle.change(self._monitor, self._owner.node("lim", number), left)

    def _file(self, number: int, made: Scratch, room: ScratchBudget) -> dict[str, object]:
        file: dict[str, object] = {"driver": "file", "filename": made.filename}
        if room.abort_at is not None:
            file["node-name"] = self._owner.node("fil", number)
        if room.stop is None:
            return file
        group = self._owner.node("lim", number)
        throttle.make(self._monitor, group, room.stop)
        return {"driver": "throttle", "throttle-group": group, "file": file}

    def _backup(self, number: int, cut: DiskSnapshot) -> Action:
        arguments = {
            "job-id": self._owner.node("job", number),
            "device": cut.disk.node,
            "target": self._owner.node("tmp", number),
            "sync": "none",
        }
        return {"type": "blockdev-backup", "data": arguments}
