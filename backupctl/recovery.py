# SPDX-License-Identifier: GPL-2.0-or-later
"""Bringing a VM and its folder to rest: after a good run, a failed one, or one that died anywhere.

The question is always the same: does the point's folder stand under its final name? Yes: the run is
finished (its base bitmap retired). No: it is undone (what its bitmap recorded goes back to the base).
Either way export, server, job, node and scratch go. Nothing is taken from memory: QEMU and the
repository are asked, so every line may be the last one of a dying process, and the next call goes on.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backupctl import planning
from backupctl.errors import (
    AgentError,
    BackupctlError,
    CommandFailed,
    DamageFound,
    MonitorError,
    MonitorUnreachable,
    NeedsRecovery,
    NoSuchPoint,
    Refused,
    UnknownFormat,
)
from backupctl.names import DiskName, NodeName, Owner, PointId, VmName
from backupctl.report import Reporter
from backupctl.repository import chain
from backupctl.repository.layout import Partial, Point, Repository, VmFolder
from backupctl.settings import OnBrokenChain, RunOptions, Vm
from backupctl.vm import bitmaps, cleanup, disks, preflight, scratch
from backupctl.vm.guard import thaw_if_frozen
from backupctl.vm.monitor import Monitor

DEFAULTS = RunOptions(kind="incremental")


@dataclass(frozen=True)
class Recovered:
    """What was finished or undone, in words; empty if all was at rest."""

    actions: tuple[str, ...]


@dataclass(frozen=True)
class DiskStatus:
    """One disk: its bitmap for the newest point, and how the next incremental would take it.

    next: full, incremental or scan.
    """

    name: DiskName
    node: str
    size: int
    bitmap: str | None
    bitmap_state: str
    next: str
    reason: str


@dataclass(frozen=True)
class Status:
    """What there is of a VM.

    damaged: why points can't be used. qemu: its version, None if the monitor does not answer (see
    problem).
    """

    vm: VmName
    points: tuple[PointId, ...]
    damaged: tuple[str, ...]
    qemu: str | None
    problem: str
    disks: tuple[DiskStatus, ...]
    leftovers: tuple[str, ...]
    next_run: str


def recover(
    vm: Vm, repository: Repository, reporter: Reporter, scratch_folder: Path = DEFAULTS.scratch
) -> Recovered:
    """Finish or undo whatever an earlier run left of this VM.

    Raises Locked while a run is under way, MonitorUnreachable, NeedsRecovery.
    """
    folder = repository.vm(vm.name)
    try:
        with folder.lock(), Monitor.connect(vm.qmp, DEFAULTS.command_timeout_seconds) as monitor:
            told = settle(vm, folder, repository.owner, monitor, scratch_folder)
    except MonitorUnreachable as err:
        raise err.add(state="nothing was touched", next_command=f"backupctl doctor {vm.name}") from err
    for line in told:
        reporter.note(line)
    return Recovered(tuple(told))


def settle(
    vm: Vm,
    folder: VmFolder,
    owner: Owner,
    monitor: Monitor,
    scratch_folder: Path,
    *,
    clients: cleanup.Clients = cleanup.NOBODY,
    server_is_ours: bool = True,
    await_thaw: Callable[[], None] | None = None,
) -> list[str]:
    """Do the work of `recover` for a caller who holds the lock and the monitor.

    await_thaw: for a caller whose guard has the guest in hand. It has the agent too: QEMU's channel serves
    one client at a time, so a second conversation would only wait.

    The guest comes first: it is thawed before anything else is looked at. An agent that is silent then is
    asked again when all else is done, which spares the guest the rest. Returns what was done, in
    words. clients, server_is_ours: as for `cleanup.dismantle`. Raises NeedsRecovery.
    """
    told: list[str] = []
    try:
        if await_thaw is None:
            with suppress(AgentError):
                told += _thaw(vm, folder)
        ours = server_is_ours and _may_serve(folder)
        told += cleanup.dismantle(monitor, owner, actives(folder), clients=clients, server_is_ours=ours)
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


def settle_bitmaps(monitor: Monitor, owner: Owner, folder: VmFolder) -> list[str]:
    """Bring the bitmaps of all nodes to rest, in one transaction. Raises MonitorError, RepositoryError.

    A read-only node is a backing layer (an external snapshot left the bitmap behind) or a medium; its
    bitmaps are of no use. They are removed where QEMU lets us, and must not stop the others.
    """
    actions: list[bitmaps.Action] = []
    told: list[str] = []
    for settlement, reply in _settlements(monitor, owner, folder):
        if not reply.get("ro"):
            actions += settlement.actions
            told += settlement.told
        elif settlement.actions:
            told += _try_aside(monitor, settlement)
    monitor.transaction(actions)
    return told


def newest_recorded(monitor: Monitor, owner: Owner) -> PointId | None:
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


def drop_leftover_files(vm: Vm, folder: VmFolder, owner: Owner, scratch_folder: Path) -> list[str]:
    """Drop unfinished points and scratch folders. The caller holds the VM's lock."""
    told = []
    for partial in folder.partials():
        partial.drop()
        told.append(f"dropped the unfinished point {partial.point}")
    return told + scratch.sweep(owner, vm.name, scratch_folder)


