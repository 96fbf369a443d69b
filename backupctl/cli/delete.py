# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl delete`."""

from dataclasses import dataclass

import click

from backupctl.cancel import Cancellation
from backupctl.cli import common, completion, output, param_types, reporters, units, vm_argument
from backupctl.cli.target import Target
from backupctl.errors import DamageFound
from backupctl.operations import delete as core
from backupctl.operations.delete import Deletion, Permissions
from backupctl.outcome import documents
from backupctl.progress import counted


@dataclass(frozen=True)
class DeleteArguments:
    """What is asked of a delete."""

    points: tuple[str, ...]
    protected: bool
    newest: bool
    dry_run: bool
    as_json: bool


@common.command(
    "delete",
    0,
    1,
    2,
    4,
    75,
    examples=(
        ("What deleting two points would free", "backupctl delete web 20261123T04 20261124T04 --dry-run"),
        ("One point, which is protected", "backupctl delete web 20261123T041500Z --protected"),
    ),
)
@vm_argument.Named(needs_vm=False)
@click.argument(
    "points",
    nargs=-1,
    required=True,
    type=param_types.POINT_ID,
    metavar="POINT...",
    shell_complete=completion.point_ids,
)
@click.option("--protected", is_flag=True, help="Delete points that are protected, too.")
@click.option(
    "--newest",
    is_flag=True,
    help="Delete the newest point of a disk, too: the next incremental then reads all of that disk, unless "
    "the VM keeps the bitmap of the point before (--keep-checkpoints).",
)
@common.dry_run("Only show which points would be deleted, and what that would free.")
@common.json_option
@common.gathered(DeleteArguments)
def delete(target: Target, asked: DeleteArguments) -> None:
    """Delete recovery points of a VM. Each POINT is an id or the beginning of one, never `latest`.

    What other points depend on is merged into them, as prune does; all others stay complete. The VM is not
    touched. After a crash the same command continues.
    """
    directory = target.vm_directory()
    may = Permissions(asked.protected, asked.newest)
    if asked.dry_run:
        _tell(target, core.plan(directory, asked.points, may), asked)
        return
    stop = Cancellation()
    with stop.on_signals(), reporters.reporter() as reporter:
        done = core.delete(directory, asked.points, may, reporter, stop)
    output.done(f"{counted(len(done.points), 'point')} of {target.name} deleted")
    _tell(target, done, asked)
    if done.damage:
        raise DamageFound("; ".join(done.damage), next_command=f"backupctl verify {target.name}")


def _tell(target: Target, done: Deletion, asked: DeleteArguments) -> None:
    if asked.as_json:
        output.print_json(documents.deletion(target.vm_name, done, dry_run=asked.dry_run))
        return
    for point in done.already:
        output.print_line(f"{target.name} {point}: deleted already")
    for point in done.points:
        output.print_line(f"{target.name} {point}: {'would be deleted' if asked.dry_run else 'deleted'}")
    if asked.dry_run:
        for disk, _ in done.newest:
            output.print_line(f"{disk}: the next incremental would read all of the disk")
    freed = "an unknown amount" if done.freed_bytes is None else units.size(max(done.freed_bytes, 0))
    said = f"would free about {freed}; nothing was changed" if asked.dry_run else f"freed {freed}"
    output.print_line(said)
