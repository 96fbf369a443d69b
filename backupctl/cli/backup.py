# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl full` and `backupctl incremental`."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

import click

from backupctl.cancel import Cancellation
from backupctl.cli import (
    common,
    completion,
    monitored,
    output,
    param_types,
    reporters,
    settings,
    units,
    vm_argument,
)
from backupctl.cli.common import Declared
from backupctl.cli.target import Target
from backupctl.errors import VmIsOff
from backupctl.events.backup import RepositoryCreated
from backupctl.events.routine import TaskSkipped
from backupctl.names import PointId
from backupctl.operations import verdict
from backupctl.operations.backup import prepare
from backupctl.operations.backup import run as backup
from backupctl.operations.backup.context import RunContext
from backupctl.operations.backup.outcome import RunReport
from backupctl.options import (
    ChainOptions,
    FreezeMode,
    FreezeOptions,
    Kind,
    OnBrokenChain,
    RunOptions,
    ScratchOptions,
    ViewKind,
    VmConfig,
)
from backupctl.outcome import documents
from backupctl.progress import Reporter
from backupctl.repository.repository import Repository
from backupctl.sizes import MAX_CHAIN


@dataclass(frozen=True)
class RunArguments:
    """What command line and configuration ask of a run. Sizes are in bytes, `limit` in bytes a second."""

    freeze: FreezeMode
    freeze_budget: float
    view: ViewKind
    limit: int | None
    scratch_size: int | None
    keep_checkpoints: int
    include_files: tuple[Path, ...] = ()
    no_firmware: bool = False
    disks: tuple[str, ...] = ()
    on_broken_chain: OnBrokenChain = common.DEFAULTS.chain.on_broken
    max_chain: int = common.DEFAULTS.chain.max_layers
    since: PointId | None = None


_FOR_EVERY_RUN = (
    click.option(
        "--disk",
        "disks",
        multiple=True,
        default=(),
        metavar="D",
        help="Back up only this disk; may be repeated.",
    ),
    click.option(
        "--include-file",
        "include_files",
        type=param_types.PATH,
        multiple=True,
        default=(),
        metavar="FILE",
        help="Store this file of the VM's host with the point; may be repeated.",
    ),
    click.option(
        "--no-firmware",
        is_flag=True,
        help="Leave out the UEFI variables.",
    ),
    click.option(
        "--keep-checkpoints",
        type=click.IntRange(0, settings.MAX_COUNT),
        metavar="N",
        default=common.DEFAULTS.chain.checkpoints,
        show_default=True,
        help="Keep the bitmaps of N older points in the VM, so that --since need not read whole disks.",
    ),
    click.option(
        "--freeze",
        type=click.Choice(get_args(FreezeMode)),
        default=common.DEFAULTS.freeze.mode,
        show_default=True,
        help="Freeze the guest's file systems for the point in time.",
    ),
    click.option(
        "--freeze-budget",
        type=param_types.SECONDS,
        metavar="SECONDS",
        default=common.DEFAULTS.freeze.budget_seconds,
        show_default=True,
        help="The longest that the guest may stay frozen.",
    ),
    click.option(
        "--scratch-size",
        type=param_types.SIZE,
        metavar="SIZE",
        default=None,
        help="Reserve SIZE in the scratch directory, or refuse to start. Default: what the disks hold, but "
        "at most half of the free space.",
    ),
    click.option(
        "--view",
        type=click.Choice(get_args(ViewKind)),
        default=common.DEFAULTS.view,
        show_default=True,
        help="How the point-in-time view is provided; with snapshot-access (QEMU 10.0+) a full scratch "
        "directory does not affect the guest.",
    ),
    click.option(
        "--limit",
        type=param_types.SIZE,
        metavar="RATE",
        default=None,
        help="Read at most RATE bytes a second, e.g. 50M.",
    ),
)
_FOR_INCREMENTALS = (
    click.option(
        "--max-chain",
        type=click.IntRange(1, MAX_CHAIN),
        metavar="N",
        default=common.DEFAULTS.chain.max_layers,
        show_default=True,
        help=f"Take a disk full once its chain has N layers (QEMU's tools open at most {MAX_CHAIN}).",
    ),
    click.option(
        "--on-broken-chain",
        type=click.Choice(get_args(OnBrokenChain)),
        default=common.DEFAULTS.chain.on_broken,
        show_default=True,
        help="What to do with a disk whose bitmap cannot be used: scan (read all of it and store what "
        "differs), full (take it full), or fail.",
    ),
)


def run_options(*, incremental: bool) -> Callable[[Declared], Declared]:
    """Give a command the options of a run that the configuration can set, and --disk."""

    def declare(command: Declared) -> Declared:
        for option in (*_FOR_EVERY_RUN, *(_FOR_INCREMENTALS if incremental else ())):
            command = option(command)
        return command

    return declare


