# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl verify`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import click

from backupctl.cancel import Cancellation
from backupctl.cli import common, monitored, output, point_argument, reporters, units, vm_argument
from backupctl.cli.monitored import Ending
from backupctl.cli.reporters import RecordingReporter
from backupctl.cli.target import Target
from backupctl.errors import BackupctlError, Interrupted, UsageError
from backupctl.events.repository import NoBackup, SampleChosen
from backupctl.operations import verdict
from backupctl.operations.verify import run as core
from backupctl.operations.verify.layer import VerifyScope
from backupctl.operations.verify.run import Damage, VerifyReport
from backupctl.outcome import documents
from backupctl.progress import Reporter, counted
from backupctl.sizes import Range

_SHOWN = 8


@dataclass(frozen=True)
class Scope:
    """How much to read, as it was typed. sample: percent."""

    fast: bool
    sample: float | None
    seed: int | None

    def checked(self) -> VerifyScope:
        """Return the same as the core takes it. Raises UsageError for options that contradict each other."""
        if self.fast and self.sample is not None:
            raise UsageError("--fast reads no data, so there is nothing to --sample")
        if self.seed is not None and self.sample is None:
            raise UsageError("--seed needs --sample")
        chosen = {"seed": self.seed} if self.seed is not None else {}
        return VerifyScope(data=not self.fast, percent=self.sample or 100.0, **chosen)


@common.command(
    "verify",
    0,
    1,
    2,
    4,
    examples=(
        ("All VMs of every configured repository", "backupctl verify"),
        ("Everything except the data, of one VM", "backupctl verify web --fast"),
        ("Another 5 % of the data every night", "backupctl verify --sample 5 --quiet"),
    ),
)
@vm_argument.Named(needs_vm=False, optional=True, several=True, then_point=True)
@click.option("--fast", is_flag=True, help="Check everything except the stored data.")
@click.option(
    "--sample",
    type=click.FloatRange(0, 100, min_open=True),
    metavar="PERCENT",
    help="Read only PERCENT of the data, chosen at random: a different part each time.",
)
@click.option(
    "--seed", type=click.IntRange(0), help="Read the same sample as the verify that printed this number."
)
@point_argument.at_option("In place of POINT: the newest point not later than this")
@common.json_option
@common.quiet
@common.gathered(Scope)
def verify(
    target: Target, scope: Scope, *, point: str | None, at: str | None, as_json: bool, quiet: bool
) -> None:
    """Check the integrity of the repository: all VMs of every configured repository, some, or one POINT.

    Every layer is read back and compared with the digests taken when it was read from the VM.
    """
    depth = scope.checked()
    point = point_argument.point_or_time(point, at)
    if at and target.name is None:
        raise UsageError("--at needs one NAME")
    reports: dict[str, VerifyReport] = {}
    failures: list[BackupctlError] = []
    stop = Cancellation()
    with stop.on_signals(), reporters.reporter(quiet=quiet) as reporter:
        if depth.percent < 100:
            reporter.event(_sample(depth))
        follow = _Following(target, reporter, depth, partial=point is not None or not depth.is_whole)
        for path, vm in [(path, vm) for path, vms in target.by_repository().items() for vm in vms]:
            try:
                report = core.verify(target.open(path), vm, point, depth, reporter, stop)
            except Interrupted:
                raise
            except BackupctlError as err:
                failures.append(err)
                follow.failed(path, [vm] if vm else target.config.vms, err)
            else:
                follow.done(path, report)
                if vm is None:
                    _tell_of_none(target, path, report, reporter)
                before = [reports[str(path)]] if str(path) in reports else []
                reports[str(path)] = _together([*before, report])
    if not reports:
        raise common.worst(failures)
    report = _together(reports.values())
    if as_json:
        output.print_json(documents.verify(report, depth))
    elif report.damage or report.unchecked or not quiet:
        _tell(report, depth)
    failures += verdict.of_verify(reports, target.name)
    if failures:
        raise common.worst(failures)


