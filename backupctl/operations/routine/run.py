# SPDX-License-Identifier: GPL-2.0-or-later
"""All that is due for one VM, in one process: backup, prune, verify.

::

    backup   incremental, or full where one is due
    prune    only after a backup that found nothing wrong: what is older may be all that there is; none after
             one that was skipped because the VM is off
    verify   a sample of the data, whatever became of the backup
    restore-test  the newest point is booted, if that is configured and due

A task that fails does not hide another one's result; the worst error decides the exit code.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Literal, TypeAlias, TypeVar

from backupctl import errors
from backupctl.cancel import Cancellation
from backupctl.errors import BackupctlError, Interrupted, Locked, VmIsOff
from backupctl.events.repository import SampleChosen
from backupctl.events.routine import FullDue, TaskSkipped, WaitingForLock
from backupctl.operations import restore_test, verdict
from backupctl.operations.backup import run as backup
from backupctl.operations.backup.context import RunContext
from backupctl.operations.backup.outcome import RunReport
from backupctl.operations.prune import run as prune
from backupctl.operations.prune.run import PruneReport
from backupctl.operations.restore_test import RestoreTestReport, RestoreTestRequest
from backupctl.operations.routine import policy
from backupctl.operations.routine.policy import Policy
from backupctl.operations.verify import run as verify
from backupctl.operations.verify.layer import VerifyScope
from backupctl.operations.verify.run import VerifyReport
from backupctl.options import RunOptions, VmConfig
from backupctl.progress import Reporter
from backupctl.repository import tested
from backupctl.repository.repository import Repository
from backupctl.repository.vm_directory import VmDirectory
from backupctl.vm.trial.options import TrialOptions

Task = Literal["backup", "prune", "verify", "restore-test"]
Report: TypeAlias = RunReport | PruneReport | VerifyReport | RestoreTestReport
T = TypeVar("T")

_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Routine:
    """What is to be done for a VM. options: of its incremental. wait_seconds: for the lock of the VM.

    trial: the throw-away VM of a restore test.
    """

    vm: VmConfig
    repository: Repository
    options: RunOptions
    policy: Policy
    wait_seconds: float = 0.0
    trial: TrialOptions = field(default_factory=TrialOptions)

    @property
    def directory(self) -> VmDirectory:
        """The VM's directory in the repository."""
        return self.repository.vm(self.vm.name)


@dataclass(frozen=True)
class TaskResult:
    """What became of one task. report: None if it failed or was skipped. skipped: why, "" if it was not.

    scope: of a verify, how much it read. A task that found damage has both a report and an error.
    """

    task: Task
    report: Report | None = None
    error: BackupctlError | None = None
    skipped: str = ""
    scope: VerifyScope | None = None


@dataclass(frozen=True)
class RoutineReport:
    """What became of all."""

    tasks: tuple[TaskResult, ...]
    seconds: float

    @property
    def error(self) -> BackupctlError | None:
        """The worst error, None if there was none."""
        failed = [one.error for one in self.tasks if one.error]
        return errors.worst(failed) if failed else None


def run(asked: Routine, reporter: Reporter, stop: Cancellation) -> RoutineReport:
    """Do all that is due. Every BackupctlError is in the report, Interrupted too."""
    begun = time.monotonic()
    work = _Work(asked, reporter, stop)
    taken = work.backup()
    pruned = work.prune(taken)
    verified = work.verify(taken.error, pruned.error)
    booted = work.restore_test(taken.error, pruned.error, verified.error)
    return RoutineReport((taken, pruned, verified, *booted), time.monotonic() - begun)


