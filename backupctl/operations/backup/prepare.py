# SPDX-License-Identifier: GPL-2.0-or-later
"""Step 1 of a run: all that can be known beforehand is looked at before anything is touched.

Which disks there are, from which base each is taken, what would stop the run later, how much room there is.
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.errors import (
    UNTOUCHED,
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
    ImagesRead,
    NoPointToBuildOn,
    OtherToolFound,
    RecoveredFromEarlierRun,
    ScratchMayNotSuffice,
    VmRenamed,
)
from backupctl.events.repository import DamageUnknown, HistoryMismatch, PointDamaged, PointGone
from backupctl.names import DiskName, Namespace, PointId, VmName
from backupctl.operations import other_tools, recover
from backupctl.operations.backup import definition
from backupctl.operations.backup import plan as planning
from backupctl.operations.backup.context import RunContext
from backupctl.operations.backup.plan import Plan
from backupctl.options import ChainOptions, Kind, RunOptions, VmConfig
from backupctl.progress import Reporter
from backupctl.repository import audit, chain, former_names
from backupctl.repository.checked_chains import CheckedChains
from backupctl.repository.point import Point
from backupctl.repository.vm_directory import ScannedPoints, VmDirectory
from backupctl.system import private_dir
from backupctl.vm.definition import Definition
from backupctl.vm.disk import Disk, Inventory
from backupctl.vm.driver import Driver, ScratchBudget
from backupctl.vm.filling import Filling
from backupctl.vm.open_driver import open_for_backup

_MAY_PASS = (Interrupted, OutcomeUnknown, ReadFailed, AgentTimeout)
"""What the same command, run again, may not meet any more."""


@dataclass(frozen=True)
class Prepared:
    """What step 1 found out.

    definition: what the VM is beside its disks. chains: those that the plan builds on. budgets: the scratch
    space of each disk of the plan. filling: the file systems that the run writes to. recorded: the newest
    point from which a bitmap in the VM records, of whatever copy of the repository. version: of what runs the
    VM.
    """

    plan: Plan
    chains: CheckedChains
    budgets: tuple[ScratchBudget, ...]
    filling: tuple[Filling, ...]
    recorded: PointId | None
    version: str
    definition: Definition


@contextmanager
def explained(vm: VmConfig, options: RunOptions) -> Iterator[None]:
    """Add to an error of step 1 what is the case and what to run next; later steps have done so already."""
    try:
        yield
    except Failed as err:
        raise err.add(
            step="prepare",
            state="the backup was not started; nothing changed",
            next_command=what_next(err, options.kind, vm.name),
        ) from err


def rehearse(vm: VmConfig, options: RunOptions, cancel: Cancellation) -> None:
    """See whether a VM can be backed up at all, before a repository is made for it. Changes nothing.

    Raises VmIsOff, MonitorError, Refused, Failed, Interrupted.
    """
    with explained(vm, options), open_for_backup(vm, options.timeouts, cancel) as driver:
        driver.included(options.include)
        _, chosen = _chosen(driver, options)
        driver.plan_scratch(chosen, options.scratch)
        cancel.check()


def prepare(ctx: RunContext, driver: Driver) -> Prepared:
    """Step 1: recover what an earlier run left; then check all that can be known, before anything is touched.

    The caller holds the VM's lock. Raises Refused, Failed, NeedsRecovery, MonitorError, RepositoryError.
    """
    vm, directory, options, reporter = ctx.vm, ctx.directory, ctx.options, ctx.reporter
    facts = recover.DirectoryFacts(directory, ctx.repository.owner)
    if not driver.has_guest:
        reporter.event(ImagesRead(vm.name))
    # Both before recovery, which takes a bitmap without a point for an unfinished run's, and removes it.
    recorded = recover.newest_recorded(driver, facts.namespace)
    absent = recover.absent(facts, recorded)
    for done in recover.recover_vm(vm, facts, driver, options.scratch.directory, options.timeouts):
        reporter.event(RecoveredFromEarlierRun(done))
    described = definition.asked(driver, options, reporter)
    points = directory.scan_all()
    audit.reconcile(directory, points)
    for problem in audit.problems(directory, points.committed):
        reporter.event(HistoryMismatch(vm.name, problem.point, problem.message))
    for point in recover.unrecorded(facts, absent):
        reporter.event(PointGone(vm.name, point, ctx.repository.path))
    refuse_directories(ctx.repository.path, options.scratch.directory, driver)
    inventory, chosen = _chosen(driver, options)
    for name, why in inventory.skipped:
        reporter.event(DiskSkipped(name, why))
    chains = CheckedChains(directory, points)
    known = chain_facts(chains, ctx.repository.owner, points.committed.points, absent, options.chain)
    plan = _plan(ctx, inventory, chosen, points.committed, known)
    _report(plan, options, reporter)
    if not directory.all_points():
        _tell_of_before(ctx, driver)
    filling = (
        *driver.filling((ctx.repository.path,), inventory.disks),
        driver.scratch_filling(options.scratch.directory, inventory.disks),
    )
    for one in filling:
        one.check()
    budgets = _budgets(plan, options, driver, reporter, guests=filling[-1].who())
    ctx.cancel.check()
    return Prepared(plan, chains, budgets, filling, recorded, driver.version, described)


def _tell_of_before(ctx: RunContext, driver: Driver) -> None:
    """Before the first point of a VM: what else it may be known by, and who backed it up."""
    if renamed := former_names.bearer(ctx.repository.path, ctx.vm.name):
        ctx.reporter.event(VmRenamed(ctx.vm.name, renamed))
    for one in other_tools.found(driver, ctx.vm):
        ctx.reporter.event(OtherToolFound(one.said, one.removal))


def _plan(
    ctx: RunContext,
    inventory: Inventory,
    chosen: tuple[Disk, ...],
    scanned: ScannedPoints,
    chains: planning.ChainFacts,
) -> Plan:
    directory, options = ctx.directory, ctx.options
    for path, err in scanned.damaged:
        ctx.reporter.event(PointDamaged(path.name, None, err.message))
    plan = planning.plan(
        options.kind,
        chosen,
        inventory,
        chains,
        options.chain.on_broken,
        since=directory.point(options.since) if options.since else None,
    )
    if scanned.damaged or any(one.damaged for one in plan.disks):
        plan = replace(plan, damaged=_damaged(directory, scanned, ctx.reporter))
    return plan


def chain_facts(
    chains: CheckedChains,
    namespace: Namespace,
    points: tuple[Point, ...],
    absent: Mapping[PointId, str],
    wanted: ChainOptions,
) -> planning.ChainFacts:
    """Return what the repository knows of the chains that a run could go on with."""
    return planning.ChainFacts(
        namespace,
        points,
        error=chains.error,
        too_long=functools.partial(chains.too_long, wanted.max_layers),
        absent=absent,
    )


def _damaged(
    directory: VmDirectory, survey: ScannedPoints, reporter: Reporter
) -> tuple[tuple[PointId, DiskName], ...]:
    """Tell which points can't be restored any more, and return them. It hinders no run."""
    found = {
        (PointId(path.name), DiskName(name))
        for path, _ in survey.damaged
        for name in [image.stem for image in path.glob("*.qcow2")] or [""]
    }
    try:
        broken = chain.damaged(directory)
    except BackupctlError as err:
        reporter.event(DamageUnknown(err.message))
        broken = ()
    for one in broken:
        reporter.event(PointDamaged(one.point, one.disk, one.why))
    return tuple(sorted(found | {(one.point, one.disk) for one in broken}))


