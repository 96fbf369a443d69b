# SPDX-License-Identifier: GPL-2.0-or-later
"""Finishing or undoing a run: after a good one, a failed one, or one that was killed anywhere.

The question is always the same: does the point's directory have its final name? Yes: the run is finished (its
base bitmap is removed). No: it is undone (what its bitmap recorded goes back to the base). Either way export,
server, job, node and scratch file go. Nothing is taken from memory: the VM and the repository are asked, so
every line may be the last one of a dying process, and the next call goes on.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.errors import (
    UNTOUCHED,
    AgentError,
    BackupctlError,
    DamageFound,
    Interrupted,
    MonitorError,
    MonitorUnreachable,
    NeedsRecovery,
    NoSuchPoint,
    RepositoryError,
    RepositoryUnreadable,
    UnknownFormat,
)
from backupctl.events.backup import RecoveredFromEarlierRun
from backupctl.names import Namespace, PointId, VmName
from backupctl.options import DEFAULT_TIMEOUTS, Timeouts, VmConfig
from backupctl.progress import Reporter
from backupctl.repository import audit, summary
from backupctl.repository.journal import Journal
from backupctl.repository.pending_point import PendingPoint
from backupctl.repository.repository import Repository
from backupctl.repository.vm_directory import VmDirectory
from backupctl.vm.driver import Driver, Resolver, RunDisk, UnfinishedRun
from backupctl.vm.open_driver import open_driver, thaw_if_frozen

_GONE = "is gone from the repository (somebody removed it, or put an older copy of the repository back)"
_DELETED = "was deleted"


@dataclass(frozen=True)
class Recovered:
    """What was finished or undone, in words; empty if there was nothing to do."""

    actions: tuple[str, ...]


@dataclass(frozen=True)
class DirectoryFacts:
    """What a VM's directory tells a driver: see `vm.driver.PointFacts`."""

    directory: VmDirectory
    namespace: Namespace

    def is_committed(self, point: PointId) -> bool:
        """Whether the point's directory has its final name."""
        return self.directory.is_committed(point)

    def is_another_vms(self, point: PointId) -> bool:
        """Whether a point is another VM's of this repository."""
        return not self.directory.is_committed(point) and self.directory.user_elsewhere(point) is not None

    def what_became_of(self, named: Iterable[PointId]) -> Mapping[PointId, str]:
        """Return why points are not there; nothing of those of which it cannot be told."""
        try:
            found = {one: self.fate(one) for one in named if not self.is_committed(one)}
        except RepositoryError:
            return {}
        return {point: fate for point, fate in found.items() if fate}

    def is_lost(self, point: PointId) -> bool:
        """Whether a point was committed once, never dropped, and is gone. Raises RepositoryError.

        The history need not know it: an older copy of the repository may have been put back.
        """
        known = self.is_committed(point) or self.is_another_vms(point)
        return not known and not audit.is_unfinished(self.directory, point)

    def fate(self, point: PointId) -> str:
        """Return why a point is not there; "" if it is, or never was. Raises RepositoryError."""
        if audit.was_dropped(self.directory, point):
            return _DELETED
        return "is gone" if self.is_lost(point) else ""

    def checkpoints(self) -> int:
        """Return how many older bitmaps the newest point wants kept; all if it cannot be read."""
        try:
            return self.directory.point("latest").manifest.checkpoints
        except NoSuchPoint:
            return 0
        except (DamageFound, RepositoryUnreadable, UnknownFormat):
            return sys.maxsize

    def unfinished(self) -> tuple[UnfinishedRun, ...]:
        """Return what the journals tell. Raises RepositoryUnreadable."""
        return tuple(_unfinished(partial.journal()) for partial in self.directory.pending_points())


def recover(
    vm: VmConfig,
    repository: Repository,
    reporter: Reporter,
    cancel: Cancellation,
    scratch: Path,
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
) -> Recovered:
    """Finish or undo whatever an earlier run left of this VM.

    cancel: obeyed until the clean-up begins; that is never interrupted, since half of it would be left to do.
    scratch: the directory for scratch files. Raises Locked while a run is under way, MonitorUnreachable,
    Interrupted, NeedsRecovery.
    """
    directory = repository.vm(vm.name)
    facts = DirectoryFacts(directory, repository.owner)
    try:
        with directory.lock(), summary.renewed(directory):
            thawed = _thaw_first(vm, directory, timeouts, reporter)
            with open_driver(vm, timeouts, cancel) as driver:
                cancel.check()
                done = recover_vm(vm, facts, driver, scratch, timeouts)
    except (MonitorUnreachable, Interrupted) as err:
        if directory.pending_points():
            raise needs_recovery(err, vm.name) from err
        raise err.add(state=UNTOUCHED, next_command=_what_next(err, vm.name)) from err
    except RepositoryUnreadable as err:  # so nobody can tell what a dead run left
        raise needs_recovery(err, vm.name) from err
    for line in done:
        reporter.event(RecoveredFromEarlierRun(line))
    return Recovered((*thawed, *done))


