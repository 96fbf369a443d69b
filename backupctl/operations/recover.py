# SPDX-License-Identifier: GPL-2.0-or-later
"""Bringing a VM and its folder to rest: after a good run, a failed one, or one that died anywhere.

The question is always the same: does the point's folder stand under its final name? Yes: the run is
finished (its base bitmap retired). No: it is undone (what its bitmap recorded goes back to the base).
Either way export, server, job, node and scratch go. Nothing is taken from memory: QEMU and the
repository are asked, so every line may be the last one of a dying process, and the next call goes on.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backupctl.errors import (
    AgentError,
    BackupctlError,
    CommandFailed,
    DamageFound,
    MonitorError,
    MonitorUnreachable,
    NeedsRecovery,
    NoSuchPoint,
    RepositoryError,
    RepositoryUnreadable,
    UnknownFormat,
)
from backupctl.events.backup import RecoveredFromEarlierRun
from backupctl.names import DiskName, Namespace, NodeName, PointId, VmName
from backupctl.options import RunOptions, VmConfig
from backupctl.progress import Reporter
from backupctl.repository import audit
from backupctl.repository.pending_point import PendingPoint
from backupctl.repository.repository import Repository
from backupctl.repository.vm_folder import VmFolder
from backupctl.vm import bitmap, disk
from backupctl.vm.guest.guard import thaw_if_frozen
from backupctl.vm.qmp import bitmaps, scratch, teardown
from backupctl.vm.qmp import inventory as disks
from backupctl.vm.qmp.monitor import Monitor

DEFAULTS = RunOptions(kind="incremental")


@dataclass(frozen=True)
class Recovered:
    """What was finished or undone, in words; empty if all was at rest."""

    actions: tuple[str, ...]


def recover(
    vm: VmConfig, repository: Repository, reporter: Reporter, scratch_folder: Path = DEFAULTS.scratch
) -> Recovered:
    """Finish or undo whatever an earlier run left of this VM.

    Raises Locked while a run is under way, MonitorUnreachable, NeedsRecovery.
    """
    folder = repository.vm(vm.name)
    try:
        with folder.lock():
            thawed = _thaw_first(vm, folder, reporter)
            with Monitor.connect(vm.qmp, DEFAULTS.command_timeout_seconds) as monitor:
                told = settle(vm, folder, repository.owner, monitor, scratch_folder)
    except MonitorUnreachable as err:
        if folder.pending_points():
            raise needs_recovery(err, vm.name) from err
        raise err.add(state="nothing was touched", next_command=f"backupctl doctor {vm.name}") from err
    except RepositoryUnreadable as err:  # so nobody can tell what a dead run left
        raise needs_recovery(err, vm.name) from err
    for line in told:
        reporter.event(RecoveredFromEarlierRun(line))
    return Recovered((*thawed, *told))


def settle(
    vm: VmConfig,
    folder: VmFolder,
    owner: Namespace,
    monitor: Monitor,
    scratch_folder: Path,
    *,
    clients: teardown.Clients = teardown.NO_CLIENTS,
    server_is_ours: bool = True,
    await_thaw: Callable[[], None] | None = None,
) -> list[str]:
    """Do the work of `recover` for a caller who holds the lock and the monitor.

    await_thaw: for a caller whose guard has the guest in hand. It has the agent too: QEMU's channel serves
    one client at a time, so a second conversation would only wait.

    The guest comes first: it is thawed before anything else is looked at. An agent that is silent then is
    asked again when all else is done, which spares the guest the rest. Returns what was done, in
    words. clients, server_is_ours: as for `teardown.teardown`. Raises NeedsRecovery.
    """
    told: list[str] = []
    try:
        if await_thaw is None:
            with suppress(AgentError):
                told += _thaw(vm, folder)
        ours = server_is_ours and _may_serve(folder)
        told += teardown.teardown(monitor, owner, actives(folder), clients=clients, server_is_ours=ours)
        told += settle_bitmaps(monitor, owner, folder)
        # The journal alone tells that a freeze is ours to end, so it stays for as long as there may be one.
        if await_thaw is None:
            told += _thaw(vm, folder)
        else:
            await_thaw()
        told += drop_leftover_files(vm, folder, owner, scratch_folder)
    except AgentError as err:
        err.message += "; if this VM has no agent any more, call recover without --agent"
        raise needs_recovery(err, vm.name) from err
    except MonitorError as err:
        raise needs_recovery(err, vm.name) from err
    return told


def settle_bitmaps(monitor: Monitor, owner: Namespace, folder: VmFolder) -> list[str]:
    """Bring the bitmaps of all nodes to rest, in one transaction. Raises MonitorError, RepositoryError.

    A read-only node is a backing layer (an external snapshot left the bitmap behind) or a medium; its
    bitmaps are of no use. They are removed where QEMU lets us, and must not stop the others.
    """
    actions: list[bitmaps.Action] = []
    told: list[str] = []
    for settlement, reply in settlements(monitor, owner, folder):
        if not reply.get("ro"):
            actions += settlement.actions
            told += settlement.told
        elif settlement.actions:
            told += _try_aside(monitor, settlement)
    monitor.transaction(actions)
    return told


def newest_recorded(monitor: Monitor, owner: Namespace) -> PointId | None:
    """Return the newest point from which a bitmap in QEMU records, committed here or not.

    A copy of the repository may have made it, and that of the same second: no id may be used twice.
    Raises MonitorError.
    """
    found = [
        point
        for node, reply in disks.named_nodes(monitor).items()
        for bitmap in disks.bitmaps_of(node, reply)
        if (point := owner.point_of(bitmap.name))
    ]
    return max(found, default=None)


def gone(monitor: Monitor, owner: Namespace, folder: VmFolder) -> tuple[PointId, ...]:
    """Return the points that are gone: the history says so, or a bitmap names one of which nothing is there.

    The latter is what an older copy of the repository looks like, put back in its place. To be asked before
    `settle`, which takes such a bitmap for an unfinished run's. Raises MonitorError, RepositoryError.
    """
    found = set(_lost(folder))
    recorded, newest = newest_recorded(monitor, owner), folder.newest()
    if recorded and (newest is None or recorded > newest) and not audit.is_unfinished(folder, recorded):
        found.add(recorded)
    return tuple(sorted(found))


def drop_leftover_files(vm: VmConfig, folder: VmFolder, owner: Namespace, scratch_folder: Path) -> list[str]:
    """Drop unfinished points and scratch folders. The caller holds the VM's lock."""
    told = []
    for partial in folder.pending_points():
        partial.drop()
        told.append(f"dropped the unfinished point {partial.point}")
    return told + scratch.sweep(owner, vm.name, scratch_folder)