def _tell_of_none(target: Target, path: Path, report: VerifyReport, reporter: Reporter) -> None:
    """Tell of the VMs that are configured for a repository that holds nothing of them."""
    for vm in target.vms_of(path, None, (None,)):
        if vm not in report.vms:
            reporter.event(NoBackup(vm, path))


@dataclass(frozen=True)
class _Following:
    """What follows a verify, for each VM in the repository that is configured for it."""

    target: Target
    reporter: RecordingReporter
    scope: VerifyScope
    partial: bool

    def done(self, path: Path, report: VerifyReport) -> None:
        """Do it for each VM that was verified."""
        for vm in report.vms:
            own = replace(
                report,
                vms=(vm,),
                damage=tuple(one for one in report.damage if one.vm == vm),
                unchecked=tuple(one for one in report.unchecked if one.vm == vm),
            )
            failure = next(verdict.of_verify({str(path): own}, vm), None)
            ending = Ending(documents.verify(own, self.scope), failure=failure, partial=self.partial)
            self._follow(path, vm, ending, report.seconds)

    def failed(self, path: Path, vms: Sequence[str], err: BackupctlError) -> None:
        """Do it for each VM that could not be verified."""
        for vm in vms:
            self._follow(path, vm, Ending(failure=err), 0.0)

    def _follow(self, path: Path, vm: str, ending: Ending, seconds: float) -> None:
        target = self.target.of(vm)
        if target.repository_path == path:
            monitored.verified(target, self.reporter, ending, seconds)


def _together(reports: Iterable[VerifyReport]) -> VerifyReport:
    """Return the reports of several repositories as one: all their numbers and lists are added up."""
    whole, *others = reports
    for one in others:
        added = {
            each.name: getattr(whole, each.name) + getattr(one, each.name) for each in fields(VerifyReport)
        }
        whole = replace(whole, **added)
    return whole


def _sample(depth: VerifyScope) -> SampleChosen:
    return SampleChosen(depth.percent, depth.seed)


def _tell(report: VerifyReport, depth: VerifyScope) -> None:
    if report.damage and depth.percent < 100:
        output.print_line(_sample(depth).text)
    for note in report.notes:
        output.print_line(f"note: {note}")
    for damage in report.damage:
        _tell_damage(damage)
    for one in report.unchecked:
        output.print_line(f"NOT CHECKED: {one.message}")
    rate = f", {units.size(round(report.read_bytes / report.seconds))}/s" if depth.data else ""
    what = "all but the data" if not depth.data else f"{units.size(report.read_bytes)} of data"
    checked = report.points or report.layers or report.unchecked
    verdict = "no damage" if checked else "nothing to verify"
    if report.damage:
        verdict = f"damage found {len(report.damage)} times"
    verdict += f", {len(report.unchecked)} not checked" if report.unchecked else ""
    output.print_line(
        f"{', '.join(report.vms) or 'no VM'}: {counted(report.points, 'point')}, "
        f"{counted(report.layers, 'layer')}, {what} checked "
        f"in {units.duration(report.seconds)}{rate}: {verdict}"
    )


def _tell_damage(damage: Damage) -> None:
    output.print_line(f"DAMAGE in the {damage.kind}: {damage.message}")
    if damage.ranges:
        output.print_line(f"  bytes of {damage.disk} in this layer: {_ranges(damage.ranges)}")
    for one in damage.touches:
        output.print_line(f"  touches {damage.vm} {one.point} {one.disk}: {_ranges(one.ranges)}")
    if damage.ranges and not damage.touches:
        output.print_line("  touches no point: newer layers hide it")


def _ranges(ranges: tuple[Range, ...]) -> str:
    shown = ", ".join(f"{offset}-{offset + length - 1}" for offset, length in ranges[:_SHOWN])
    more = f" and {len(ranges) - _SHOWN} more" if len(ranges) > _SHOWN else ""
    return f"{shown}{more}"
