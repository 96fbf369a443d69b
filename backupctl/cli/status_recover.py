# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl status` and `backupctl recover`."""

from pathlib import Path

import click

from backupctl.cancel import Cancellation
from backupctl.cli import backup, bitmaps, common, output, reporters, units, vm_argument
from backupctl.cli.target import Target
from backupctl.events.repository import PointGone
from backupctl.operations import recover as recovery
from backupctl.operations import status as core
from backupctl.operations.running import Running
from backupctl.operations.status import Status
from backupctl.outcome import documents


@common.command(
    "status",
    0,
    1,
    2,
    for_each=True,
    examples=(("What the next incremental will do", "backupctl status web"),),
)
@click.pass_context
@vm_argument.Named(several=True)
@common.json_option
def status(target: Target, context: click.Context, *, as_json: bool) -> None:
    """Show points, bitmaps and leftovers of a VM, and what the next run would do. Changes nothing.

    For a backup that is running it shows the step, the progress and the time left.
    """
    options = backup.options_of(target, "incremental", backup.configured(context))
    found = core.look(target.vm(), target.repository(), options, target.other_repositories)
    if as_json:
        output.print_json(documents.status(found, target.config.file))
    else:
        _show(found, target.config.file, target.directory())


def _show(found: Status, configuration: str | None, repository: Path) -> None:
    points = f"{len(found.points)}, newest {found.points[-1]}" if found.points else "none"
    output.print_wrapped(f"{'vm':<12} ", f"{found.vm}")
    output.print_wrapped(f"{'config':<12} ", f"{configuration or 'none (command line only)'}")
    output.print_wrapped(f"{'qemu':<12} ", f"{found.qemu or found.problem}")
    if found.running is not None:
        _show_running(found.running)
    output.print_wrapped(f"{'points':<12} ", f"{points}")
    for path in found.damaged:
        output.print_wrapped(f"{'damaged':<12} ", f"{path}")
    for point in found.gone:
        output.print_wrapped(f"{'gone':<12} ", PointGone(found.vm, point, repository).text)
    for number, left in enumerate(found.leftovers or ("none",)):
        output.print_wrapped(f"{'' if number else 'leftovers':<12} ", left)
    for tool in found.other_tools:
        output.print_wrapped(f"{'other tools':<12} ", tool.said)
    output.print_wrapped(f"{'next run':<12} ", f"{found.next_run}")
    for gone in found.missing_disks:
        output.print_wrapped(f"{'missing':<12} ", f"{gone}")
    _show_disks(found)
    if found.bitmaps:
        output.print_line("")
        bitmaps.print_table(found.bitmaps)
        for one in found.bitmaps:
            if one.use in ("orphan", "other-vm", "unusable"):
                output.print_line(f"{one.name} on {one.node}: {one.why}")


def _show_disks(found: Status) -> None:
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


def _show_running(run: Running) -> None:
    point = f" of {run.point}" if run.point else ""
    since = f"for {units.duration(run.elapsed_seconds)}"
    output.print_wrapped(f"{'running':<12} ", f"{run.command}{point}, process {run.pid}, {since}")
    place = f"{run.number} of {run.steps}: " if run.number else ""
    output.print_wrapped(f"{'step':<12} ", f"{place}{run.description}")
    if run.total_bytes:
        output.print_wrapped(f"{'progress':<12} ", _progress(run))
    for disk in run.disks:
        about = "about " if disk.estimated else ""
        done, total = units.size(disk.done_bytes), units.size(disk.total_bytes)
        output.print_wrapped(f"{'':<12} ", f"{disk.name}: {done} of {about}{total}")


def _progress(run: Running) -> str:
    about = "about " if run.estimated else ""
    share = 100 * run.done_bytes // run.total_bytes
    text = f"{units.size(run.done_bytes)} of {about}{units.size(run.total_bytes)} ({share} %)"
    if run.rate_bytes is not None:
        text += f", {units.size(run.rate_bytes)}/s"
    return text if run.left_seconds is None else f"{text}, {units.duration(run.left_seconds)} left"


@common.command(
    "recover", 0, 1, 2, 3, 75, for_each=True, examples=(("After a run was killed", "backupctl recover web"),)
)
@vm_argument.Named(several=True)
@common.json_option
def recover(target: Target, *, as_json: bool) -> None:
    """Finish or undo what an earlier run left in the VM. Running it again changes nothing more."""
    vm, cancel = target.vm(), Cancellation()
    with cancel.on_signals(), reporters.reporter() as reporter:
        done = recovery.recover(vm, target.repository(), reporter, cancel, target.scratch, target.timeouts)
    output.done(f"nothing of an earlier run is left in {vm.name}")
    if as_json:
        output.print_json(documents.recover(vm.name, done, reporter.events))
    else:
        output.print_line("Nothing is left of the earlier run." if done.actions else "Nothing to recover.")