def actives(folder: VmFolder) -> dict[int, NodeName]:
    """Return the active node of each disk of an unfinished run, by the disk's number in it."""
    journals = [journal for partial in folder.pending_points() if (journal := partial.journal())]
    return {disk.number: disk.node for journal in journals for disk in journal.disks}


def _may_serve(folder: VmFolder) -> bool:
    """Whether an unfinished run may have started QEMU's NBD server: not before it noted that step."""
    journals = [partial.journal() for partial in folder.pending_points()]
    return not journals or any(journal is None or journal.step == "export" for journal in journals)


def needs_recovery(err: BackupctlError, vm: VmName) -> NeedsRecovery:
    """Say that something of ours is still in the VM, and what to do."""
    return NeedsRecovery(
        err.message,
        step=err.step,
        state=(
            "what this run put into the VM may still be there; "
            "no committed point and no recorded change is lost"
        ),
        next_command=f"backupctl recover {vm}",
    )


def _thaw(vm: VmConfig, folder: VmFolder) -> list[str]:
    """Thaw the guest if a dead run of ours had frozen it. A freeze by anybody else is not ours to end."""
    if (
        any(map(froze, folder.pending_points()))
        and vm.agent
        and thaw_if_frozen(vm.agent, DEFAULTS.agent_timeout_seconds)
    ):
        return ["thawed the guest's file systems"]
    return []


