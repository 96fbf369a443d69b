# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl bitmaps`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from backupctl.cli import common, output, units
from backupctl.errors import Failed, UsageError
from backupctl.operations import bitmaps as core
from backupctl.operations.bitmaps import Removal, StoredBitmap
from backupctl.progress import counted


@click.command(epilog=common.exit_help(0, 1, 2, 75))
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@common.named()
@click.option("--remove", "names", multiple=True, metavar="BITMAP", help="Remove this one; may be repeated.")
@click.option("--remove-repository", "tag", metavar="TAG", help="Remove all bitmaps of this repository tag.")
@click.option("--dry-run", is_flag=True, help="Only show which bitmaps would be removed.")
@click.pass_context
def bitmaps(context: click.Context, /, **options: Any) -> None:
    """List the dirty bitmaps that backupctl made in a VM, or remove those that nothing needs.

    A bitmap that the next incremental is based on is never removed, nor one that backupctl did not make.
    """
    names = common.from_context(context, options)
    vm = names.vm()
    repository = names.repository() if names.has_repository() else None
    wanted, tag = tuple(options["names"]), options["tag"]
    if options["dry_run"] and not (wanted or tag):
        raise UsageError("--dry-run needs --remove or --remove-repository")
    if not (wanted or tag):
        _show(
            vm.name,
            core.look(vm, repository, names.other_repositories, names.timeouts()),
            as_json=options["as_json"],
        )
        return
    known = names.other_repositories
    done = core.remove(vm, repository, known, wanted, tag, names.timeouts(), dry_run=options["dry_run"])
    if not options["dry_run"]:
        output.done(f"removed {counted(len(done.removed), 'bitmap')} from {vm.name}")
    _tell(done, as_json=options["as_json"], dry_run=options["dry_run"])
    if done.left:
        raise Failed(
            f"QEMU did not remove {counted(len(done.left), 'bitmap')}: "
            + "; ".join(f"{one.name} on {one.node}: {why}" for one, why in done.left),
            state="these bitmaps are as they were; the others were removed",
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
        output.print_json({"vm": vm, "bitmaps": [asdict(one) for one in found]})
        return
    if not found:
        output.print_line(f"{vm} has no dirty bitmap of backupctl.")
        return
    print_table(found)
    output.print_line("")
    for one in found:
        output.print_line(f"{one.name} on {one.node}: {one.use}: {one.why}")


def _tell(done: Removal, *, as_json: bool, dry_run: bool) -> None:
    if as_json:
        output.print_json(
            {
                "vm": done.vm,
                "dry_run": dry_run,
                "removed": [] if dry_run else [asdict(one) for one in done.removed],
                "would_remove": [asdict(one) for one in done.removed] if dry_run else [],
                "left": [{**asdict(one), "reason": why} for one, why in done.left],
            }
        )
        return
    for one in done.removed:
        output.print_line(f"{'would remove' if dry_run else 'removed'} {one.name} from {one.node}")
