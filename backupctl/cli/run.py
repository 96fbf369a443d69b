# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl run`: all that the configuration says is due, for one VM or several.

One VM is worked on in this process. Each of several gets a process of its own, `backupctl run VM --relay`,
which tells what happens in lines of JSON, and its outcome in the document of --json.
"""

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import click

from backupctl import errors
from backupctl.cancel import Cancellation
from backupctl.cli import (
    backup,
    common,
    crash_log,
    each_vm,
    image_texts,
    logs,
    monitored,
    next_command,
    output,
    param_types,
    reporters,
    restore_test,
    retention_rules,
    run_screen,
    settings,
    vm_argument,
)
from backupctl.cli.common import Declared
from backupctl.cli.invocation import Invocation
from backupctl.cli.target import Target
from backupctl.errors import BackupctlError, Interrupted, UsageError, VmIsOff
from backupctl.events.routine import StartDelayed
from backupctl.names import VmName
from backupctl.operations.fleet import run as fleet
from backupctl.operations.fleet.limits import Job, Limits
from backupctl.operations.prune import retention
from backupctl.operations.routine import forecast
from backupctl.operations.routine import run as routine
from backupctl.operations.routine.policy import Policy
from backupctl.operations.routine.run import Routine
from backupctl.outcome import documents
from backupctl.outcome.documents import Document
from backupctl.progress import Reporter
from backupctl.system import libvirt_uri, mounts
from backupctl.system.address import Address

_LOOK_SECONDS = 0.2
_BACKSTOP_SECONDS = 60.0
"""How much later than a process itself its parent ends it for having taken too long."""
_OWN = frozenset(
    (
        "name",
        "everything",
        "config",
        "jobs",
        "jobs_per_storage",
        "jobs_per_host",
        "random_delay",
        "as_json",
        "quiet",
        "verbose",
        "log_file",
    )
)
"""Options of the whole, which the process of one VM does not get as they were typed."""


@dataclass(frozen=True)
class PolicyArguments:
    """The policies of a VM that only `run` has; full_every as it is written."""

    full_every: str | None
    verify_percent: float
    restore_test: str | None


@dataclass(frozen=True)
class HowArguments:
    """How to go about it. All times are in seconds; max_time: 0 for no limit."""

    jobs: int
    jobs_per_storage: int | None
    jobs_per_host: int | None
    random_delay: float
    wait_lock: float
    max_time: float
    dry_run: bool = False
    as_json: bool = False
    quiet: bool = False
    relay: bool = False


def _seconds(name: str, text: str) -> Callable[[Declared], Declared]:
    return click.option(
        name,
        type=click.FloatRange(0, settings.MAX_WAIT_SECONDS),
        metavar="SECONDS",
        default=0.0,
        show_default=True,
        help=text,
    )


_OPTIONS = (
    click.option(
        "--full-every",
        type=param_types.DURATION,
        metavar="DURATION",
        help="Take a full in each period of this length: 30d, 6m.",
    ),
    click.option(
        "--verify-percent",
        type=click.FloatRange(0, 100),
        metavar="PERCENT",
        default=0.0,
        show_default=True,
        help="Verify PERCENT of the data, chosen at random, after the backup.",
    ),
    click.option(
        "--restore-test",
        type=param_types.PERIOD,
        metavar="PERIOD",
        help="Boot the newest point in a throw-away VM, each PERIOD: daily, weekly, monthly, 10d.",
    ),
    click.option(
        "--jobs",
        type=click.IntRange(1, settings.MAX_JOBS),
        metavar="N",
        default=1,
        show_default=True,
        help="Work on N VMs at once.",
    ),
    click.option(
        "--jobs-per-storage",
        type=click.IntRange(1, settings.MAX_JOBS),
        metavar="N",
        help="Of these, work on at most N whose repositories share a file system. Default: as --jobs.",
    ),
    click.option(
        "--jobs-per-host",
        type=click.IntRange(1, settings.MAX_JOBS),
        metavar="N",
        help="Of these, work on at most N that run on the same host. Default: as --jobs.",
    ),
    _seconds("--random-delay", "Wait for a random time first, SECONDS at most."),
    _seconds("--wait-lock", "Wait for another run that works on a VM, SECONDS at most."),
    _seconds("--max-time", "Stop the work on a VM after SECONDS, and roll it back; 0 for no limit."),
)


def run_options(command: Declared) -> Declared:
    """Give a command the options of `run` that the configuration can set."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@common.command(
    "run",
    0,
    1,
    2,
    3,
    4,
    75,
    examples=(
        ("Every night, from cron or a systemd timer", "backupctl run --all --quiet"),
        ("Some VMs, four at once", "backupctl run web 'db*' --jobs 4"),
        ("What would be done, and how much it would store", "backupctl run --all --dry-run"),
    ),
)
@click.pass_context
@vm_argument.Named(several=True)
@common.if_running
@run_options
@common.dry_run("Only show what would be done, and how much it would store at most.")
@click.option("--relay", is_flag=True, hidden=True, help="Tell another process what happens.")
@common.json_option
@common.quiet
@common.gathered(PolicyArguments)
@common.gathered(HowArguments)
def run(target: Target, context: click.Context, policies: PolicyArguments, asked: HowArguments) -> None:
    """Do all that the configuration says is due for VMs: backup, prune, verify. For cron and systemd.

    The backup is an incremental, or a full where --full-every says so. A prune follows if there are retention
    rules (keep_daily, ...) and the backup found nothing wrong; then a verify of a sample. What fails for one
    VM does not stop the others. The exit code is the worst: 3, 4, 1, 2, 75.

    It creates no repository: take a first full of a VM with `backupctl full`.
    """
    stop = Cancellation()
    begun = time.monotonic()
    with stop.on_signals():
        if target.name is None:
            vms = _Fleet(target, context, asked, stop).run()
        else:
            vms = [_one(target, context, policies, asked, stop)]
    code = min((one["exit_code"] for one in vms), key=errors.WORST_FIRST.index)
    if not asked.dry_run:
        output.done("the run is over; its exit code tells how it ended")
    if asked.as_json:
        output.print_json(documents.routines(vms, time.monotonic() - begun, code, dry_run=asked.dry_run))
    elif not asked.quiet:
        run_screen.print_summary(vms, time.monotonic() - begun, dry_run=asked.dry_run)
    if not asked.relay:
        run_screen.print_errors(vms)
    sys.exit(code)  # not by click, which forgets the code of a command that is part of a group


