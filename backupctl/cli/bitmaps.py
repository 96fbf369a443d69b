# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl bitmaps`."""

from collections.abc import Sequence

import click

from backupctl.cli import common, output, units, vm_argument
from backupctl.cli.target import Target
from backupctl.errors import Failed, UsageError
from backupctl.operations import bitmaps as core
from backupctl.operations.bitmaps import Removal, StoredBitmap
from backupctl.outcome import documents
from backupctl.progress import counted


@common.command(
    "bitmaps",
    0,
    1,
    2,
    75,
    examples=(
        ("All bitmaps, and what each is for", "backupctl bitmaps web"),
        (
            "What would be removed of a repository that no longer exists",
            "backupctl bitmaps web --remove-repository 0123abcd --dry-run",
        ),
    ),
)
@vm_argument.Named()
@click.option("--remove", "names", multiple=True, metavar="BITMAP", help="Remove this one; may be repeated.")
@click.option("--remove-repository", "tag", metavar="TAG", help="Remove all bitmaps of this repository tag.")
@common.dry_run("Only show which bitmaps would be removed.")
@common.json_option
def bitmaps(target: Target, *, names: tuple[str, ...], tag: str | None, dry_run: bool, as_json: bool) -> None:
    """List the dirty bitmaps that backupctl created in a VM, or remove those that are not needed.

    It never removes a bitmap that the next incremental is based on, nor one that backupctl did not create.
    """
    vm = target.vm()
    repository = target.repository() if target.has_repository() else None
    if dry_run and not (names or tag):
        raise UsageError("--dry-run needs --remove or --remove-repository")
    if not (names or tag):
        _show(vm.name, core.look(vm, repository, target.other_repositories, target.timeouts), as_json=as_json)
        return
    unwanted = core.Unwanted(names, tag)
    done = core.remove(vm, repository, target.other_repositories, unwanted, target.timeouts, dry_run=dry_run)
    if not dry_run:
        output.done(f"removed {counted(len(done.removed), 'bitmap')} from {vm.name}")
    _tell(done, as_json=as_json, dry_run=dry_run)
    if done.left:
        raise Failed(
            f"QEMU did not remove {counted(len(done.left), 'bitmap')}: "
            + "; ".join(f"{one.name} on {one.node}: {why}" for one, why in done.left),
            state="these bitmaps are unchanged; the others were removed",
            next_command=f"backupctl bitmaps {vm.name}",
        )


def print_table(found: Sequence[StoredBitmap]) -> None:
    """Write the table of bitmaps."""
    output.print_table(
        ("POINT", "DISK", "REPOSITORY", "NODE", "GRANULARITY>", "DIRTY>", "USE"),
        [
            (
                one.point or "-",
                one.disk or "-",
                "this" if one.this_repository else one.repository,
                one.node,
                units.size(one.granularity),
                units.size(one.dirty_bytes),
                one.use + (", read-only" if one.read_only else ""),
            )
            for one in found
        ],
    )


def _show(vm: str, found: Sequence[StoredBitmap], *, as_json: bool) -> None:
    if as_json:
        output.print_json(documents.bitmaps(vm, found))
        return
    if not found:
        output.print_line(f"{vm} has no dirty bitmaps made by backupctl.")
        return
    print_table(found)
    output.print_line("")
    for one in found:
        output.print_line(f"{one.name} on {one.node}: {one.use}: {one.why}")


def _tell(done: Removal, *, as_json: bool, dry_run: bool) -> None:
    if as_json:
        output.print_json(documents.bitmaps_removed(done, dry_run=dry_run))
        return
    for one in done.removed:
        output.print_line(f"{'would remove' if dry_run else 'removed'} {one.name} from {one.node}")
