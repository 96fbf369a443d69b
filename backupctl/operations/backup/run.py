# SPDX-License-Identifier: GPL-2.0-or-later
"""One backup run: the ten steps.

::

    1 prepare      lock, recover what an earlier run left, choose disks and base points
    2 attach       a scratch node over each active disk                     ─┐
    3 freeze       the guest's file systems (a guard thaws if we die)        │
    4 transaction  new bitmap, base bitmap disabled, copy-before-write on    │ undone by
    5 thaw                                                                   │ recovery.settle
    6 export       NBD, read-only, with the base bitmap                      │
    7 copy         the dirty extents into the point's images, fsynced        │
    8 dismantle    export, NBD server, job, node, scratch                    │
    9 commit       manifest written, the point's folder renamed: THE commit ─┘
    10 settle      base bitmap removed; or, without 9, given back

Whatever happens from step 2 on, `recovery.settle` follows, and asks one question: does the point's
folder stand under its final name? So this file has no undo of its own that could disagree with it.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.errors import (
    AgentError,
    AgentRefused,
    AgentTimeout,
    AgentUnavailable,
    BackupctlError,
    CommandFailed,
    Failed,
    FreezeOverrun,
    GuardLost,
    MonitorError,
    Refused,
    ViewUnavailable,
)
from backupctl.events import StepStarted
from backupctl.events.backup import CrashConsistent, RecoveredFromEarlierRun
from backupctl.events.repository import HistoryMismatch
from backupctl.names import BitmapName, PointId
from backupctl.operations import recover
from backupctl.operations.backup import outcome, prepare
from backupctl.operations.backup.disk import LayerCopier
from backupctl.operations.backup.outcome import RunReport
from backupctl.operations.backup.plan import Plan
from backupctl.options import RunOptions, VmConfig
from backupctl.progress import Reporter
from backupctl.repository import audit
from backupctl.repository.manifest import DiskEntry, FreezeEntry, Manifest
from backupctl.repository.pending_point import PendingPoint
from backupctl.repository.repository import Repository
from backupctl.repository.vm_folder import VmFolder
from backupctl.transfer.rate_limit import TokenBucket
from backupctl.transfer.source import Source
from backupctl.vm.guest.guard import GuardClient, Thawed, thaw_if_frozen
from backupctl.vm.qmp import bitmaps, inventory, nbd_export, scratch, snapshot_access, teardown
from backupctl.vm.qmp.filling import Filling
from backupctl.vm.qmp.fleecing import Fleecing
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.qmp.point_in_time import DiskSnapshot, View
from backupctl.vm.qmp.scratch_space import ScratchBudget
from backupctl.vm.qmp.snapshot_access import SnapshotAccess

_AGENT_HINT = "start qemu-guest-agent in the guest, or let the point be crash-consistent: --freeze auto"


def run(
    vm: VmConfig, repository: Repository, options: RunOptions, reporter: Reporter, stop: Cancellation
) -> RunReport:
    """Make one recovery point, or leave everything as it was.

    Raises Locked, Refused (nothing touched), Failed (rolled back), NeedsRecovery (not rolled back).
    """
    with prepare.telling(vm, options):
        return _run(vm, repository, options, reporter, stop)


def _run(
    vm: VmConfig, repository: Repository, options: RunOptions, reporter: Reporter, stop: Cancellation
) -> RunReport:
    folder = repository.vm(vm.name)
    reporter.event(StepStarted("prepare"))
    with folder.lock() as lock, Monitor.connect(vm.qmp, options.command_timeout_seconds, stop) as monitor:
        recorded = recover.newest_recorded(monitor, repository.owner)
        gone = recover.gone(monitor, repository.owner, folder)
        for told in recover.settle(vm, folder, repository.owner, monitor, options.scratch):
            reporter.event(RecoveredFromEarlierRun(told))
        audit.reconcile(folder)
        for problem in audit.problems(folder):
            reporter.event(HistoryMismatch(vm.name, problem.point, problem.message))
        plan, filling = prepare.prepare(vm, repository, folder, options, monitor, reporter, gone)
        rooms = prepare.rooms(plan, options, monitor, reporter, others=filling[-1].who())
        stop.check()
        with GuardClient.start(vm.qmp, vm.agent, options.agent_timeout_seconds, lock) as guard:
            return _Run(
                vm,
                repository,
                folder,
                options,
                reporter,
                stop,
                monitor,
                guard,
                plan,
                rooms,
                filling,
                recorded,
            ).make()


@dataclass
class _Run:
    """Steps 2 to 10 of one run."""

    vm: VmConfig
    repository: Repository
    folder: VmFolder
    options: RunOptions
    reporter: Reporter
    stop: Cancellation
    monitor: Monitor
    guard: GuardClient
    plan: Plan
    rooms: tuple[ScratchBudget, ...]
    filling: tuple[Filling, ...]
    recorded: PointId | None
    started: datetime = field(init=False)
    step: str = "attach"
    server_is_ours: bool = False

    def __post_init__(self) -> None:
        self.started = _now()
        self.owner = self.repository.owner
        self.point: PointId | None = None
        self.clients = ExitStack()
        self.exports: tuple[nbd_export.Export, ...] = ()
        self.view: View | None = None
        self.scratches = scratch.Scratches(self.monitor, self.options.scratch, None)

    def make(self) -> RunReport:
        """Take the point; whatever happens, bring the VM to rest."""
        begun = time.monotonic()
        with ExitStack() as held:
            held.callback(self.clients.close)  # should QEMU be out of reach; the guard has duplicates
            try:
                manifest = self._take(held)
            except BaseException as err:
                self._finish_or_roll_back(err)
                raise self._explained(err) from err
            self._finish_or_roll_back(None)
        gone = tuple((one.name, one.point) for one in self.plan.missing)
        report = outcome.report(manifest, time.monotonic() - begun, self.plan.damaged)
        return replace(report, missing_disks=gone)

    def _take(self, held: ExitStack) -> Manifest:
        """Steps 2 to 9. The view goes before the commit: the guest is rid of it as soon as it is read."""
        freezes = self._freezes()
        self._begin("attach")
        with self.repository.next_point(self.folder, self.started, self.recorded) as self.point:
            journal = outcome.journal(self.point, self.vm.name, self.repository.id, self.plan, self.started)
            partial = self.folder.begin(self.point, journal)
        view = self._view(freezes)
        held.callback(view.close)
        self.view = view
        view.prepare()
        inventory.refuse_moved(self.monitor, [one.disk for one in self.plan.disks])
        newest = {one.disk.node: one.bitmaps[-1] for one in self.plan.disks if one.bitmaps}
        inventory.refuse_disabled(self.monitor, newest)
        view.register_guard(self.guard)
        freeze = self._moment(partial, view, freezes)
        sources = self._export(view)
        self._begin("copy")
        entries = self._copy(partial, sources)
        view.verify_active()
        self._begin("dismantle")
        teardown.teardown(self.monitor, self.owner, recover.actives(self.folder), clients=self._our_clients())
        self.view = None  # what QEMU said of it meanwhile no longer matters: all is read
        self._begin("commit")
        manifest = outcome.manifest(
            journal, self.plan.parent, entries, freeze, str(self.monitor.version), self.options.checkpoints
        )
        partial.commit(manifest)
        return manifest

    def _moment(self, partial: PendingPoint, view: View, freezes: bool) -> FreezeEntry:
        """Steps 3 to 5. Nothing that can be done before or after stands between freeze and thaw."""
        if freezes:
            partial.note("freeze", froze=True)
            self._begin("freeze")
            try:
                self.guard.freeze(self.options.freeze_budget_seconds)
            except Refused:
                partial.note("freeze", froze=False)  # somebody else's freeze is not ours to end
                raise
            except AgentRefused as err:
                self._go_on_without_freeze(err)
            else:
                with self._thawed_at_the_end() as thawed, self.monitor.within(self.guard.due):
                    self.step = "transaction"
                    view.cut()
                partial.note("export", froze=False)
                return self._frozen(thawed[0])
        if not view.atomic:
            raise ViewUnavailable("without a freeze, --view snapshot-access takes one disk only")
        self._begin("transaction")
        view.cut()
        partial.note("export", froze=False)
        return FreezeEntry(self.options.freeze, "none", None)

    @contextmanager
    def _thawed_at_the_end(self) -> Iterator[list[Thawed]]:
        thawed: list[Thawed] = []
        try:
            yield thawed
        finally:
            thawed.append(self.guard.thaw())

    def _frozen(self, thawed: Thawed) -> FreezeEntry:
        """Say what the freeze came to. Raises FreezeOverrun if it was required and may not have lasted."""
        if not thawed.ended_early:
            return FreezeEntry(self.options.freeze, "frozen", round(thawed.milliseconds))
        if self.options.freeze == "require":
            raise FreezeOverrun(thawed.doubt)
        self.reporter.event(CrashConsistent(thawed.doubt))
        return FreezeEntry(self.options.freeze, "none", None)

    def _freezes(self) -> bool:
        """Whether the guest will be frozen. A missing agent is noticed before anything is touched."""
        if self.options.freeze == "never":
            return False
        try:
            self.guard.ping_agent()
        except (AgentUnavailable, AgentRefused) as err:
            self._go_on_without_freeze(err)
            return False
        return True

    def _go_on_without_freeze(self, err: AgentError) -> None:
        if self.options.freeze == "require":
            raise err
        self.reporter.event(CrashConsistent(str(err)))

    def _export(self, view: View) -> list[Source]:
        """Step 6. Every client is connected, and known to the guard, before a byte is read."""
        self._begin("export")
        self._refuse_resized()
        shown = [
            nbd_export.ExportSpec(node, cut.disk.node, bitmap)
            for node, cut, bitmap in zip(view.export_nodes(), self._cuts(), self._changes(), strict=True)
        ]
        self.server_is_ours = True
        try:
            self.exports = nbd_export.start_exports(self.monitor, self.guard, self.owner, shown)
        except CommandFailed as err:
            # Somebody else's server: ending it would take it from under its clients.
            self.server_is_ours = err.command != "nbd-server-start"
            raise
        for one in self.exports:
            self.clients.callback(one.close)
        sources = []
        for one in self.exports:
            source = Source.connect(
                one.sockets, one.name, one.bitmap, self.options.stall_timeout_seconds, self._look
            )
            self.clients.callback(source.close)
            sources.append(source)
        return sources

    def _changes(self) -> list[BitmapName | None]:
        """Return the bitmap that tells what changed on each disk; a differential unites several."""
        actions: list[bitmaps.Action] = []
        shown: list[BitmapName | None] = []
        for one in self.plan.disks:
            if len(one.bitmaps) > 1:
                actions += bitmaps.merge_actions(one.disk.node, self.owner.differential_bitmap, one.bitmaps)
                shown.append(self.owner.differential_bitmap)
            else:
                shown.append(one.bitmaps[0] if one.bitmaps else None)
        self.monitor.transaction(actions)
        return shown

    def _copy(self, partial: PendingPoint, sources: list[Source]) -> tuple[DiskEntry, ...]:
        """Step 7, one disk after the other."""
        limiter = TokenBucket(self.options.limit_bytes_per_second)
        taker = LayerCopier(
            self.folder, partial, limiter, self.reporter, self._look, self.options.stall_timeout_seconds
        )
        return tuple(taker.take(one, source) for one, source in zip(self.plan.disks, sources, strict=True))

    def _look(self) -> None:
        """Raise what must end the run now: a signal, the death of monitor or guard, a file that fills up."""
        self.stop.check()
        self.monitor.pump()
        self.guard.check()
        if self.view is not None:
            self.view.check()
        for one in self.filling:
            one.check()

    def _finish_or_roll_back(self, failure: BaseException | None) -> None:
        """Step 10, or the way back. Raises NeedsRecovery if the VM can't be brought to rest.

        A monitor that broke is connected anew: what it was last told may or may not have happened, and
        `recovery.settle` asks.
        """
        self.reporter.event(StepStarted("roll back" if failure else "settle"))
        try:
            with ExitStack() as fresh:
                monitor = self.monitor if self.monitor.alive else fresh.enter_context(self._reconnected())
                recover.settle(
                    self.vm,
                    self.folder,
                    self.owner,
                    monitor,
                    self.options.scratch,
                    clients=self._our_clients(),
                    server_is_ours=self.server_is_ours,
                    await_thaw=self._await_thaw if self.guard.alive else None,
                )
            self.guard.unwatch()
        except BackupctlError as err:
            raise self._unsettled(failure, err) from (failure or err)

    def _our_clients(self) -> teardown.Clients:
        return teardown.Clients(
            drain=lambda: nbd_export.drain(self.exports),
            close=self._let_go,
            give_back=self.scratches.empty,
        )

    def _let_go(self) -> None:
        """Close our NBD clients and the guard's duplicates; no export is left that they could hurt."""
        self.clients.close()
        self.exports = ()
        self.guard.release()

    def _await_thaw(self) -> None:
        """Give the guard a little time with an agent that was silent. Raises AgentError."""
        deadline = time.monotonic() + 2 * self.options.agent_timeout_seconds
        try:
            while self.guard.may_be_frozen():
                if time.monotonic() > deadline:
                    raise AgentTimeout(
                        "the guest may still be frozen; the guard goes on trying for 5 minutes"
                    )
                time.sleep(0.1)
        except GuardLost:  # it is dead now, and the agent free
            if self.vm.agent is not None:
                thaw_if_frozen(self.vm.agent, self.options.agent_timeout_seconds)

    def _unsettled(self, failure: BaseException | None, err: BackupctlError) -> BackupctlError:
        settled = recover.needs_recovery(err, self.vm.name)
        if failure is not None:
            settled.message = f"{_text(failure)}; and then it could not be rolled back: {err.message}"
            settled.step = self.step
        elif self.point is not None and self.folder.is_committed(self.point):
            settled.state = f"the point {self.point} is committed and whole; {settled.state}"
        return settled

    def _reconnected(self) -> Monitor:
        self.monitor.close()
        return Monitor.connect(self.vm.qmp, self.options.command_timeout_seconds)

    def _explained(self, err: BaseException) -> BackupctlError:
        """Add what the person at three in the morning needs to an error that was rolled back."""
        if not isinstance(err, BackupctlError):
            err = Failed(_text(err))
        return err.add(
            step=self.step,
            state="rolled back: nothing is lost, nothing of this run is left, the guest goes on",
            hint=_AGENT_HINT if isinstance(err, AgentError) else "",
            next_command=prepare.what_next(err, self.options.kind, self.vm.name),
        )

    def _begin(self, step: str) -> None:
        self._look()
        self.step = step
        self.reporter.event(StepStarted(step))

    def _private_folder(self) -> Path | None:
        if self.monitor.passes_descriptors:
            return None
        return scratch.private_folder(self.owner, self.vm.name, self.options.scratch)

    def _view(self, freezes: bool) -> View:
        cuts = self._cuts()
        wish = self.options.view
        if wish == "auto":
            # Several disks in one moment need the freeze, and an agent may still refuse it.
            sure = len(cuts) == 1 or (freezes and self.options.freeze == "require")
            can = sure and not snapshot_access.why_not(self.monitor, [cut.disk for cut in cuts])
            wish = "snapshot-access" if can else "fleecing"
        kind = SnapshotAccess if wish == "snapshot-access" else Fleecing
        self.scratches = scratch.Scratches(self.monitor, self.options.scratch, self._private_folder())
        return kind(self.monitor, self.owner, cuts, self.rooms, self.scratches)

    def _cuts(self) -> list[DiskSnapshot]:
        assert self.point is not None
        return [
            DiskSnapshot(
                one.disk,
                self.owner.bitmap(self.point, one.disk.name),
                one.bitmaps,
                ()
                if one.bitmaps
                else bitmaps.broken_chain_bitmaps(one.disk.bitmaps, self.owner, recover.theirs(self.folder)),
            )
            for one in self.plan.disks
        ]

    def _refuse_resized(self) -> None:
        # From the transaction on QEMU refuses a resize; one just before it would cut the view short.
        nodes = inventory.named_nodes(self.monitor)
        for one in self.plan.disks:
            try:
                size = nodes[one.disk.node]["image"]["virtual-size"]
            except (KeyError, TypeError) as err:
                raise MonitorError(f"the node {one.disk.node} of {one.disk.name} has gone") from err
            if size != one.disk.size:
                raise Failed(f"{one.disk.name} was resized while the run began")


def _now() -> datetime:
    """Tell the time after which a point is named."""
    return datetime.now(UTC)


def _text(err: BaseException) -> str:
    if isinstance(err, BackupctlError):
        return err.message
    if isinstance(err, OSError) and err.strerror:
        return f"{err.strerror}: {err.filename}" if err.filename else err.strerror
    return f"{type(err).__name__}: {err}"
