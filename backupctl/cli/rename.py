# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl rename`."""

import click

from backupctl.cli import common, output, param_types, vm_argument
from backupctl.cli.target import Target
from backupctl.names import VmName
from backupctl.operations import remove_vm as core
from backupctl.outcome import documents


@common.command(
    "rename",
    0,
    1,
    2,
    4,
    75,
    examples=(("The points of web become those of www", "backupctl rename web www"),),
)
@vm_argument.Named(needs_vm=False)
@click.argument("new", type=param_types.VM_NAME, metavar="NEW")
@common.dry_run("Only check that it can be renamed.")
@common.json_option
def rename(target: Target, *, new: VmName, dry_run: bool, as_json: bool) -> None:
    """Rename a VM in the repository: its points, chains and bitmaps stay as they are.

    The configuration is not changed: give the VM its new name there, too, or the next run begins anew under
    the old one.
    """
    old = target.vm_name
    renamed = core.rename(target.repository(), old, new, dry_run=dry_run)
    if not dry_run:
        output.done(f"{old} is called {new} in the repository")
    configured = old in target.config.vms
    if as_json:
        now = renamed and not dry_run
        output.print_json(documents.vm_rename(old, new, renamed=now, configured=configured, dry_run=dry_run))
        return
    if dry_run:
        output.print_line(f"{old} would be renamed to {new}; nothing was changed" if renamed else _ALREADY)
    else:
        output.print_line(f"{old} is now {new}" if renamed else _ALREADY)
    if configured:
        output.print_line(f"Rename [vm.{old}] to [vm.{new}] in {target.config.path}, and its timers.")


_ALREADY = "renamed already"
