# SPDX-License-Identifier: GPL-2.0-or-later
"""What surrounds a command on a VM: hooks, what is remembered of it, metrics and notices.

::

    before      hook `before` of a backup, and a ping that it starts
    the command
    afterwards  hook `after` or `failed` of a backup; memory and metrics; a notice, if one is due; a ping

What follows a command never changes what it has done, nor its exit code: whatever fails there is a warning.
Nothing of this is loaded unless the configuration asks for it.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from backupctl.cancel import Cancellation
from backupctl.cli import next_command, param_types
from backupctl.cli.configuration import Config
from backupctl.cli.reporters import RecordingReporter
from backupctl.cli.settings import HookSettings, MetricsSettings, NotifySettings
from backupctl.cli.target import Target
from backupctl.errors import BackupctlError, Failed, HookFailed, Interrupted
from backupctl.events import Event, StepStarted
from backupctl.events.monitoring import FollowingHookFailed, MetricsNotWritten
from backupctl.operations.prune import retention
from backupctl.outcome import documents

if TYPE_CHECKING:  # `_Watch.of` loads them, for a configuration that asks for any
    from backupctl.monitoring.channels import Channels
    from backupctl.monitoring.follow import Follower
    from backupctl.monitoring.hooks import HookName, Hooks
    from backupctl.monitoring.result import Kind, Result
    from backupctl.operations.routine.run import RoutineReport


@dataclass
class Ending:
    """How a command ended, where no exception says it.

    report: its document. point: the one that was committed. failure: the error with which it is going to end.
    seconds: how long it took, if that is known better than by the time around it. partial: of a verify, that
    it did not read all of the VM. skipped: that it was not done, because the VM is off. tasks: the end of
    each task, where it had several; the rest is about all.
    """

    report: Mapping[str, Any] | None = None
    point: str = ""
    failure: BackupctlError | None = None
    seconds: float | None = None
    partial: bool = False
    skipped: bool = False
    tasks: "dict[Kind, Ending]" = field(default_factory=dict)


@contextmanager
def backup(target: Target, command: str, reporter: RecordingReporter, stop: Cancellation) -> Iterator[Ending]:
    """Surround a full or incremental. Raises HookFailed and Interrupted before anything is done."""
    watch = _Watch.of(target, "backup", command, reporter)
    if watch is None:
        yield Ending()
        return
    with watch.around() as ending:
        watch.start(stop)
        yield ending


@contextmanager
def prune(target: Target, reporter: RecordingReporter, *, dry_run: bool) -> Iterator[Ending]:
    """Surround a prune of one VM. dry_run: it changes nothing, so nothing follows it."""
    watch = None if dry_run else _Watch.of(target, "prune", "prune", reporter)
    if watch is None:
        yield Ending()
        return
    with watch.around() as ending:
        yield ending


def verified(target: Target, reporter: RecordingReporter, ending: Ending, seconds: float) -> None:
    """Do what follows a verify of one VM that has ended."""
    if watch := _Watch.of(target, "verify", "verify", reporter):
        watch.started = replace(watch.started, began=watch.started.began - seconds)
        watch.end(ending, seconds)


def note_tasks(ending: Ending, document: Mapping[str, Any], report: "RoutineReport") -> None:
    """Note how a `run` ended. document: that of the report."""
    ending.report, ending.failure = document, report.error
    ending.skipped = any(one.task == "backup" and one.skipped for one in report.tasks)
    for one, told in zip(report.tasks, document["tasks"], strict=True):
        if not one.skipped:
            found = told["report"] or {}
            ending.tasks[one.task] = Ending(
                report=found or None,
                point=found.get("point") or "",
                failure=one.error,
                seconds=found.get("seconds"),
                partial=one.scope is not None and not one.scope.is_whole,
            )
            ending.point = ending.point or ending.tasks[one.task].point


def state_directory(config: Config) -> Path:
    """Return the directory in which results are remembered."""
    from backupctl.monitoring import memory  # noqa: PLC0415 - as above

    configured = config.content.metrics.state
    return param_types.absolute(configured) if configured else memory.default_directory()


def is_remembered(target: Target) -> bool:
    """Whether results of this VM are remembered, for `check`, the report, metrics and notices.

    Only those of a VM of the configuration in its configured repository: a backup to another one must not
    look like one to that.
    """
    said = target.config.of(target.name)
    if target.name not in target.config.vms or not said.repository:
        return False
    return target.repository_path == param_types.absolute(said.repository)


@dataclass
class _Watch:
    """One command on one VM. started: what is known when it begins. first: number of events until then."""

    kind: "Kind"
    reporter: RecordingReporter
    hooks: "Hooks"
    follower: "Follower"
    started: "Result"
    first: int

    @classmethod
    def of(cls, target: Target, kind: "Kind", command: str, reporter: RecordingReporter) -> "_Watch | None":
        """Return one for a command; None if nothing surrounds it, and the VM is not in the configuration."""
        said, metrics = target.config.of(target.name), target.config.content.metrics
        is_asked = (said.notify, metrics) != (NotifySettings(), MetricsSettings())
        if not is_asked and said.hooks == HookSettings() and not is_remembered(target):
            return None
        from backupctl.monitoring.follow import Follower  # noqa: PLC0415 - most commands need none of it
        from backupctl.monitoring.result import Result  # noqa: PLC0415 - as above

        place = target.repository_path or Path()
        follower = Follower(
            target.vm_name,
            place,
            _channels(said.notify),
            state_directory(target.config) if is_remembered(target) else None,
            param_types.absolute(metrics.textfile) if metrics.textfile else None,
            state_is_asked_for=is_asked,
        )
        started = Result(target.vm_name, command, str(place), time.time())
        return cls(kind, reporter, _hooks(said.hooks), follower, started, len(reporter.events))

    def start(self, stop: Cancellation) -> None:
        """Do what comes before a backup. Raises HookFailed, Interrupted."""
        self._run_hook("before", self.started, stop)
        self._report(self.follower.ping(self.started))

    @contextmanager
    def around(self) -> Iterator[Ending]:
        """Do what follows the block, however that ends."""
        ending, begun = Ending(), time.monotonic()
        try:
            yield ending
        except BaseException as err:
            ending.failure = _as_error(err)
            raise
        finally:
            self.end(ending, time.monotonic() - begun)

    def end(self, ending: Ending, seconds: float) -> None:
        """Do what follows the command."""
        try:
            if self.kind == "backup":
                self._run_following_hook(self._result(ending, seconds))
            # A skipped backup is no success: what watches the age of points must not take it for one.
            alone = {} if ending.skipped else {self.kind: ending}
            for kind, task in (ending.tasks or alone).items():
                took = seconds if task.seconds is None else task.seconds
                result = self._result(task, took)
                if kind != self.kind:
                    result = replace(result, command=kind)
                self._report(self.follower.end(kind, result, partial=task.partial))
            if self.kind == "backup":
                self._report(self.follower.ping(self._result(ending, seconds)))
        except Exception as err:  # noqa: BLE001 - what comes after a commit must not make a failure of it
            why = f"an error in backupctl itself: {type(err).__name__}: {err!s:.200}"
            self.reporter.event(MetricsNotWritten(self.follower.repository, why))

    def _report(self, events: Iterable[Event]) -> None:
        for event in events:
            self.reporter.event(event)

    def _run_following_hook(self, result: "Result") -> None:
        name: HookName = "after" if result.outcome == "success" else "failed"
        try:
            self._run_hook(name, result)
        except HookFailed as err:
            self.reporter.event(FollowingHookFailed(name, err.message))

    def _run_hook(self, name: "HookName", result: "Result", stop: Cancellation | None = None) -> None:
        """Run a hook, if there is one. stop: ends it early."""
        from backupctl.monitoring import hooks  # noqa: PLC0415 - as above

        if self.hooks.command(name):
            self.reporter.event(StepStarted(f"hook {name}"))
            # A run that was stopped still has its `failed` hook, up to the time limit of hooks.
            hooks.run(self.hooks, name, result, stop.check if stop else lambda: None)

    def _result(self, ending: Ending, seconds: float) -> "Result":
        err = ending.failure
        warnings = [one for one in self.reporter.events[self.first :] if one.severity == "warning"]
        return replace(
            self.started,
            outcome="failure" if err else "success",
            seconds=seconds,
            exit_code=err.exit_code if err else 0,
            error=documents.error(err) if err else None,
            point=ending.point,
            report=ending.report,
            warnings=tuple(documents.event(one) for one in warnings),
        )


def _as_error(err: BaseException) -> BackupctlError:
    """Return the error that the command line makes of an exception."""
    if isinstance(err, BackupctlError):
        if context := click.get_current_context(silent=True):
            next_command.add_to(err, context)
        return err
    if isinstance(err, KeyboardInterrupt | click.Abort):
        return Interrupted("interrupted")
    return Failed(f"an error in backupctl itself: {type(err).__name__}: {err!s:.200}")


def _hooks(said: HookSettings) -> "Hooks":
    from backupctl.monitoring.hooks import DEFAULT_SECONDS, Hooks  # noqa: PLC0415 - as above

    before, after, failed = (tuple(one or ()) for one in (said.before, said.after, said.failed))
    return Hooks(before, after, failed, said.timeout or DEFAULT_SECONDS)


def _channels(said: NotifySettings) -> "Channels":
    from backupctl.monitoring.channels import Channels  # noqa: PLC0415 - as above

    given = {name: getattr(said, name) for name in ("mail", "sendmail", "webhook", "ntfy", "healthchecks")}
    found = Channels(
        **{name: value for name, value in given.items() if value is not None}, success=bool(said.success)
    )
    if said.repeat is not None:
        found = replace(found, repeat_seconds=retention.duration(said.repeat).total_seconds())
    return replace(found, limit_seconds=said.timeout) if said.timeout else found
