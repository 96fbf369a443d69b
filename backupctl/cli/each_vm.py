# SPDX-License-Identifier: GPL-2.0-or-later
"""A command about one VM, called for each of several: one after the other, each with its own configuration.

The command line is parsed again for each VM, since what its options are by default is a matter of the VM. An
error for one VM does not stop the others; the worst one decides the exit code.
"""

from collections.abc import Mapping

import click

from backupctl import errors
from backupctl.cli import output
from backupctl.cli.invocation import Invocation
from backupctl.cli.selection import Selection
from backupctl.errors import UNTOUCHED, BackupctlError, Interrupted, UsageError
from backupctl.names import VmName, did_you_mean
from backupctl.outcome import documents
from backupctl.progress import counted

WORDS = "backupctl.words"
"""Where a command's context keeps the words that it was made of."""
_OF_ONE = ("qmp", "agent", "disks", "since", "report")
"""Options that are about one VM."""


def chosen(context: click.Context) -> tuple[VmName, ...]:
    """Return the VMs that are named, all of which are configured. Raises UsageError."""
    invocation = Invocation.of(context)
    known = invocation.config.vms
    if option := next((name for name in _OF_ONE if invocation.typed.get(name)), None):
        raise UsageError(f"--{option.removesuffix('s')} is about one VM, so name only one", state=UNTOUCHED)
    found = invocation.selection.of(known)
    if strangers := [name for name in found if name not in known]:
        raise UsageError(
            f"not configured: {', '.join(strangers)} (VMs: {', '.join(sorted(known)) or 'none'})",
            state=UNTOUCHED,
            hint=did_you_mean(strangers[0], known),
        )
    if not found:
        raise UsageError("no VM is configured", state=UNTOUCHED, next_command="backupctl config check")
    return found


def call(command: click.Command, context: click.Context) -> None:
    """Call a command for each VM that is named. Raises the worst error, after the last VM; Interrupted."""
    invocation = Invocation.of(context)
    told: list[documents.Document] = []
    failed: dict[VmName, BackupctlError] = {}
    names = chosen(context)
    for vm in names:
        if not invocation.as_json:
            output.print_line(f"{vm}:")
        report, err = _call_one(command, context, vm)
        told.append(documents.of_each(vm, report, err))
        if err is not None:
            failed[vm] = err
            output.print_error(err.reworded(f"{vm}: {err.message}"), as_json=False)
        if isinstance(err, Interrupted):
            break
    if invocation.as_json:
        output.print_json(documents.each(told))
    if failed:
        raise summary(failed, len(names))


def summary(failed: Mapping[VmName, BackupctlError], number: int) -> BackupctlError:
    """Return the error to end with after that of each VM was printed. number: of all VMs."""
    found = errors.worst(list(failed.values()))
    found = found.reworded(f"{len(failed)} of {counted(number, 'VM')} failed: {', '.join(failed)}")
    found.step, found.state, found.hint = "", "the state of each is reported above; the others are done", ""
    return found


def _call_one(
    command: click.Command, context: click.Context, vm: VmName
) -> tuple[object, BackupctlError | None]:
    """Call it for one VM; return its document, None without one, and its error."""
    invocation = Invocation.of(context)
    invocation.only = Selection((vm,))
    with output.keeping_documents() as kept:
        try:
            with command.make_context(
                context.info_name, list(context.meta[WORDS]), parent=context.parent
            ) as own:
                command.invoke(own)
        except BackupctlError as err:
            return (kept[0] if kept else None), err
        finally:
            invocation.only = None
    return (kept[0] if kept else None), None