def _chosen(driver: Driver, options: RunOptions) -> tuple[Inventory, tuple[Disk, ...]]:
    """Return the VM's disks, and those that are to be taken. Raises Refused if it cannot be backed up."""
    driver.preflight()
    inventory = driver.inventory()
    inventory.refuse_busy()
    chosen = inventory.chosen(options.disks)
    if not (options.firmware or options.disks):
        chosen = tuple(disk for disk in chosen if not disk.firmware)
    if not chosen:
        why = "".join(f"; {name} is left out: {reason}" for name, reason in inventory.skipped)
        raise Refused(f"the VM has no writable disk{why}", state=UNTOUCHED)
    return inventory, chosen


def refuse_directories(repository: Path, directory: Path, driver: Driver) -> None:
    """Refuse what would fail only after the freeze: a path that QEMU cannot open, no place for a socket.

    directory: for scratch files. Raises Refused, Failed.
    """
    try:
        str(repository.absolute()).encode()
    except UnicodeEncodeError as err:
        raise Refused(
            f"the path {repository} is not UTF-8, so it cannot be passed to QEMU; use another name",
            state=UNTOUCHED,
        ) from err
    driver.check_scratch(directory)
    private_dir.check()


def _budgets(
    plan: Plan, options: RunOptions, driver: Driver, reporter: Reporter, *, guests: str
) -> tuple[ScratchBudget, ...]:
    """Share out the scratch space. guests: as for `Driver.plan_scratch`. Raises Refused."""
    chosen = [one.disk for one in plan.disks]
    budgets = driver.plan_scratch(chosen, options.scratch, guests)
    if short := [disk.name for disk, one in zip(chosen, budgets, strict=True) if one.size < one.ideal_bytes]:
        has, wants = sum(one.size for one in budgets), sum(one.ideal_bytes for one in budgets)
        reporter.event(ScratchMayNotSuffice(tuple(short), options.scratch.directory, has, wants))
    return budgets


def _report(plan: Plan, options: RunOptions, reporter: Reporter) -> None:
    for gone in plan.missing:
        reporter.event(DiskMissing(gone.name, gone.point))
    if options.kind == "incremental" and plan.kind == "full":
        reporter.event(NoPointToBuildOn())
    for one in plan.disks:
        if one.reason and one.base and one.scanned:
            reporter.event(DiskScanned(one.disk.name, one.base, one.reason, one.damaged))
        elif one.reason:
            reporter.event(DiskTakenFull(one.disk.name, one.reason, one.damaged))
        if not (one.disk.persistent or one.disk.firmware):  # reading all of that takes no time
            reporter.event(BitmapNotPersistent(one.disk.name, one.disk.driver, full=not plan.parent))
        if one.disk.encrypted:
            reporter.event(DiskEncrypted(one.disk.name, full=not plan.parent))


def what_next(err: BaseException, kind: Kind, vm: VmName) -> str:
    """Name the command that gets on: the same again where that may help, else the one that tells why not."""
    if isinstance(err, ViewUnavailable):
        return f"backupctl {kind} {vm} --view fleecing"
    return f"backupctl {kind if isinstance(err, _MAY_PASS) else 'doctor'} {vm}"
