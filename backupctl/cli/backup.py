# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl full` and `backupctl incremental`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from backupctl.cancel import Cancellation
from backupctl.cli import common, config, output, reporters, units
from backupctl.errors import DamageFound, UsageError
from backupctl.events.backup import RepositoryCreated
from backupctl.operations.backup import prepare
from backupctl.operations.backup import run as backup
from backupctl.operations.backup.context import RunContext
from backupctl.operations.backup.outcome import RunReport
from backupctl.options import (
    ChainOptions,
    FreezeOptions,
    Kind,
    RunOptions,
    ScratchOptions,
    VmConfig,
)
from backupctl.outcome import documents
from backupctl.progress import Reporter
from backupctl.repository.repository import Repository
from backupctl.sizes import MAX_CHAIN


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        common.quiet,
        click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
        click.option("--limit", metavar="RATE", help="Read no faster than this, e.g. 50M (bytes a second)."),
        click.option(
            "--view",
            type=click.Choice(["fleecing", "snapshot-access", "auto"]),
            help="How the moment is held; snapshot-access (QEMU 10.0+) spares the guest a full scratch.",
        ),
        click.option(
            "--scratch-size",
            metavar="SIZE",
            help="Set aside so much in the scratch folder, or refuse. Without it: what the disks hold, "
            "but half of what is free at most.",
        ),
        click.option("--freeze-budget", type=float, metavar="SECONDS", help="The longest freeze (10)."),
        click.option(
            "--freeze",
            type=click.Choice(["auto", "require", "never"]),
            help="Freeze the guest's file systems for the moment (auto).",
        ),
        click.option(
            "--keep-checkpoints",
            type=click.IntRange(0, 1000),
            metavar="N",
            help="Keep the bitmaps of N older points in the VM, for --since without reading all (0).",
        ),
        click.option("--disk", "disks", multiple=True, metavar="D", help="Only this disk; may be repeated."),
        common.named(),
    ):
        command = option(command)
    return command


@click.command(epilog=common.exit_help(0, 1, 2, 3, 4, 75))
@_options
@click.pass_context
def full(context: click.Context, /, **options: Any) -> None:
    """Take a full recovery point of a running VM: all data of all its writable disks.

    Where there is no repository yet it makes one, once the VM has answered.
    """
    _run(context, "full", options)


@click.command(epilog=common.exit_help(0, 1, 2, 3, 4, 75))
@_options
@click.option(
    "--on-broken-chain",
    type=click.Choice(["scan", "full", "fail"]),
    help="What to do with a disk whose bitmap can't be used: read it whole and store what differs (scan, the "
    "default), take it full, or fail.",
)
@click.option(
    "--max-chain",
    type=click.IntRange(min=1, max=MAX_CHAIN),
    metavar="N",
    help=f"Take a disk full whose newest chain has N layers already "
    f"({common.DEFAULTS.chain.max_layers}; at most {MAX_CHAIN}, more than which QEMU's tools don't follow).",
)
@click.option("--since", metavar="POINT", help="Store what changed since this point, not the newest.")
@click.pass_context
def incremental(context: click.Context, /, **options: Any) -> None:
    """Take an incremental recovery point: what changed since the newest one, or since --since (differential).

    With no point to build on it takes a full; without a repository it is refused.
    """
    _run(context, "incremental", options)


def _run(context: click.Context, kind: Kind, options: dict[str, Any]) -> None:
    names = common.from_context(context, options)
    vm, wanted = names.vm(), wishes(names, kind, options)
    stop = Cancellation()
    with stop.on_signals():
        with reporters.reporter(quiet=options["quiet"]) as reporter:
            repository = _repository(names, vm, wanted, reporter, stop)
            report = backup.run(RunContext(vm, repository, wanted, reporter, stop))
        output.done(f"the recovery point {report.point} of {report.vm} is committed")
        if options["as_json"]:
            output.print_json(documents.run(report, reporter.events))
        elif not options["quiet"]:
            _print(report)
        _tell_damage(report)


def _repository(
    names: common.Target, vm: VmConfig, wanted: RunOptions, reporter: Reporter, stop: Cancellation
) -> Repository:
    """Open the repository. A full makes one that is missing, once its VM was found fit for a backup.

    An incremental makes none: a file system that is not mounted looks just like a repository that is missing.
    """
    if wanted.kind != "full" or names.has_repository():
        return names.repository()
    prepare.rehearse(vm, wanted, stop)
    made = names.new_repository()
    reporter.event(RepositoryCreated(made.path))
    return made


def _tell_damage(report: RunReport) -> None:
    """Raise DamageFound if the run met damage in older points; the new one is committed then."""
    if not report.damaged:
        return
    said = ", ".join(f"{disk or 'all'} of {point}" for point, disk in report.damaged)
    raise DamageFound(
        f"the new point {report.point} of {report.vm} is committed and whole, but these older points "
        f"can't be restored any more: {said}",
        state="the backup itself was not hindered: what comes next builds on the new point",
        next_command=f"backupctl verify {report.vm}",
    )


def wishes(names: common.Target, kind: Kind, given: Mapping[str, Any]) -> RunOptions:
    """Return what a run is asked to do: as given, else as configured, else by default. Raises UsageError."""
    asked = {name: value for name, value in given.items() if value is not None}

    def setting(name: str, default: Any) -> Any:
        found = asked.get(name, names.config.setting(names.name, name))
        return default if found is None else found

    default = common.DEFAULTS
    limit, scratch_size = setting("limit", None), setting("scratch_size", None)
    budget = float(setting("freeze_budget", default.freeze.budget_seconds))
    if not 0 < budget <= config.MAX_FREEZE_SECONDS:  # nor is "nan"
        raise UsageError(
            f"a freeze budget of {budget:g} s can't be had: above 0, {config.MAX_FREEZE_SECONDS} at the most"
        )
    return RunOptions(
        kind=kind,
        disks=tuple(given.get("disks", ())),
        freeze=FreezeOptions(setting("freeze", default.freeze.mode), budget),
        scratch=ScratchOptions(
            Path(names.scratch()), units.parse_size(scratch_size) if scratch_size else None
        ),
        limit_bytes_per_second=units.parse_size(limit) if limit else None,
        view=setting("view", default.view),
        chain=ChainOptions(
            on_broken=setting("on_broken_chain", default.chain.on_broken),
            max_layers=int(setting("max_chain", 0)) or default.chain.max_layers,
            checkpoints=int(setting("keep_checkpoints", default.chain.checkpoints)),
        ),
        timeouts=names.timeouts(),
        since=given.get("since"),
    )


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
    frozen = "not frozen" if report.frozen_ms is None else f"frozen {report.frozen_ms} ms"
    parent = f" on {report.parent}" if report.parent else ""
    output.print_line(
        f"{report.vm} {report.point}: {report.kind}{parent}, {report.consistency}-consistent, "
        f"{frozen}, {units.duration(report.seconds)}"
    )
    output.print_table(("DISK", "KIND", "SIZE>", "COPIED>", "ZEROES>", "UNCHANGED>", "STORED>"), rows)
