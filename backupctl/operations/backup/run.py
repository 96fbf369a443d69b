# SPDX-License-Identifier: GPL-2.0-or-later
"""One backup run: the ten steps.

::

    1 prepare      lock, recover what an earlier run left, choose disks and base points
    2 attach       a scratch node over each active disk                     ─┐
    3 freeze       the guest's file systems (a guard thaws if we die)        │
    4 transaction  new bitmap, base bitmap disabled, copy-before-write on    │ undone by
    5 thaw                                                                   │ recover.recover_vm
    6 export       NBD, read-only, with the base bitmap                      │
    7 copy         the dirty extents into the point's images, fsynced        │
    8 dismantle    export, NBD server, job, node, scratch                    │
    9 commit       manifest written, the point's directory renamed: THE commit ─┘
    10 settle      base bitmap removed; or, without 9, given back

Whatever happens from step 2 on, `recover.recover_vm` follows, and asks one question: does the point's
directory have its final name? So this file has no undo of its own that could disagree with it.
"""

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime

from backupctl.errors import (
    AgentError,
    AgentRefused,
    AgentUnavailable,
    BackupctlError,
    Failed,
    FreezeOverrun,
    Refused,
)
from backupctl.events.backup import CrashConsistent
from backupctl.names import PointId
from backupctl.operations import recover
from backupctl.operations.backup import definition, outcome, prepare
from backupctl.operations.backup.activity_log import ActivityLog
from backupctl.operations.backup.context import RunContext
from backupctl.operations.backup.disk import DISKS_AT_ONCE, DiskProgress, LayerCopier
from backupctl.operations.backup.outcome import RunReport
from backupctl.operations.backup.prepare import Prepared
from backupctl.repository import summary
from backupctl.repository.manifest import DiskEntry, FreezeEntry, Manifest
from backupctl.repository.pending_point import PendingPoint
from backupctl.system.threads import Workers, side_by_side
from backupctl.transfer import copy
from backupctl.transfer.rate_limit import TokenBucket
from backupctl.transfer.source import Source
from backupctl.vm.driver import DiskSnapshot, Driver, Request, Session, Thawed
from backupctl.vm.open_driver import open_for_backup

_ROLLED_BACK = "rolled back: nothing is lost, nothing of this run is left"
_AGENT_HINT = "start qemu-guest-agent in the guest, or let the point be crash-consistent: --freeze auto"


def run(ctx: RunContext) -> RunReport:
    """Make one recovery point, or leave everything as it was.

    Raises Locked, VmIsOff (skipped), Refused (nothing touched), Failed (rolled back), NeedsRecovery (not
    rolled back).
    """
    with prepare.explained(ctx.vm, ctx.options):
        ctx.step("prepare")
        timeouts = ctx.options.timeouts
        with (
            ctx.directory.lock() as lock,
            summary.renewed(ctx.directory),
            open_for_backup(ctx.vm, timeouts, ctx.cancel) as driver,
            driver.begin(lock) as session,  # now, since the guard loads while step 1 asks the VM
        ):
            ctx.activity = ActivityLog(lock, ctx.options.kind, ctx.clock)
            ctx.activity.step("prepare", None)
            prepared = prepare.prepare(ctx, driver)
            session.stand_by()
            return _Run(ctx, driver, session, prepared).make()


