# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl prune`, `backupctl protect` and `backupctl unprotect`."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import click

from backupctl.cancel import Cancellation
from backupctl.cli import common, output, reporters, units
from backupctl.cli.common import Target
from backupctl.errors import BackupctlError, DamageFound, Interrupted, UsageError
from backupctl.events.prune import ConfiguredRulesNotUsed, VmFailed, VmSkipped
from backupctl.names import vm_name
from backupctl.operations.prune import retention
from backupctl.operations.prune import run as core
from backupctl.operations.prune.retention import Rules
from backupctl.operations.prune.run import PruneReport
from backupctl.outcome import documents
from backupctl.progress import Reporter

_COUNTED = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
_KEYS = (*(f"keep_{name}" for name in _COUNTED), "keep_within")
_NO_RULE = "no retention rule is configured (keep_last, keep_daily, ...)"
_HELP = {"last": "Keep the N newest points."}


def _rules(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option(
        "--keep-within",
        metavar="DURATION",
        help="Keep what is no older than this before the newest: 36h, 7d, 1y6m.",
    )(command)
    for name in reversed(_COUNTED):
        text = _HELP.get(
            name, f"Keep the newest point of each of the last N {name} periods that have one (UTC)."
        )
        option = click.option(f"--keep-{name}", type=click.IntRange(min=0), metavar="N", help=text)
        command = option(command)
    return command


@click.command(epilog=common.exit_help(0, 1, 2, 4, 75))
@common.named(needs_vm=False, optional=True)
@_rules
@click.option("--dry-run", is_flag=True, help="Only show which points would stay or go, and why.")
@click.option(
    "--max-chain",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tell which disks of the points that stay still need more than N layers.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@common.quiet
@click.pass_context
def prune(context: click.Context, /, **options: Any) -> None:
    """Drop the points of a VM, or of every configured one, that no rule holds; all others stay whole.

    The rules are those of the command line, if it names any, or else the configuration's: never both.

    A point stays if any rule holds it. The newest always stays, the newest that holds each disk, and
    protected ones. The VM is not touched. What a prune could not finish the next one does.
    """
    names = common.from_context(context, options)
    stop = Cancellation()
    with stop.on_signals(), reporters.reporter(quiet=options["quiet"]) as reporter:
        work = _Work(options, reporter, stop)
        if names.name is None:
            work.all(names)
        else:
            work.one(names)
    if not options["dry_run"]:
        output.done("the prune has ended: what it dropped is dropped")
    if options["as_json"]:
        output.print_json(work.document(alone=names.name is not None))
    elif not options["quiet"]:
        for vm, done in work.done.items():
            if names.name is None:
                output.print_line(f"{vm}:")
            _print(done.report, dry_run=options["dry_run"])
    if work.failed:
        raise common.worst(list(work.failed.values()))


@dataclass(frozen=True)
class _Policy:
    """Which points stay. named: whether the command line says so. said: its rules, by their keys in the file.

    unused: rules of the configuration that don't count, because the command line named some.
    """

    rules: Rules
    named: bool
    said: dict[str, Any]
    unused: dict[str, Any]

    @classmethod
    def of(cls, names: Target, options: dict[str, Any]) -> "_Policy":
        """Take the command line's rules, if it names any, or else those of the configuration, never both.

        Raises UsageError.
        """
        given = {key: options[key] for key in _KEYS if options[key] is not None}
        found = {key: names.config.setting(names.name, key) for key in _KEYS}
        configured = {key: value for key, value in found.items() if value}
        said = given or configured
        within = said.get("keep_within")
        rules = Rules(
            **{name: int(said.get(f"keep_{name}", 0)) for name in _COUNTED},
            within=retention.duration(str(within)) if within else None,
        )
        unused = {key: value for key, value in configured.items() if given and given.get(key) != value}
        return cls(rules, bool(given), said, unused)


@dataclass(frozen=True)
class _Done:
    """What became of one VM."""

    policy: _Policy
    report: PruneReport


@dataclass
class _Work:
    """The prune of one VM, or of all. skipped: why nothing was to be done. failed: with what error."""

    options: dict[str, Any]
    reporter: Reporter
    stop: Cancellation
    done: dict[str, _Done] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, BackupctlError] = field(default_factory=dict)

    def all(self, names: Target) -> None:
        """Prune each configured VM, or each that is in the repository that was named. Raises Interrupted."""
        vms = names.repository().vms() if names.repository_path else list(names.config.vms)
        if not vms:
            raise UsageError(
                "no VM is configured or named, so there is nothing to prune", next_command="backupctl list"
            )
        for vm in vms:
            try:
                self._one_of_all(replace(names, name=vm))
            except Interrupted:
                raise
            except BackupctlError as err:
                self.failed[vm] = err
                self.reporter.event(VmFailed(vm, err.message))
        if not (self.done or self.failed) and set(self.skipped.values()) == {_NO_RULE}:
            raise UsageError(f"nothing was dropped: {_NO_RULE}")

    def _one_of_all(self, names: Target) -> None:
        policy = _Policy.of(names, self.options)
        name = vm_name(names.name or "")
        if not policy.named and name not in names.config.vms:
            self._skip(name, "it is not configured")
        elif policy.rules.hold_nothing():
            self._skip(name, _NO_RULE)
        elif not names.repository().vm(name).exists():
            self._skip(name, "it has no recovery points yet")
        else:
            self._prune(names, policy)

    def _skip(self, vm: str, why: str) -> None:
        self.skipped[vm] = why
        self.reporter.event(VmSkipped(vm, why))

    def one(self, names: Target) -> None:
        """Prune one VM."""
        self._prune(names, _Policy.of(names, self.options))

    def _prune(self, names: Target, policy: _Policy) -> None:
        folder = names.repository().vm(vm_name(names.name or ""))
        if policy.unused:
            self.reporter.event(ConfiguredRulesNotUsed(folder.name, policy.unused))
        most = self.options["max_chain"]
        if self.options["dry_run"]:
            report = PruneReport(core.plan(folder, policy.rules), long_chains=core.long_chains(folder, most))
        else:
            report = core.prune(folder, policy.rules, self.reporter, self.stop, most)
        self.done[folder.name] = _Done(policy, report)
        if report.damage:
            self.failed[folder.name] = DamageFound(
                "; ".join(report.damage),
                state="the points that stay are as they were; what is damaged is not merged",
                next_command=f"backupctl verify {folder.name}",
            )

    def document(self, *, alone: bool) -> dict[str, Any]:
        """Return what was done for programs: of the one VM, or of all."""
        dry_run = self.options["dry_run"]
        vms = [
            documents.prune(vm, one.report, one.policy.said, one.policy.unused, dry_run=dry_run)
            for vm, one in self.done.items()
        ]
        return vms[0] if alone else documents.prune_all(vms, self.skipped, self.failed, dry_run=dry_run)


def _print(report: PruneReport, *, dry_run: bool) -> None:
    rows = [(one.point, "keep" if one.keep else "drop", "; ".join(one.reasons)) for one in report.decisions]
    output.print_table(("POINT", "", "WHY"), rows)
    for text in report.long_chains:
        output.print_line(f"longer than --max-chain: {text}")
    if dry_run:
        output.print_line(f"{len(retention.dropped(report.decisions))} would go; nothing was touched")
        return
    written = units.size(sum(one.written_bytes for one in report.merged))
    output.print_line(
        f"dropped {len(report.dropped)}, merged {len(report.merged)} layers ({written} written), "
        f"left {len(report.left)} for the next prune"
    )


def _switch(change: Callable[..., Any], said: str) -> Callable[..., None]:
    def run(context: click.Context, /, **options: Any) -> None:
        names = common.from_context(context, options)
        point = change(names.repository().vm(vm_name(names.name or "")), options["point"])
        output.done(f"{names.name} {point}: {said}")
        if options["as_json"]:
            output.print_json(documents.protection(names.name or "", point, protected=change is core.protect))
        else:
            output.print_line(f"{names.name} {point}: {said}")

    return run


def _command(name: str, run: Callable[..., None], text: str) -> click.Command:
    made = click.pass_context(run)
    made = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")(made)
    made = click.argument("point")(made)
    made = common.named(needs_vm=False)(made)
    return click.command(name, help=text, epilog=common.exit_help(0, 1, 2, 4, 75))(made)


protect = _command(
    "protect",
    _switch(core.protect, "protected; no prune drops it"),
    "Have prune never drop POINT (an id, or `latest`), until `unprotect`.",
)
unprotect = _command(
    "unprotect",
    _switch(core.unprotect, "not protected any more"),
    "Let prune drop POINT again, if no rule holds it.",
)