@dataclass(frozen=True)
class _Work:
    """The tasks."""

    asked: Routine
    reporter: Reporter
    stop: Cancellation

    def backup(self) -> TaskResult:
        """Take a point."""
        asked = self.asked

        def take() -> RunReport:
            options = asked.options
            if is_full_due(asked):
                self.reporter.event(FullDue(asked.vm.name))
                options = replace(options, kind="full")
            return backup.run(RunContext(asked.vm, asked.repository, options, self.reporter, self.stop))

        try:
            report = self._patiently(take)
        except VmIsOff as err:
            return self._skip("backup", err.message)
        except BackupctlError as err:
            return TaskResult("backup", error=err)
        return TaskResult("backup", report, next(verdict.of_backup(report), None))

    def prune(self, taken: TaskResult) -> TaskResult:
        """Drop what no rule holds."""
        rules, directory = self.asked.policy.rules, self.asked.directory
        if rules.hold_nothing():
            return self._skip("prune", "no retention rule is configured (keep_last, keep_daily, ...)")
        if taken.error is not None:
            return self._skip("prune", "the backup failed or found damage")
        if taken.skipped:  # time alone must not drop points that nothing replaces
            return self._skip("prune", "no backup was taken")
        try:
            report = self._patiently(lambda: prune.prune(directory, rules, self.reporter, self.stop))
        except BackupctlError as err:
            return TaskResult("prune", error=err)
        return TaskResult("prune", report, next(verdict.of_prune(directory.name, report), None))

    def verify(self, *before: BackupctlError | None) -> TaskResult:
        """Verify a sample."""
        asked, percent = self.asked, self.asked.policy.verify_percent
        if not percent:
            return self._skip("verify", "no verify_percent is configured")
        if any(isinstance(err, Interrupted) for err in before) or self.stop.requested:
            return self._skip("verify", "the run was stopped")
        try:
            if not asked.directory.scan_points(tolerant=True).points:
                return self._skip("verify", "there are no recovery points yet")
            scope = VerifyScope(percent=percent)
            if percent < 100:
                self.reporter.event(SampleChosen(scope.percent, scope.seed))
            report = verify.verify(asked.repository, asked.vm.name, None, scope, self.reporter, self.stop)
        except BackupctlError as err:
            return TaskResult("verify", error=err)
        found = list(verdict.of_verify({str(asked.repository.path): report}, asked.vm.name))
        return TaskResult("verify", report, errors.worst(found) if found else None, scope=scope)

    def restore_test(self, *before: BackupctlError | None) -> tuple[TaskResult, ...]:
        """Boot the newest point, if that is configured."""
        asked = self.asked
        if asked.policy.restore_test_every is None:
            return ()
        if any(isinstance(err, Interrupted) for err in before) or self.stop.requested:
            return (self._skip("restore-test", "the run was stopped"),)
        try:
            if not asked.directory.scan_points(tolerant=True).points:
                return (self._skip("restore-test", "there are no recovery points yet"),)
            if not is_restore_test_due(asked):
                return (self._skip("restore-test", "it is not due yet"),)
            wanted = RestoreTestRequest(
                asked.directory, "latest", (), asked.trial, asked.options.scratch.directory
            )
            report = restore_test.test(wanted, self.reporter, self.stop)
        except BackupctlError as err:
            return (TaskResult("restore-test", error=err),)
        return (TaskResult("restore-test", report, report.error),)

    def _skip(self, task: Task, why: str) -> TaskResult:
        self.reporter.event(TaskSkipped(self.asked.vm.name, task, why))
        return TaskResult(task, skipped=why)

    def _patiently(self, call: Callable[[], T]) -> T:
        """Call, again if another run holds the lock meanwhile, as long as there is time."""
        deadline = time.monotonic() + self.asked.wait_seconds
        told = False
        while True:
            self.stop.check()
            try:
                return call()
            except Locked as err:
                if time.monotonic() >= deadline:
                    raise
                if not told:
                    self.reporter.event(
                        WaitingForLock(self.asked.vm.name, self.asked.wait_seconds, err.message)
                    )
                    told = True
            # Without a look at who holds it, each try would be a run that begins and fails.
            while time.monotonic() < deadline and self.asked.directory.lock_holder():
                self.stop.check()
                time.sleep(_LOOK_SECONDS)


def is_restore_test_due(asked: Routine) -> bool | None:
    """Whether the newest point is to be booted; None if no restore test is configured.

    Raises RepositoryUnreadable.
    """
    every = asked.policy.restore_test_every
    if every is None:
        return None
    return policy.is_restore_test_due(tested.read(asked.directory.path), every, datetime.now(UTC))


def is_full_due(asked: Routine) -> bool:
    """Whether a full is due. Raises RepositoryError.

    Never for a VM without points: its incremental is one.
    """
    points = asked.directory.scan_points().points
    every = asked.policy.full_every if points else None
    return policy.backup_kind(asked.vm.name, points, every, datetime.now(UTC)) == "full"