class _Run:
    """Steps 2 to 10 of one run."""

    def __init__(self, ctx: RunContext, driver: Driver, session: Session, prepared: Prepared) -> None:
        self.ctx = ctx
        self.driver = driver
        self.session = session
        self.prepared = prepared
        self.plan = prepared.plan
        self.facts = recover.DirectoryFacts(ctx.directory, ctx.repository.owner)
        self.point: PointId | None = None

    def make(self) -> RunReport:
        """Take the point; whatever happens, leave nothing of the run in the VM."""
        begun = time.monotonic()
        failure: BaseException | None = None
        try:
            manifest = self._take(self.ctx.clock())
        except Exception as err:
            failure = self._explained(err)
            raise failure from err
        except BaseException as err:
            failure = err
            raise
        finally:
            self._finish_or_roll_back(failure)
        report = outcome.report(manifest, time.monotonic() - begun, self.plan.damaged)
        return replace(report, missing_disks=tuple((one.name, one.point) for one in self.plan.missing))

    def _take(self, started: datetime) -> Manifest:
        """Steps 2 to 9. The view goes before the commit: the guest is rid of it as soon as it is read."""
        ctx, session = self.ctx, self.session
        freezes = self._will_freeze()
        self._begin("attach")
        with ctx.repository.next_point(ctx.directory, started, self.prepared.recorded) as self.point:
            journal = outcome.journal(self.point, ctx.vm.name, ctx.repository.id, self.plan, started)
            partial = ctx.directory.begin(self.point, journal)
            ctx.point = self.point
        session.attach(self._request(self.point, freezes=freezes))
        freeze = self._point_in_time(partial, freezes=freezes)
        state = definition.state(self.driver, ctx.options, ctx.reporter)
        self._begin("export")
        sources = self._connected()
        self._begin("copy")
        entries = self._copied(partial, sources)
        session.confirm()
        self._begin("dismantle")
        session.end(self.facts)
        self._begin("commit")
        kept, qemu = ctx.options.chain.checkpoints, self.prepared.version
        manifest = outcome.manifest(journal, self.plan.parent, entries, freeze, qemu, kept)
        if not session.has_guest:
            manifest = replace(manifest, consistency="offline")
        files = definition.to_store(self.prepared.definition + state)
        manifest = replace(manifest, definition=partial.store(files))
        partial.commit(manifest)
        return manifest

    def _point_in_time(self, partial: PendingPoint, *, freezes: bool) -> FreezeEntry:
        """Steps 3 to 5. Nothing that can be done before or after stands between freeze and thaw."""
        thawed = self._start_frozen(partial) if freezes else None
        if thawed is None:
            self.session.refuse_unfrozen()
            self._begin("transaction")
            self.session.start()
        # Durable only now: until the guest is thawed, a recovery must know that the freeze was ours.
        partial.note("export", froze=False)
        return self._freeze_entry(thawed)

    def _start_frozen(self, partial: PendingPoint) -> Thawed | None:
        """Take the point in time of a frozen guest; None if the agent refused, and the run may go on."""
        partial.note("freeze", froze=True)
        self._begin("freeze")
        try:
            self.session.freeze(self.ctx.options.freeze.budget_seconds)
        except Refused:
            partial.note("freeze", froze=False)  # somebody else's freeze is not ours to end
            raise
        except AgentRefused as err:
            self._go_on_without_freeze(err)
            return None
        with self._thawed_at_the_end() as thawed:
            self.ctx.enter("transaction")
            self.session.start()
        return thawed[0]

    @contextmanager
    def _thawed_at_the_end(self) -> Iterator[list[Thawed]]:
        thawed: list[Thawed] = []
        try:
            yield thawed
        finally:
            thawed.append(self.session.thaw())

    def _freeze_entry(self, thawed: Thawed | None) -> FreezeEntry:
        """Say what the freeze came to. Raises FreezeOverrun if it was required and may not have lasted."""
        mode = self.ctx.options.freeze.mode
        if thawed is None:
            return FreezeEntry(mode, "none", None)
        if not thawed.doubt:
            return FreezeEntry(mode, "frozen", round(thawed.milliseconds))
        if mode == "require":
            raise FreezeOverrun(thawed.doubt)
        self.ctx.reporter.event(CrashConsistent(thawed.doubt))
        return FreezeEntry(mode, "none", None)

    def _will_freeze(self) -> bool:
        """Whether the guest will be frozen. A missing agent is noticed before anything is touched."""
        if self.ctx.options.freeze.mode == "never" or not self.session.has_guest:
            return False
        try:
            self.session.ping_guest()
        except (AgentUnavailable, AgentRefused) as err:
            self._go_on_without_freeze(err)
            return False
        return True

    def _go_on_without_freeze(self, err: AgentError) -> None:
        if self.ctx.options.freeze.mode == "require":
            raise err
        self.ctx.reporter.event(CrashConsistent(str(err)))

    def _request(self, point: PointId, *, freezes: bool) -> Request:
        options, name = self.ctx.options, self.facts.namespace.bitmap
        return Request(
            facts=self.facts,
            disks=tuple(
                DiskSnapshot(one.disk, name(point, one.disk.name), one.bitmaps) for one in self.plan.disks
            ),
            budgets=self.prepared.budgets,
            scratch_directory=options.scratch.directory,
            view=options.view,
            will_freeze=freezes and options.freeze.mode == "require",
        )

    def _connected(self) -> list[Source]:
        """Step 6. Every client is connected, and known to the guard, before a byte is read."""
        sources = []
        for one in self.session.exports():
            stall_seconds = self.ctx.options.timeouts.stall_seconds
            source = Source.connect(one.sockets, one.name, one.bitmap, stall_seconds, self._check)
            self.session.on_close(source.close)
            sources.append(source)
        return sources

    def _copied(self, partial: PendingPoint, sources: list[Source]) -> tuple[DiskEntry, ...]:
        """Step 7: some disks at once. This thread goes on with looking at what must end the run."""
        ctx = self.ctx
        limiter = TokenBucket(ctx.options.limit_bytes_per_second)
        sizes = {one.disk.name: one.disk.size for one in self.plan.disks}
        progress = DiskProgress(ctx.reporter, sizes, ctx.activity)

        def check() -> None:
            self._check()
            progress.report()

        with Workers(copy.WORKERS) as workers:
            stall_seconds = ctx.options.timeouts.stall_seconds
            copier = LayerCopier(self.prepared.chains, partial, limiter, workers, progress, stall_seconds)
            disks = zip(self.plan.disks, sources, strict=True)
            tasks = [functools.partial(copier.copy_disk, one, source) for one, source in disks]
            entries = side_by_side(tasks, at_once=DISKS_AT_ONCE, check=check)
        progress.report()
        return entries

    def _begin(self, step: str) -> None:
        self._check()
        self.ctx.step(step)

    def _check(self) -> None:
        """Raise what must end the run now: a signal, a dead VM or guard, a file system that fills up."""
        self.ctx.cancel.check()
        self.session.check()
        for one in self.prepared.filling:
            one.check()

    def _finish_or_roll_back(self, failure: BaseException | None) -> None:
        """Step 10, or the way back. Raises NeedsRecovery if something of ours may be left in the VM."""
        failed_in = self.ctx.current
        self.ctx.step("roll back" if failure else "settle")
        options = self.ctx.options
        thaw = self.session.await_thaw if self.session.guarded else None
        try:
            recover.recover_vm(
                self.ctx.vm, self.facts, self.session, options.scratch.directory, options.timeouts, thaw
            )
        except BackupctlError as err:
            raise self._not_finished(failure, failed_in, err) from (failure or err)

    def _not_finished(
        self, failure: BaseException | None, failed_in: str, err: BackupctlError
    ) -> BackupctlError:
        error = recover.needs_recovery(err, self.ctx.vm.name)
        if failure is not None:
            text = f"{_text(failure)}; the roll-back failed as well: {err.message}"
            error = error.reworded(text)
            error.step = failed_in
        elif self.point is not None and self.facts.is_committed(self.point):
            error.state = f"the point {self.point} is committed and whole; {error.state}"
        return error

    def _explained(self, err: Exception) -> BackupctlError:
        """Add to an error what the administrator needs. If the roll-back fails, another error replaces it."""
        if not isinstance(err, BackupctlError):
            err = Failed(_text(err))
        return err.add(
            step=self.ctx.current,
            state=_ROLLED_BACK + (", the guest goes on" if self.session.has_guest else ""),
            hint=_AGENT_HINT if isinstance(err, AgentError) else "",
            next_command=prepare.what_next(err, self.ctx.options.kind, self.ctx.vm.name),
        )


def _text(err: BaseException) -> str:
    if isinstance(err, BackupctlError):
        return err.message
    if isinstance(err, OSError) and err.strerror:
        return f"{err.strerror}: {err.filename}" if err.filename else err.strerror
    return f"{type(err).__name__}: {err}"