def froze(partial: PendingPoint) -> bool:
    """Whether an unfinished run may have left the guest frozen."""
    journal = partial.journal()
    return journal is not None and journal.froze


def _thaw_first(vm: VmConfig, folder: VmFolder, reporter: Reporter) -> list[str]:
    """Thaw before anything else: the monitor may be in somebody's hands, and the guest must not wait for it.

    An agent that is silent is asked again by `settle`.
    """
    told: list[str] = []
    with suppress(AgentError):
        told = _thaw(vm, folder)
    for line in told:
        reporter.event(RecoveredFromEarlierRun(line))
    return told


def _try_aside(monitor: Monitor, settlement: bitmaps.BitmapPlan) -> list[str]:
    try:
        monitor.transaction(list(settlement.actions))
    except CommandFailed:
        return []
    return list(settlement.told)


def settlements(
    monitor: Monitor, owner: Namespace, folder: VmFolder
) -> Iterator[tuple[bitmaps.BitmapPlan, Mapping[str, Any]]]:
    """Yield what must happen to each node's bitmaps, with the node's reply. Raises MonitorError."""
    checkpoints, lost = _checkpoints(folder), _lost(folder)
    for node, reply in disks.named_nodes(monitor).items():
        found = disks.bitmaps_of(node, reply)
        yield (
            bitmaps.plan_bitmap_recovery(
                found, owner, folder.is_committed, checkpoints, lost, theirs(folder)
            ),
            reply,
        )


def _lost(folder: VmFolder) -> tuple[PointId, ...]:
    """Return the points that were committed and are gone; none if that can't be told: it is said, no more."""
    try:
        return audit.missing(folder)
    except RepositoryError:
        return ()


def theirs(folder: VmFolder) -> bitmaps.Theirs:
    """Return what tells whether a point is another VM's of this repository."""
    return lambda point: not folder.is_committed(point) and folder.user_elsewhere(point) is not None


@dataclass(frozen=True)
class Foreseen:
    """A VM as it will be when recovery is done, without anything being done.

    left: in words what there is to clean up in QEMU.
    """

    inventory: disk.Inventory
    left: tuple[str, ...]


def foresee(
    monitor: Monitor, owner: Namespace, folder: VmFolder, stored_names: Mapping[str, str] | None = None
) -> Foreseen:
    """Return what a run finds once it has recovered. Changes nothing. Raises MonitorError, Refused."""
    left = teardown.leftovers(monitor, owner)
    found = disks.inventory(monitor, stored_names, _beneath_ours(owner, folder, left))
    exported = any(one.startswith("export ") for one in left)
    after: dict[NodeName, tuple[bitmap.Bitmap, ...]] = {}
    for settlement, reply in settlements(monitor, owner, folder):
        if not reply.get("ro"):
            node = NodeName(reply["node-name"])
            there = disks.bitmaps_of(node, reply)
            after[node] = bitmaps.applied(there, settlement.actions, freed=exported)
            left += settlement.ahead
    return Foreseen(disks.with_bitmaps(found, after), tuple(left))


def _beneath_ours(owner: Namespace, folder: VmFolder, left: Iterable[str]) -> dict[DiskName, NodeName]:
    """Return the disks over which an unfinished run has a job or filter, with the nodes below, as noted."""
    journals = [journal for partial in folder.pending_points() if (journal := partial.journal())]
    ours = {one.split()[-1] for one in left}
    return {
        disk.name: disk.node
        for journal in journals
        for disk in journal.disks
        if ours & {owner.node("job", disk.number), owner.node("cbw", disk.number)}
    }


def _checkpoints(folder: VmFolder) -> int:
    """Return how many older bitmaps the newest point wants kept; all if it can't be asked."""
    try:
        return folder.point("latest").manifest.checkpoints
    except NoSuchPoint:
        return 0
    except (DamageFound, RepositoryUnreadable, UnknownFormat):
        return sys.maxsize
