# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl status` and `backupctl recover`."""

from typing import Any

import click

from backupctl.cancel import Cancellation
from backupctl.cli import bitmaps, common, output, reporters, units
from backupctl.operations import recover as recovery
from backupctl.operations import status as core
from backupctl.options import ChainOptions, RunOptions, ScratchOptions
from backupctl.outcome import documents


@click.command(epilog=common.exit_help(0, 1, 2))
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@common.named()
@click.pass_context
def status(context: click.Context, /, **options: Any) -> None:
    """Show points, bitmaps and leftovers of a VM, and what the next run would do. Changes nothing."""
    names = common.from_context(context, options)
    wanted = {"on_broken": "on_broken_chain", "max_layers": "max_chain"}
    settings = {name: names.config.setting(names.name, key) for name, key in wanted.items()}
    chain = ChainOptions(**{name: value for name, value in settings.items() if value})
    scratch = ScratchOptions(names.scratch())
    run = RunOptions("incremental", scratch=scratch, chain=chain, timeouts=names.timeouts())
    found = core.look(names.vm(), names.repository(), run, names.other_repositories)
    if options["as_json"]:
        output.print_json(documents.status(found, names.config.file))
        return
    points = f"{len(found.points)}, newest {found.points[-1]}" if found.points else "none"
    output.print_wrapped(f"{'vm':<12} ", f"{found.vm}")
    output.print_wrapped(f"{'config':<12} ", f"{names.config.file or 'none (command line only)'}")
    output.print_wrapped(f"{'qemu':<12} ", f"{found.qemu or found.problem}")
    output.print_wrapped(f"{'points':<12} ", f"{points}")
    for path in found.damaged:
        output.print_wrapped(f"{'damaged':<12} ", f"{path}")
    for number, left in enumerate(found.leftovers or ("none",)):
        output.print_wrapped(f"{'' if number else 'leftovers':<12} ", left)
    output.print_wrapped(f"{'next run':<12} ", f"{found.next_run}")
    for gone in found.missing_disks:
        output.print_wrapped(f"{'missing':<12} ", f"{gone}")
    if found.disks:
        output.print_line("")
        output.print_table(
            ("DISK", "NODE", "SIZE>", "BITMAP", "NEXT"),
            [
                (disk.name, disk.node, units.size(disk.size), disk.bitmap_state, disk.next)
                for disk in found.disks
            ],
        )
        for disk in found.disks:
            if disk.reason:
                output.print_line(f"{disk.name}: {disk.reason}")
    if found.bitmaps:
        output.print_line("")
        bitmaps.print_table(found.bitmaps)
        for one in found.bitmaps:
            if one.use in ("orphan", "other-vm", "unusable"):
                output.print_line(f"{one.name} on {one.node}: {one.why}")


@click.command(epilog=common.exit_help(0, 1, 2, 3, 75))
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@common.named()
@click.pass_context
def recover(context: click.Context, /, **options: Any) -> None:
    """Finish or undo what an earlier run left in the VM. Doing it again does nothing more."""
    names = common.from_context(context, options)
    vm, cancel = names.vm(), Cancellation()
    with cancel.on_signals(), reporters.reporter() as reporter:
        done = recovery.recover(vm, names.repository(), reporter, cancel, names.scratch(), names.timeouts())
    output.done(f"nothing of an earlier run is left in {vm.name}")
    if options["as_json"]:
        output.print_json(documents.recover(vm.name, done, reporter.events))
    else:
        output.print_line("recovered" if done.actions else "Nothing to recover.")
