# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl prune`, `backupctl protect` and `backupctl unprotect`."""

from dataclasses import asdict, dataclass, field
from typing import Any

import click
from click.core import ParameterSource

from backupctl.cancel import Cancellation
from backupctl.cli import (
    common,
    monitored,
    output,
    param_types,
    point_argument,
    reporters,
    retention_rules,
    units,
    vm_argument,
)
from backupctl.cli.common import Declared
from backupctl.cli.monitored import Ending
from backupctl.cli.reporters import RecordingReporter
from backupctl.cli.retention_rules import Policy
from backupctl.cli.target import Target
from backupctl.errors import BackupctlError, Interrupted, UsageError
from backupctl.events.prune import ConfiguredRulesNotUsed, VmFailed, VmSkipped
from backupctl.names import PointId
from backupctl.operations import usage, verdict
from backupctl.operations.prune import retention
from backupctl.operations.prune import run as core
from backupctl.operations.prune.run import PruneReport
from backupctl.outcome import documents

_NO_RULE = "no retention rule is configured (keep_last, keep_daily, ...)"
_HELP = {"last": "Keep the N newest points."}


@dataclass(frozen=True)
class PruneArguments:
    """What else is asked of a prune. longest: report chains with more layers; None for no report."""

    dry_run: bool
    longest: int | None
    as_json: bool
    quiet: bool


@dataclass(frozen=True)
class RuleArguments:
    """The rules of the options, None for one that nobody set; keep_within as it is written."""

    keep_last: int | None
    keep_hourly: int | None
    keep_daily: int | None
    keep_weekly: int | None
    keep_monthly: int | None
    keep_yearly: int | None
    keep_within: str | None

    def typed(self, context: click.Context) -> dict[str, Any]:
        """Return those of the command line, by their keys in the configuration file."""
        return {
            key: value
            for key, value in asdict(self).items()
            if context.get_parameter_source(key) is ParameterSource.COMMANDLINE
        }


def rule_options(command: Declared) -> Declared:
    """Give a command the options that say what a prune keeps."""
    command = click.option(
        "--keep-within",
        type=param_types.DURATION,
        metavar="DURATION",
        default=None,
        help="Keep every point not older than this before the newest: 36h, 7d, 1y6m.",
    )(command)
    for name in reversed(retention_rules.COUNTED):
        text = _HELP.get(
            name, f"Keep the newest point of each of the last N {name} periods that have one (UTC)."
        )
        option = click.option(
            f"--keep-{name}", type=click.IntRange(min=0), metavar="N", default=None, help=text
        )
        command = option(command)
    return command


@common.command(
    "prune",
    0,
    1,
    2,
    4,
    75,
    examples=(
        ("Every configured VM, by its own rules", "backupctl prune"),
        ("What rules would drop, and why", "backupctl prune web --keep-daily 30 --keep-monthly 12 --dry-run"),
    ),
)
@click.pass_context
@vm_argument.Named(needs_vm=False, optional=True, several=True)
@rule_options
@common.dry_run("Only show which points would be kept or dropped, and why.")
@click.option(
    "--max-chain",
    "longest",
    type=click.IntRange(min=1),
    metavar="N",
    help="Report disks of kept points whose chain is longer than N layers.",
)
@common.json_option
@common.quiet
@common.gathered(RuleArguments)
@common.gathered(PruneArguments)
def prune(target: Target, context: click.Context, rules: RuleArguments, asked: PruneArguments) -> None:
    """Drop the recovery points of VMs, or of every configured VM, that no retention rule keeps.

    The rules are those of the command line, if it names any, or else those of the configuration, never both.

    A point is kept if any rule keeps it. The newest point, the newest one that holds each disk, and protected
    points are always kept. The VM is not touched. The next prune finishes what an interrupted one could not.
    """
    stop = Cancellation()
    with stop.on_signals(), reporters.reporter(quiet=asked.quiet) as reporter:
        work = _Work(asked, rules.typed(context), reporter, stop)
        if target.name is None:
            work.all(target)
        else:
            work.one(target)
    if not asked.dry_run:
        output.done("the prune is complete: the dropped points are gone")
    if asked.as_json:
        output.print_json(work.document(alone=target.name is not None))
    elif not asked.quiet:
        for vm, done in work.done.items():
            if target.name is None:
                output.print_line(f"{vm}:")
            _print(done.report, dry_run=asked.dry_run)
    if work.failed:
        raise common.worst(list(work.failed.values()))


@dataclass(frozen=True)
class _Done:
    """What became of one VM."""

    policy: Policy
    report: PruneReport