def _one(
    target: Target, context: click.Context, policies: PolicyArguments, asked: HowArguments, stop: Cancellation
) -> Document:
    """Do what is due for one VM, in this process."""
    options = backup.options_of(target, "incremental", backup.configured(context))
    every = retention.duration(policies.full_every) if policies.full_every else None
    booted = retention.duration(policies.restore_test) if policies.restore_test else None
    policy = Policy(every, retention_rules.configured(target), policies.verify_percent, booted)
    vm = target.vm()
    if asked.dry_run:
        work = Routine(vm, target.repository(), options, policy, asked.wait_lock)
        return _forecast(work, target, context)
    with reporters.reporter(quiet=asked.quiet, relay=asked.relay) as reporter:
        _delay(asked.random_delay, reporter, stop)
        limited = _limited(stop, asked.max_time)
        with monitored.backup(target, "run", reporter, limited) as ending:
            trial = restore_test.configured(target)
            work = Routine(vm, target.repository(), options, policy, asked.wait_lock, trial)
            report = routine.run(work, reporter, limited)
            failed = {one.task: one.error for one in report.tasks if one.error}
            for err in failed.values():
                next_command.add_to(err, context)
            written: dict[str, str] = {task: crash_log.of(err) for task, err in failed.items()}
            document = documents.routine(vm.name, report, reporter.events, written)
            monitored.note_tasks(ending, document, report)
    # Once more: a hook that failed afterwards is one of its warnings.
    return documents.routine(vm.name, report, reporter.events, written)


