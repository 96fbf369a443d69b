# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl remove`."""

import sys
from dataclasses import dataclass

import click

from backupctl.cli import common, output, units, vm_argument
from backupctl.cli.target import Target
from backupctl.errors import UNTOUCHED, Interrupted, UsageError
from backupctl.operations import remove_vm as core
from backupctl.operations.remove_vm import RemovalAllowed, VmRemoval
from backupctl.outcome import documents
from backupctl.progress import counted


@dataclass(frozen=True)
class RemoveArguments:
    """What is asked of a remove."""

    protected: bool
    discard_unfinished: bool
    yes: bool
    dry_run: bool
    as_json: bool


@common.command(
    "remove",
    0,
    1,
    2,
    75,
    examples=(
        ("What would be removed", "backupctl remove web --dry-run"),
        ("From a script, without being asked", "backupctl remove web --yes"),
    ),
)
@vm_argument.Named(needs_vm=False)
@click.option("--protected", is_flag=True, help="Remove protected points, too.")
@click.option(
    "--discard-unfinished",
    is_flag=True,
    help="Discard a run that did not end. Use it only if the VM no longer exists; `recover` comes first.",
)
@click.option("--yes", is_flag=True, help="Do not ask; needed where there is no terminal.")
@common.dry_run("Only show what would be removed.")
@common.json_option
@common.gathered(RemoveArguments)
def remove(target: Target, asked: RemoveArguments) -> None:
    """Remove a VM from the repository: all of its recovery points. The VM itself is not touched.

    After a crash the same command continues. Bitmaps of the points stay in the VM until `recover` removes
    them.
    """
    directory = target.vm_directory()
    may = RemovalAllowed(asked.protected, asked.discard_unfinished)
    planned = core.plan(directory, may)
    if asked.dry_run:
        _tell(target, planned, asked)
        return
    if not asked.yes:
        _ask(planned, asked)
    done = core.remove(directory, may)
    output.done(f"{done.vm} is removed from the repository")
    _tell(target, done, asked)


def _ask(planned: VmRemoval, asked: RemoveArguments) -> None:
    """Ask on the terminal. Raises Interrupted if the answer is no, UsageError without a terminal."""
    if asked.as_json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError("remove needs --yes where it cannot ask", state=UNTOUCHED)
    if not click.confirm(f"Remove {_what(planned)}?", err=True):
        raise Interrupted("not confirmed", state=UNTOUCHED)


def _tell(target: Target, done: VmRemoval, asked: RemoveArguments) -> None:
    if asked.as_json:
        output.print_json(documents.vm_removal(done, dry_run=asked.dry_run))
        return
    if asked.dry_run:
        output.print_line(f"{_what(done)} would be removed; nothing was changed")
        return
    output.print_line(f"removed {_what(done)}")
    if done.vm in target.config.vms:
        output.print_line(
            f"{done.vm} is still in {target.config.path}: remove it there, or its next run is a full. "
            f"Bitmaps may be left in the VM; `backupctl recover {done.vm}` removes them."
        )


def _what(done: VmRemoval) -> str:
    text = f"all {counted(len(done.points), 'point')} of {done.vm}, {units.size(done.freed_bytes)}"
    protected = f", {len(done.protected)} of them protected" if done.protected else ""
    return text + protected