@dataclass
class _Work:
    """The prune of one VM, or of all. skipped: why there was nothing to do. failed: with what error.

    typed: the rules of the command line.
    """

    asked: PruneArguments
    typed: dict[str, Any]
    reporter: RecordingReporter
    stop: Cancellation
    done: dict[str, _Done] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, BackupctlError] = field(default_factory=dict)

    def all(self, target: Target) -> None:
        """Prune each VM that is named; or each configured one, or each in the repository that was typed.

        Raises Interrupted, UsageError.
        """
        known = target.repository().vms() if target.typed_repository else target.config.vms
        vms = known if target.selection.is_empty else target.selection.of(known)
        if not vms:
            raise UsageError(
                "no VM is configured or named, so there is nothing to prune", next_command="backupctl list"
            )
        for vm in vms:
            try:
                self._one_of_all(target.of(vm))
            except Interrupted:
                raise
            except BackupctlError as err:
                self.failed[vm] = err
                self.reporter.event(VmFailed(vm, err.message))
        if not (self.done or self.failed) and set(self.skipped.values()) == {_NO_RULE}:
            raise UsageError(f"nothing was dropped: {_NO_RULE}")

    def _one_of_all(self, target: Target) -> None:
        policy = Policy.of(target, self.typed)
        name = target.vm_name
        if not policy.typed and name not in target.config.vms:
            self._skip(name, "it is not configured")
        elif policy.rules.hold_nothing():
            self._skip(name, _NO_RULE)
        elif not target.vm_directory().exists():
            self._skip(name, "it has no recovery points yet")
        else:
            self._prune(target, policy)

    def _skip(self, vm: str, why: str) -> None:
        self.skipped[vm] = why
        self.reporter.event(VmSkipped(vm, why))

    def one(self, target: Target) -> None:
        """Prune one VM."""
        self._prune(target, Policy.of(target, self.typed))

    def _prune(self, target: Target, policy: Policy) -> None:
        with monitored.prune(target, self.reporter, dry_run=self.asked.dry_run) as ending:
            self._prune_watched(target, policy, ending)

    def _prune_watched(self, target: Target, policy: Policy, ending: Ending) -> None:
        directory = target.vm_directory()
        if policy.unused:
            self.reporter.event(ConfiguredRulesNotUsed(directory.name, policy.unused))
        most = self.asked.longest
        if self.asked.dry_run:
            decisions = core.plan(directory, policy.rules)
            report = PruneReport(
                decisions,
                long_chains=core.long_chains(directory, most),
                freed=usage.freed_by(directory, retention.dropped(decisions)),
            )
        else:
            report = core.prune(directory, policy.rules, self.reporter, self.stop, most)
        done = self.done[directory.name] = _Done(policy, report)
        for damage in verdict.of_prune(directory.name, report):
            self.failed[directory.name] = ending.failure = damage
        ending.report = self._document_of(directory.name, done)

    def document(self, *, alone: bool) -> dict[str, Any]:
        """Return what was done for programs: of the one VM, or of all."""
        vms = [self._document_of(vm, one) for vm, one in self.done.items()]
        if alone:
            return vms[0]
        return documents.prune_all(vms, self.skipped, self.failed, dry_run=self.asked.dry_run)

    def _document_of(self, vm: str, done: _Done) -> dict[str, Any]:
        rules, dry_run = done.policy, self.asked.dry_run
        return documents.prune(vm, done.report, rules.said, rules.unused, dry_run=dry_run)


def _print(report: PruneReport, *, dry_run: bool) -> None:
    rows = [
        (
            one.point,
            "keep" if one.keep else "drop",
            _freed((report.freed or {}).get(one.point)),
            "; ".join(one.reasons),
        )
        for one in report.decisions
    ]
    output.print_table(("POINT", "", "FREES>" if dry_run else "FREED>", "WHY"), rows)
    for text in report.long_chains:
        output.print_line(f"longer than --max-chain: {text}")
    if dry_run:
        output.print_line(_foretold(report))
        return
    written = units.size(sum(one.written_bytes for one in report.merged))
    output.print_line(
        f"dropped {len(report.dropped)}, merged {len(report.merged)} layers ({written} written), "
        f"freed {_freed(report.freed_bytes)}, left {len(report.left)} for the next prune"
    )


def _foretold(report: PruneReport) -> str:
    """Say what a prune would come to."""
    count = len(retention.dropped(report.decisions))
    about = _freed(report.freed_bytes) or "an unknown amount (a digest map is damaged)"
    frees = f", which would free about {about}" if count else ""
    return f"{count} would be dropped{frees}; nothing was changed"


def _freed(count: int | None) -> str:
    """Say what is freed; a merge that was left unfinished may take space instead, until the next prune."""
    return "" if count is None else units.size(max(count, 0))


@common.command(
    "protect", 0, 1, 2, 4, 75, examples=(("Before an upgrade of the guest", "backupctl protect web latest"),)
)
@vm_argument.Named(needs_vm=False)
@point_argument.point()
@common.json_option
def protect(target: Target, *, point: str, as_json: bool) -> None:
    """Protect POINT: prune never drops it, until `unprotect`."""
    found = core.protect(target.vm_directory(), point)
    _print_protection(target, found, protected=True, as_json=as_json)


@common.command(
    "unprotect",
    0,
    1,
    2,
    4,
    75,
    examples=(("When the point is no longer needed", "backupctl unprotect web 20261123T041500Z"),),
)
@vm_argument.Named(needs_vm=False)
@point_argument.point()
@common.json_option
def unprotect(target: Target, *, point: str, as_json: bool) -> None:
    """Let prune drop POINT again, if no rule keeps it."""
    found = core.unprotect(target.vm_directory(), point)
    _print_protection(target, found, protected=False, as_json=as_json)


def _print_protection(target: Target, point: PointId, *, protected: bool, as_json: bool) -> None:
    said = "protected; prune never drops it" if protected else "not protected any more"
    output.done(f"{target.name} {point}: {said}")
    if as_json:
        output.print_json(documents.protection(target.vm_name, point, protected=protected))
    else:
        output.print_line(f"{target.name} {point}: {said}")
