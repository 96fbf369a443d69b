# SPDX-License-Identifier: GPL-2.0-or-later
"""Step 1 of a run: all that can be known beforehand is looked at before anything is touched.

Which disks there are, from which base each is taken, what would stop the run later, how much room there is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.errors import (
    AgentTimeout,
    BackupctlError,
    Failed,
    Interrupted,
    OutcomeUnknown,
    ReadFailed,
    Refused,
    ViewUnavailable,
)
from backupctl.events.backup import (
    BitmapNotPersistent,
    DiskEncrypted,
    DiskMissing,
    DiskScanned,
    DiskSkipped,
    DiskTakenFull,
    NoPointToBuildOn,
    ScratchMayNotSuffice,
)
from backupctl.events.repository import DamageUnknown, PointDamaged
from backupctl.names import DiskName, PointId, VmName
from backupctl.operations.backup import plan as planning
from backupctl.operations.backup.plan import Plan
from backupctl.options import Kind, RunOptions, VmConfig
from backupctl.progress import Reporter
from backupctl.repository import chain
from backupctl.repository.repository import Repository
from backupctl.repository.vm_folder import ScannedPoints, VmFolder
from backupctl.system import private_dir
from backupctl.vm.disk import Disk, Inventory
from backupctl.vm.qmp import inventory as disks
from backupctl.vm.qmp import preflight, scratch, scratch_space
from backupctl.vm.qmp.filling import Filling
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.qmp.scratch_space import ScratchBudget

_MAY_PASS = (Interrupted, OutcomeUnknown, ReadFailed, AgentTimeout)
"""What the same command, run again, may not meet any more."""


@contextmanager
def telling(vm: VmConfig, options: RunOptions) -> Iterator[None]:
    """Tell of a failure in step 1 what is the case; those after it have told more."""
    try:
        yield
    except Failed as err:
        raise err.add(
            step="prepare",
            state="nothing of this run was begun",
            next_command=what_next(err, options.kind, vm.name),
        ) from err


def rehearse(vm: VmConfig, options: RunOptions, stop: Cancellation) -> None:
    """See whether a VM can be backed up at all, before a repository is made for it. Changes nothing.

    Raises MonitorError, Refused, Failed, Interrupted.
    """
    with telling(vm, options), Monitor.connect(vm.qmp, options.command_timeout_seconds, stop) as monitor:
        _, chosen = _chosen(vm, options, monitor)
        scratch_space.plan_scratch(monitor, chosen, options.scratch, options.scratch_bytes)
        stop.check()


def prepare(
    vm: VmConfig,
    repository: Repository,
    folder: VmFolder,
    options: RunOptions,
    monitor: Monitor,
    reporter: Reporter,
    gone: Sequence[PointId],
) -> tuple[Plan, tuple[Filling, ...]]:
    """Step 1, after recovery: what can be known beforehand is checked before anything is touched.

    Returns, besides the plan, what the run fills: the repository, and last the scratch folder.
    """
    refuse_folders(repository.path, options.scratch, monitor)
    inventory, chosen = _chosen(vm, options, monitor)
    for name, why in inventory.skipped:
        reporter.event(DiskSkipped(name, why))
    survey = folder.survey()
    for path, err in survey.damaged:
        reporter.event(PointDamaged(path.name, None, err.message))
    plan = planning.plan(
        options.kind,
        chosen,
        inventory,
        survey.points,
        repository.owner,
        options.on_broken_chain,
        since=folder.point(options.since) if options.since else None,
        flaw=partial(chain.chain_error, folder),
        long=partial(chain.chain_too_long, folder, options.max_chain),
        gone=gone,
    )
    if survey.damaged or any(one.damaged for one in plan.disks):
        plan = replace(plan, damaged=_damaged(folder, survey, reporter))
    _tell(plan, options, reporter)
    scratch.check_folder(options.scratch)
    nodes = disks.named_nodes(monitor)
    folders = repository.path, options.scratch
    filling = tuple(Filling.of_run(one, monitor, inventory.disks, nodes) for one in folders)
    for one in filling:
        one.check()
    return plan, filling


def _damaged(
    folder: VmFolder, survey: ScannedPoints, reporter: Reporter
) -> tuple[tuple[PointId, DiskName], ...]:
    """Tell which points can't be restored any more, and return them. It hinders no run."""
    found = {
        (PointId(path.name), DiskName(name))
        for path, _ in survey.damaged
        for name in [image.stem for image in path.glob("*.qcow2")] or [""]
    }
    try:
        broken = chain.damaged(folder)
    except BackupctlError as err:
        reporter.event(DamageUnknown(err.message))
        broken = ()
    for one in broken:
        reporter.event(PointDamaged(one.point, one.disk, one.why))
    return tuple(sorted(found | {(one.point, one.disk) for one in broken}))


