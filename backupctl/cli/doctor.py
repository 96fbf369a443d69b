# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl doctor`."""

from dataclasses import replace
from typing import Any

import click

from backupctl.cli import backup, common, exposure, output
from backupctl.errors import Failed
from backupctl.operations.doctor import run as core
from backupctl.operations.doctor.run import Diagnosis
from backupctl.outcome import documents


@click.command(epilog=common.exit_help(0, 1, 2))
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@common.named()
@click.pass_context
def doctor(context: click.Context, /, **options: Any) -> None:
    """Look for what would make a backup of a VM fail, or may surprise. Changes nothing.

    Looked at are the configuration file and who else could write it, QEMU's tools, the repository's rights
    and room, QEMU's version and monitor, iothreads, disks, the scratch folder's room, the guest agent, and
    what earlier runs have left. What a run will do in the repository, the scratch and the temporary folder is
    tried there, and removed again.
    """
    names = common.from_context(context, options)
    vm, path = names.vm(), names.folder()
    found = core.examine(vm, path, backup.wishes(names, "incremental", {}), names.other_repositories)
    around = (*exposure.configuration(names.config), *exposure.repository(path, vm.name))
    found = replace(found, findings=(*around, *found.findings))
    if options["as_json"]:
        output.print_json(documents.doctor(found, names.config.file))
    else:
        _tell(found)
    if found.bad:
        raise Failed(
            f"a backup of {found.vm} would fail: {len(found.bad)} of {len(found.findings)} findings are bad",
            state="nothing was touched",
            hint="mend what is called bad, then look again",
            next_command=f"backupctl doctor {found.vm}",
        )


def _tell(found: Diagnosis) -> None:
    for one in found.findings:
        head = f"{one.verdict:<8} {one.subject:<11} "
        output.print_wrapped(head, one.said)
        if one.advice:
            output.print_wrapped(" " * len(head), f"({one.advice})")