def recover_vm(
    vm: VmConfig,
    facts: DirectoryFacts,
    resolver: Resolver,
    scratch: Path,
    timeouts: Timeouts,
    await_thaw: Callable[[], None] | None = None,
) -> list[str]:
    """Do the work of `recover` for a caller who holds the lock and a driver, or a session of its own.

    await_thaw: for a caller whose guard has the guest in hand. It has the agent too: QEMU's channel serves
    one client at a time, so a second conversation would only wait.

    The guest comes first, unless the VM is off: it is thawed before anything else is looked at. An agent that
    is silent then is asked again when all else is done, which spares the guest the rest. Returns what was
    done, in words. Raises NeedsRecovery.
    """
    directory = facts.directory
    done: list[str] = []
    thaws = await_thaw is None and resolver.has_guest
    try:
        if thaws:
            with suppress(AgentError):
                done += _thaw(vm, directory, timeouts)
        done += resolver.resolve(facts)
        # The journal alone tells that a freeze is ours to end, so it stays for as long as there may be one.
        if thaws:
            done += _thaw(vm, directory, timeouts)
        elif await_thaw is not None:
            await_thaw()
        done += drop_leftover_files(facts)
        done += resolver.sweep_scratch(facts.namespace, scratch)
    except AgentError as err:
        err.add(hint="if this VM has no guest agent any more, run recover without --agent")
        raise needs_recovery(err, vm.name) from err
    except MonitorError as err:
        raise needs_recovery(err, vm.name) from err
    return done


def newest_recorded(driver: Driver, namespace: Namespace) -> PointId | None:
    """Return the newest point from which a bitmap in the VM records, committed here or not.

    A copy of the repository may have made it, and that of the same second: no id may be used twice.
    Raises MonitorError.
    """
    found = [point for one in driver.bitmaps() if (point := namespace.point_of(one.name))]
    return max(found, default=None)


def absent(facts: DirectoryFacts, recorded: PointId | None) -> Mapping[PointId, str]:
    """Return the points that are not there any more, and why, as an end of "the point ...".

    The history says so, or a bitmap names one of which nothing is there: that is what an older copy of the
    repository looks like, put back in its place. recorded: of `newest_recorded`. To be asked before
    `recover_vm`, which takes such a bitmap for an unfinished run's. Raises RepositoryError.
    """
    found = dict.fromkeys(audit.missing(facts.directory), _GONE)
    newest = facts.directory.newest()
    if recorded and (newest is None or recorded >= newest) and (fate := facts.fate(recorded)):
        found[recorded] = fate if fate == _DELETED else _GONE
    return found


def unrecorded(facts: DirectoryFacts, absent: Mapping[PointId, str]) -> tuple[PointId, ...]:
    """Return the points of `absent` of whose end the history does not know. Raises RepositoryError."""
    recorded = audit.missing(facts.directory) if absent else ()
    return tuple(point for point, why in absent.items() if why != _DELETED and point not in recorded)


def drop_leftover_files(facts: DirectoryFacts) -> list[str]:
    """Drop unfinished points. The caller holds the VM's lock."""
    done = []
    for partial in facts.directory.pending_points():
        partial.drop()
        done.append(f"dropped the unfinished point {partial.point}")
    return done


def needs_recovery(err: BackupctlError, vm: VmName) -> NeedsRecovery:
    """Say that something of ours is still in the VM, and what to do."""
    return NeedsRecovery(
        err.message,
        step=err.step,
        hint=err.hint,
        state=(
            "what this run put into the VM may still be there; "
            "no committed point and no recorded change is lost"
        ),
        next_command=f"backupctl recover {vm}",
    )


def froze(partial: PendingPoint) -> bool:
    """Whether an unfinished run may have left the guest frozen."""
    journal = partial.journal()
    return journal is not None and journal.froze


def _unfinished(journal: Journal | None) -> UnfinishedRun:
    if journal is None:
        return UnfinishedRun((), may_export=True)
    disks = tuple(RunDisk(one.name, one.node, one.number) for one in journal.disks)
    return UnfinishedRun(disks, may_export=journal.step == "export")


def _thaw(vm: VmConfig, directory: VmDirectory, timeouts: Timeouts) -> list[str]:
    """Thaw the guest if a dead run of ours had frozen it. A freeze by anybody else is not ours to end."""
    if any(map(froze, directory.pending_points())) and thaw_if_frozen(vm, timeouts):
        return ["thawed the guest's file systems"]
    return []


def _thaw_first(vm: VmConfig, directory: VmDirectory, timeouts: Timeouts, reporter: Reporter) -> list[str]:
    """Thaw before anything else: somebody else may hold the monitor, and the guest must not wait for it.

    An agent that is silent is asked again by `recover_vm`.
    """
    done: list[str] = []
    with suppress(AgentError):
        done = _thaw(vm, directory, timeouts)
    for line in done:
        reporter.event(RecoveredFromEarlierRun(line))
    return done


def _what_next(err: BackupctlError, vm: VmName) -> str:
    return f"backupctl {'recover' if isinstance(err, Interrupted) else 'doctor'} {vm}"