def _chosen(vm: VmConfig, options: RunOptions, monitor: Monitor) -> tuple[Inventory, tuple[Disk, ...]]:
    """Return the VM's disks, and those that are to be taken. Raises Refused if it can't be backed up."""
    preflight.refuse_qemu(monitor)
    inventory = disks.inventory(monitor, vm.disk_names)
    preflight.refuse_busy(inventory)
    chosen = inventory.chosen(options.disks)
    if not chosen:
        why = "".join(f"; {name} is left out: {reason}" for name, reason in inventory.skipped)
        raise Refused(f"the VM has no writable disk{why}", state="nothing was touched")
    return inventory, chosen


def refuse_folders(repository: Path, scratch_folder: Path, monitor: Monitor) -> None:
    """Refuse what would fail only after the freeze: names that QEMU can't be told, no place for a socket.

    Raises Refused, Failed. Where QEMU gets scratch files as descriptors, their folder's name is ours alone.
    """
    for folder in (repository, *([] if monitor.passes_descriptors else [scratch_folder])):
        try:
            str(folder.absolute()).encode()
        except UnicodeEncodeError as err:
            raise Refused(
                f"the path {folder} is not UTF-8, so QEMU can't be told of it; use another name",
                state="nothing was touched",
            ) from err
    private_dir.check()


def rooms(
    plan: Plan, options: RunOptions, monitor: Monitor, reporter: Reporter, *, others: str
) -> tuple[ScratchBudget, ...]:
    """Share out the scratch folder's room; part of step 1. others: as for `room.survey`. Raises Refused."""
    chosen = [one.disk for one in plan.disks]
    made = scratch_space.plan_scratch(monitor, chosen, options.scratch, options.scratch_bytes, others=others)
    if short := [disk.name for disk, one in zip(chosen, made, strict=True) if one.size < one.ideal_bytes]:
        has, wants = sum(one.size for one in made), sum(one.ideal_bytes for one in made)
        reporter.event(ScratchMayNotSuffice(tuple(short), options.scratch, has, wants))
    return made


def _tell(plan: Plan, options: RunOptions, reporter: Reporter) -> None:
    for gone in plan.missing:
        reporter.event(DiskMissing(gone.name, gone.point))
    if options.kind == "incremental" and plan.kind == "full":
        reporter.event(NoPointToBuildOn())
    for one in plan.disks:
        if one.reason and one.base and one.scanned:
            reporter.event(DiskScanned(one.disk.name, one.base, one.reason, one.damaged))
        elif one.reason:
            reporter.event(DiskTakenFull(one.disk.name, one.reason, one.damaged))
        if not one.disk.persistent:
            reporter.event(BitmapNotPersistent(one.disk.name, one.disk.driver, not plan.parent))
        if one.disk.encrypted:
            reporter.event(DiskEncrypted(one.disk.name, not plan.parent))


def what_next(err: BaseException, kind: Kind, vm: VmName) -> str:
    """Name the command that gets on: the same again where that may help, else the one that tells why not."""
    if isinstance(err, ViewUnavailable):
        return f"backupctl {kind} {vm} --view fleecing"
    return f"backupctl {kind if isinstance(err, _MAY_PASS) else 'doctor'} {vm}"
