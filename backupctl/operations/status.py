# SPDX-License-Identifier: GPL-2.0-or-later
"""What there is of a VM, and what its next run would do: all that a run asks, and nothing that it changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from backupctl.errors import MonitorError, MonitorUnreachable, Refused
from backupctl.names import DiskName, Namespace, PointId, VmName
from backupctl.operations import bitmaps as bitmap_survey
from backupctl.operations import other_tools, recover
from backupctl.operations.backup import plan as planning
from backupctl.operations.backup import prepare
from backupctl.operations.bitmaps import Known, StoredBitmap, nobody_else
from backupctl.operations.other_tools import OtherTool
from backupctl.operations.running import Running, running
from backupctl.options import OnBrokenChain, RunOptions, VmConfig
from backupctl.repository import audit, chain
from backupctl.repository.checked_chains import CheckedChains
from backupctl.repository.pending_point import PendingPoint
from backupctl.repository.point import Point
from backupctl.repository.repository import Repository
from backupctl.repository.vm_directory import VmDirectory
from backupctl.vm.disk import Inventory
from backupctl.vm.driver import Driver
from backupctl.vm.open_driver import open_driver


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
    problem). missing_disks: those that the last points hold and the VM has not. bitmaps: all of ours.
    refusal: why the next run would be refused, "" if it would not. running: the backup that is running.
    gone: points that bitmaps name, of which the repository and its history know nothing.
    other_tools: what other programs left in it.
    """

    vm: VmName
    points: tuple[PointId, ...]
    damaged: tuple[str, ...]
    qemu: str | None
    problem: str
    disks: tuple[DiskStatus, ...]
    leftovers: tuple[str, ...]
    next_run: str
    missing_disks: tuple[planning.MissingDisk, ...] = ()
    bitmaps: tuple[StoredBitmap, ...] = ()
    refusal: str = ""
    running: Running | None = None
    other_tools: tuple[OtherTool, ...] = ()
    gone: tuple[PointId, ...] = ()


@dataclass(frozen=True)
class _Stored:
    """What the VM's directory tells. left, unmerged: what the next run and the next prune will finish."""

    points: tuple[Point, ...]
    damaged: tuple[str, ...]
    left: tuple[str, ...]
    unmerged: tuple[str, ...]
    running: Running | None

    @classmethod
    def of(cls, directory: VmDirectory) -> "_Stored":
        survey = directory.scan_points()
        return cls(
            points=survey.points,
            damaged=(*(err.message for _, err in survey.damaged), *problems(directory)),
            left=tuple(_unfinished(one) for one in directory.pending_points()),
            unmerged=tuple(
                f"{point.id} was dropped and its layers are still to be merged: the next prune does that"
                for point in directory.retired().points
            ),
            running=running(directory),
        )


@dataclass(frozen=True)
class _Answers:
    """What the VM tells. absent: of `recover.absent`. left: as in `_Stored`."""

    inventory: Inventory
    left: tuple[str, ...]
    version: str
    absent: Mapping[PointId, str]
    refusal: str
    bitmaps: tuple[StoredBitmap, ...]
    other_tools: tuple[OtherTool, ...]


def look(vm: VmConfig, repository: Repository, options: RunOptions, known: Known = nobody_else) -> Status:
    """Tell what there is and what the next run, with these options, would do. Changes and locks nothing.

    The next run recovers first, so it is planned from what there will be then. known: for bitmaps of
    other repositories.
    """
    directory = repository.vm(vm.name)
    facts = recover.DirectoryFacts(directory, repository.owner)
    stored = _Stored.of(directory)
    try:
        found = _ask(vm, repository, options, facts, stored, known)
    except (MonitorError, Refused) as err:
        return _unanswered(directory, stored, err)
    plan, broken = _plan(found.inventory, facts, stored.points, options, found.absent)
    refusal = found.refusal or broken
    return Status(
        vm=vm.name,
        points=tuple(point.id for point in stored.points),
        damaged=stored.damaged,
        qemu=found.version,
        problem="",
        disks=tuple(_disk_status(one, stored.points, facts.namespace) for one in plan.disks),
        leftovers=(*found.left, *stored.unmerged),
        next_run=f"would be refused: {refusal}" if refusal else _next_run(plan, found.left),
        missing_disks=plan.missing,
        bitmaps=found.bitmaps,
        refusal=refusal,
        other_tools=found.other_tools,
        gone=recover.unrecorded(facts, found.absent),
    )