def actives(folder: VmFolder) -> dict[int, NodeName]:
    """Return the active node of each disk of an unfinished run, by the disk's number in it."""
    journals = [journal for partial in folder.partials() if (journal := partial.journal())]
    return {disk.number: disk.node for journal in journals for disk in journal.disks}


def _may_serve(folder: VmFolder) -> bool:
    """Whether an unfinished run may have started QEMU's NBD server: not before it noted that step."""
    journals = [partial.journal() for partial in folder.partials()]
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


def status(vm: Vm, repository: Repository, options: RunOptions = DEFAULTS) -> Status:
    """Tell what there is and what the next run, with these options, would do. Changes and locks nothing."""
    folder = repository.vm(vm.name)
    survey = folder.survey()
    points = survey.points
    damaged = tuple(err.message for _, err in survey.damaged)
    left = [_unfinished(partial) for partial in folder.partials()]
    left += [
        f"scratch folder {path}" for path in scratch.left_folders(repository.owner, vm.name, options.scratch)
    ]
    ids = tuple(point.id for point in points)
    unmerged = tuple(
        f"{point.id} was dropped and its layers are still to be merged: the next prune does that"
        for point in folder.retired().points
    )
    try:
        with Monitor.connect(vm.qmp, DEFAULTS.agent_timeout_seconds) as monitor:
            inventory = disks.inventory(monitor, vm.disk_names)
            left += cleanup.leftovers(monitor, repository.owner)
            version = str(monitor.version)
            left += _unsettled(monitor, repository.owner, folder)
            refusal = _refusal(monitor, inventory, left)
    except MonitorError as err:
        worker = folder.worker()  # it has the monitor, which serves one client, and all that looks unfinished
        return Status(
            vm.name,
            ids,
            damaged,
            None,
            worker or err.message,
            (),
            (*(() if worker else left), *unmerged),
            "it waits for a few seconds, then leaves with exit code 75"
            if worker
            else "the VM can't be reached, so the next run would fail",
        )
    plan, broken = _plan(inventory, folder, points, repository.owner, options)
    refusal = refusal or broken
    states = tuple(_disk_status(one, points, repository.owner) for one in plan.disks)
    next_run = f"the next run would be refused: {refusal}" if refusal else _next_run(plan, left)
    return Status(vm.name, ids, damaged, version, "", states, (*left, *unmerged), next_run)