@common.command(
    "full",
    0,
    1,
    2,
    3,
    4,
    75,
    for_each=True,
    examples=(
        ("A VM of the configuration", "backupctl full web"),
        (
            "A VM that no configuration describes",
            "backupctl full web --qmp unix:/run/qemu/web.qmp --repository /backup",
        ),
        (
            "Only one disk, and only with frozen file systems",
            "backupctl full web --disk virtio0 --freeze require",
        ),
        (
            "A VM that is off, by the image of its disk",
            "backupctl full web --image virtio0=/var/lib/libvirt/images/web.qcow2",
        ),
    ),
)
@vm_argument.Named(several=True)
@common.if_running
@run_options(incremental=False)
@common.json_option
@common.quiet
@common.gathered(RunArguments)
def full(target: Target, asked: RunArguments, *, as_json: bool, quiet: bool) -> None:
    """Take a full recovery point of a VM: all data of all its writable disks.

    A VM that is off is backed up by its images, if image or --image names them or libvirt knows them.

    If there is no repository yet, it creates one, once the VM has answered.
    """
    _run(target, options_of(target, "full", asked), as_json=as_json, quiet=quiet)


@common.command(
    "incremental",
    0,
    1,
    2,
    3,
    4,
    75,
    for_each=True,
    examples=(
        ("What changed since the newest point", "backupctl incremental web"),
        (
            "All changes since one point, whatever was stored since then",
            "backupctl incremental web --since 20261123T041500Z",
        ),
        ("At most 50 MiB a second", "backupctl incremental web --limit 50M"),
        ("Only if the VM runs", "backupctl incremental web --if-running"),
    ),
)
@vm_argument.Named(several=True)
@common.if_running
@click.option(
    "--since",
    type=param_types.POINT,
    metavar="POINT",
    default=None,
    shell_complete=completion.points,
    help="Store what changed since this point, instead of since the newest.",
)
@run_options(incremental=True)
@common.json_option
@common.quiet
@common.gathered(RunArguments)
def incremental(target: Target, asked: RunArguments, *, as_json: bool, quiet: bool) -> None:
    """Take an incremental recovery point: what changed since the newest one, or since --since (differential).

    With no point to build on it takes a full one; without a repository it fails.
    """
    _run(target, options_of(target, "incremental", asked), as_json=as_json, quiet=quiet)


def _run(target: Target, options: RunOptions, *, as_json: bool, quiet: bool) -> None:
    vm = target.vm()
    stop = Cancellation()
    with stop.on_signals():
        with (
            reporters.reporter(quiet=quiet) as reporter,
            monitored.backup(target, options.kind, reporter, stop) as ending,
        ):
            try:
                repository = _repository(target, vm, options, reporter, stop)
                report = backup.run(RunContext(vm, repository, options, reporter, stop))
            except VmIsOff as err:
                reporter.event(TaskSkipped(vm.name, "backup", err.message))
                ending.skipped = True
                if as_json:
                    output.print_json(documents.skipped(vm.name, err.message, reporter.events))
                return
            output.done(f"the recovery point {report.point} of {report.vm} is committed")
            ending.point, ending.report = report.point, documents.run(report, reporter.events)
            ending.failure = next(verdict.of_backup(report), None)
        if as_json:
            output.print_json(documents.run(report, reporter.events))
        elif not quiet:
            _print(report)
        if ending.failure:
            raise ending.failure


def configured(context: click.Context) -> RunArguments:
    """Return what `incremental` does if nothing is typed. context: of a command that has a NAME."""
    names = {field.name for field in fields(RunArguments)}
    return RunArguments(
        **{
            option.name: option.type_cast_value(context, option.get_default(context))
            for option in incremental.params
            if option.name in names
        }
    )


def options_of(target: Target, kind: Kind, asked: RunArguments) -> RunOptions:
    """Return what a run is asked to do, as the core takes it."""
    return RunOptions(
        kind=kind,
        disks=asked.disks,
        since=asked.since,
        limit_bytes_per_second=asked.limit,
        view=asked.view,
        freeze=FreezeOptions(asked.freeze, asked.freeze_budget),
        scratch=ScratchOptions(target.scratch, asked.scratch_size),
        chain=ChainOptions(asked.on_broken_chain, asked.max_chain, asked.keep_checkpoints),
        timeouts=target.timeouts,
        include=asked.include_files,
        firmware=not asked.no_firmware,
    )


def _repository(
    target: Target, vm: VmConfig, options: RunOptions, reporter: Reporter, stop: Cancellation
) -> Repository:
    """Open the repository. A full creates a missing one, once it is known that its VM can be backed up.

    An incremental never does: if a file system is not mounted, that looks just like a missing repository.
    """
    if options.kind != "full" or target.has_repository():
        return target.repository()
    prepare.rehearse(vm, options, stop)
    made = target.new_repository()
    reporter.event(RepositoryCreated(made.path))
    return made


def _print(report: RunReport) -> None:
    rows = [
        (
            disk.name,
            "scan" if disk.scanned else disk.kind,
            units.size(disk.size),
            units.size(disk.copied_bytes),
            units.size(disk.zero_bytes),
            units.size(disk.unchanged_bytes),
            units.size(disk.stored_bytes),
        )
        for disk in report.disks
    ]
    parent = f" on {report.parent}" if report.parent else ""
    output.print_line(
        f"{report.vm} {report.point}: {report.kind}{parent}, {_consistency(report)}, "
        f"{units.duration(report.seconds)}"
    )
    output.print_table(("DISK", "KIND", "SIZE>", "COPIED>", "ZEROES>", "UNCHANGED>", "STORED>"), rows)


def _consistency(report: RunReport) -> str:
    if report.consistency == "offline":
        return "the VM is off"
    frozen = "not frozen" if report.frozen_ms is None else f"frozen {report.frozen_ms} ms"
    return f"{report.consistency}-consistent, {frozen}"