def _ask(
    vm: VmConfig,
    repository: Repository,
    options: RunOptions,
    facts: recover.DirectoryFacts,
    stored: _Stored,
    known: Known,
) -> _Answers:
    """Ask the VM all that a run asks. Raises MonitorError, Refused."""
    if stored.running is not None:  # it has the monitor, which serves one client
        raise MonitorUnreachable("a backup is running")
    with open_driver(vm, options.timeouts.brief()) as driver:
        foreseen = driver.foresee(facts)
        in_scratch = driver.left_scratch(facts.namespace, options.scratch.directory)
        left = (*stored.left, *(f"scratch directory {path}" for path in in_scratch), *foreseen.leftovers)
        return _Answers(
            inventory=foreseen.inventory,
            left=left,
            version=driver.version,
            absent=recover.absent(facts, recover.newest_recorded(driver, facts.namespace)),
            refusal=_refusal(driver, foreseen.inventory, left),
            bitmaps=bitmap_survey.survey(driver, vm, repository, known),
            other_tools=other_tools.found(driver, vm),
        )


def _unanswered(directory: VmDirectory, stored: _Stored, err: MonitorError | Refused) -> Status:
    """Tell what there is of a VM that did not answer.

    A run that works on it has the monitor, which serves one client, and all that looks unfinished.
    """
    holder = directory.lock_holder()
    if not holder and stored.running:
        holder = f"the run of process {stored.running.pid} has just ended"
    unreached = f"fails while the VM cannot be reached; check with `backupctl doctor {directory.name}`"
    return Status(
        vm=directory.name,
        points=tuple(point.id for point in stored.points),
        damaged=stored.damaged,
        qemu=None,
        problem=holder or err.message,
        disks=(),
        leftovers=(*(() if holder else stored.left), *stored.unmerged),
        next_run="waits for a few seconds, then exits with code 75" if holder else unreached,
        running=stored.running,
    )


def problems(directory: VmDirectory) -> tuple[str, ...]:
    """Tell which points can't be restored, and which are missing, beside those with a damaged manifest."""
    missing = (one.message for one in audit.problems(directory))
    return (*map(str, chain.damaged(directory)), *missing)


def _plan(
    inventory: Inventory,
    facts: recover.DirectoryFacts,
    points: tuple[Point, ...],
    options: RunOptions,
    absent: Mapping[PointId, str],
) -> tuple[planning.Plan, str]:
    """Return how the next incremental would take each disk, and why it would be refused; "" if it is not."""
    known = CheckedChains(facts.directory)
    chains = prepare.chain_facts(known, facts.namespace, points, absent, options.chain)

    def planned(on_broken_chain: OnBrokenChain) -> planning.Plan:
        return planning.plan(
            "incremental",
            inventory.disks,
            inventory,
            chains,
            on_broken_chain,
        )

    try:
        return planned(options.chain.on_broken), ""
    except Refused as err:
        return planned("scan"), err.message


def _refusal(driver: Driver, inventory: Inventory, left: Sequence[str]) -> str:
    try:
        driver.preflight()
        if not left:  # else the job may be a dead run's, which the next one ends before it looks
            inventory.refuse_busy()
    except Refused as err:
        return err.message
    return ""


def _unfinished(one: PendingPoint) -> str:
    frozen = ", whose run may have left the guest frozen" if recover.froze(one) else ""
    return f"unfinished point {one.point}{frozen}"


def _disk_status(one: planning.DiskPlan, points: tuple[Point, ...], namespace: Namespace) -> DiskStatus:
    newest = planning.newest_with(one.disk.name, points)
    name = namespace.bitmap(newest.id, one.disk.name) if newest else None
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


def _next_run(plan: planning.Plan, left: Sequence[str]) -> str:
    first = "first finishes or rolls back what an earlier run left, then " if left else "incremental: "
    if plan.parent is None:
        return f"{first if left else ''}takes a full, because there is no point yet"
    full = [one.disk.name for one in plan.disks if one.kind == "full"]
    scanned = [one.disk.name for one in plan.disks if one.scanned]
    text = f"{first}builds on {plan.parent}"
    if scanned:
        text += f", reads {', '.join(scanned)} whole to find what changed"
    return f"{text}, takes {', '.join(full)} full" if full else text