def _plan(
    inventory: disks.Inventory,
    folder: VmFolder,
    points: tuple[Point, ...],
    owner: Owner,
    options: RunOptions,
) -> tuple[planning.Plan, str]:
    """Return how the next incremental would take each disk, and why it would be refused; "" if it is not."""

    def planned(on_broken_chain: OnBrokenChain) -> planning.Plan:
        return planning.plan(
            "incremental",
            inventory.disks,
            inventory,
            points,
            owner,
            on_broken_chain,
            flaw=functools.partial(chain.flaw, folder),
            long=functools.partial(chain.long, folder, options.max_chain),
        )

    try:
        return planned(options.on_broken_chain), ""
    except Refused as err:
        return planned("scan"), err.message


def _refusal(monitor: Monitor, inventory: disks.Inventory, left: list[str]) -> str:
    try:
        preflight.refuse_qemu(monitor)
        if not left:  # else the job may be a dead run's, which the next one ends before it looks
            preflight.refuse_busy(inventory)
    except Refused as err:
        return err.message
    return ""


def _thaw(vm: Vm, folder: VmFolder) -> list[str]:
    """Thaw the guest if a dead run of ours had frozen it. A freeze by anybody else is not ours to end."""
    if (
        any(map(_froze, folder.partials()))
        and vm.agent
        and thaw_if_frozen(vm.agent, DEFAULTS.agent_timeout_seconds)
    ):
        return ["thawed the guest's file systems"]
    return []


def _froze(partial: Partial) -> bool:
    journal = partial.journal()
    return journal is not None and journal.froze


def _unfinished(partial: Partial) -> str:
    frozen = ", whose run may have left the guest frozen" if _froze(partial) else ""
    return f"unfinished point {partial.point}{frozen}"


def _try_aside(monitor: Monitor, settlement: bitmaps.Settlement) -> list[str]:
    try:
        monitor.transaction(list(settlement.actions))
    except CommandFailed:
        return []
    return list(settlement.told)


def _unsettled(monitor: Monitor, owner: Owner, folder: VmFolder) -> list[str]:
    return [
        f"bitmap to settle: {line}"
        for settlement, _ in _settlements(monitor, owner, folder)
        for line in settlement.told
    ]


def _settlements(
    monitor: Monitor, owner: Owner, folder: VmFolder
) -> Iterator[tuple[bitmaps.Settlement, Mapping[str, Any]]]:
    """Yield what must happen to each node's bitmaps, with the node's reply."""
    checkpoints = _checkpoints(folder)
    for node, reply in disks.named_nodes(monitor).items():
        found = disks.bitmaps_of(node, reply)
        yield bitmaps.settle(found, owner, folder.is_committed, checkpoints), reply


def _checkpoints(folder: VmFolder) -> int:
    """Return how many older bitmaps the newest point wants kept; all if it can't be asked."""
    try:
        return folder.point("latest").manifest.checkpoints
    except NoSuchPoint:
        return 0
    except (DamageFound, UnknownFormat):
        return sys.maxsize


def _disk_status(one: planning.DiskPlan, points: tuple[Point, ...], owner: Owner) -> DiskStatus:
    newest = planning.newest_with(one.disk.name, points)
    name = owner.bitmap(newest.id, one.disk.name) if newest else None
    found = next((bitmap for bitmap in one.disk.bitmaps if bitmap.name == name), None)
    return DiskStatus(
        name=one.disk.name,
        node=one.disk.node,
        size=one.disk.size,
        bitmap=found.name if found else None,
        bitmap_state=found.state if found else "none",
        next="scan" if one.scanned else one.kind,
        reason=one.reason,
    )


def _next_run(plan: planning.Plan, left: list[str]) -> str:
    first = (
        "the next run first clears up what an earlier one left, then " if left else "the next incremental "
    )
    if plan.parent is None:
        return f"{first}takes a full: there is no point yet"
    full = [one.disk.name for one in plan.disks if one.kind == "full"]
    scanned = [one.disk.name for one in plan.disks if one.scanned]
    text = f"{first}builds on {plan.parent}"
    if scanned:
        text += f", reads {', '.join(scanned)} whole to find what changed"
    return f"{text}, takes {', '.join(full)} full" if full else text