def _forecast(work: Routine, target: Target, context: click.Context) -> Document:
    try:
        return documents.forecast(work.vm.name, forecast.look(work, target.other_repositories))
    except VmIsOff as err:
        return documents.forecast_skipped(work.vm.name, err.message)
    except BackupctlError as err:
        next_command.add_to(err, context)
        return documents.routine_failed(work.vm.name, err)


def _limited(stop: Cancellation, seconds: float) -> Cancellation:
    """Return a Cancellation that also ends the work after so long; 0 for never."""
    deadline = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() > deadline:
            raise Interrupted(f"stopped because it took longer than {seconds:g} s (--max-time)")

    return stop.also(check) if seconds else stop


def _delay(most_seconds: float, reporter: Reporter, stop: Cancellation) -> None:
    """Wait for a random time. Raises Interrupted."""
    if not most_seconds:
        return
    seconds = random.uniform(0, most_seconds)  # noqa: S311 - hosts are not to start all at once; no secret
    reporter.event(StartDelayed(seconds))
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        stop.check()
        time.sleep(min(left, _LOOK_SECONDS))


class _Fleet:
    """The work on several VMs."""

    def __init__(
        self, target: Target, context: click.Context, asked: HowArguments, stop: Cancellation
    ) -> None:
        self.target = target
        self.context = context
        self.asked = asked
        self.stop = stop
        self.names = each_vm.chosen(context)

    def run(self) -> list[Document]:
        """Do it; return what became of each. Raises Interrupted if it is stopped before the first."""
        asked = self.asked
        watcher = run_screen.Watcher(quiet=asked.quiet, verbose=logs.current().verbose)
        with reporters.reporter(quiet=asked.quiet) as reporter:
            _delay(0 if asked.dry_run else asked.random_delay, reporter, self.stop)
        limits = Limits(asked.jobs, asked.jobs_per_storage or asked.jobs, asked.jobs_per_host)
        patience = fleet.Patience(asked.max_time + _BACKSTOP_SECONDS if asked.max_time else None)
        jobs = [self._job(vm) for vm in self.names]
        results = fleet.run(jobs, limits, patience, watcher, self.stop)
        return [run_screen.entry_of(result, watcher.last_line(result.vm)) for result in results]

    def _job(self, vm: VmName) -> Job:
        said, own = self.target.config.of(vm), self.target.of(vm)
        repository = own.repository_path
        command = [sys.executable, "-P", "-m", "backupctl", "run", vm, "--relay", "--json"]
        command += ["--random-delay", "0", *self._options()]
        return Job(
            vm,
            tuple(command),
            storage=mounts.device(repository) if repository else "",
            monitor=said.qmp or f"{said.libvirt or vm} {said.domain or vm}",
            host=_host_of(said.qmp or said.libvirt or next(iter(said.image.values()), None)),
        )

    def _options(self) -> list[str]:
        """Return the options of each process: those that were typed, and where configuration and log are."""
        given = {name: value for name, value in Invocation.of(self.context).typed.items() if name not in _OWN}
        words = next_command.spelt(self.context.command, given)
        if path := self.target.config.path:
            words += ["--config", str(path)]
        if file := logs.current().file:
            words += ["--log-file", str(file.absolute())]
        return words


def _host_of(monitor: str | None) -> str:
    """Return the host that a VM runs on, "" for this one, by its monitor, libvirt or first image."""
    try:
        if libvirt_uri.is_remote(monitor or ""):
            return (libvirt_uri.remote(monitor or "").address.host or "").lower()
        address = image_texts.split_host(monitor or "/")[0] or Address.parse(monitor or "/")
    except UsageError:  # which the process of this VM reports
        return ""
    return "" if address.host is None or (address.loopback and not address.remote) else address.host.lower()
