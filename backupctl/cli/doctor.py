# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl doctor`."""

from dataclasses import replace
from pathlib import Path

import click

from backupctl.cli import (
    backup,
    common,
    exposure,
    output,
    param_types,
    problem_report,
    restore_test,
    vm_argument,
)
from backupctl.cli.target import Target
from backupctl.errors import UNTOUCHED, Failed
from backupctl.operations.doctor import restore_tests
from backupctl.operations.doctor import run as core
from backupctl.operations.doctor.run import Diagnosis
from backupctl.outcome import documents
from backupctl.progress import counted


@common.command(
    "doctor",
    0,
    1,
    2,
    for_each=True,
    examples=(
        ("Before the first backup, and after a failed one", "backupctl doctor web"),
        ("What to attach to a report of a problem", "backupctl doctor web --report /root/web.tar.gz"),
    ),
)
@click.pass_context
@vm_argument.Named(several=True)
@click.option(
    "--report",
    type=param_types.PATH,
    metavar="FILE",
    help="Also write a tar.gz for a report of a problem, without secrets: versions, settings, points, logs.",
)
@common.json_option
def doctor(target: Target, context: click.Context, *, report: Path | None, as_json: bool) -> None:
    """Check that a VM can be backed up. Changes nothing.

    It checks the configuration file and who else could write it, QEMU's tools, the repository's permissions
    and free space, QEMU's version and monitor, iothreads, disks, the scratch directory's free space, the
    guest agent, and what earlier runs have left behind. What a run will do in the repository, in the scratch
    directory and in the temporary directory is tried there, and removed again. If `run` is to test restores,
    it looks for the QEMU and the firmware for that.
    """
    vm, path = target.vm(), target.directory()
    options = backup.options_of(target, "incremental", backup.configured(context))
    found = core.examine(vm, path, options, target.other_repositories)
    around = (
        *exposure.configuration(target.config),
        *exposure.named_programs(target.config.of(vm.name)),
        *exposure.repository(path, vm.name),
    )
    trial = restore_test.configured(target)
    booted = restore_tests.of_newest(path, vm.name, trial) if target.config.of(vm.name).restore_test else ()
    found = replace(found, findings=(*around, *found.findings, *booted))
    written = problem_report.write(report, target, found) if report else []
    if as_json:
        output.print_json(documents.doctor(found, target.config.file, report))
    else:
        _tell(found)
    if report and not as_json:
        problem_report.tell(report, written)
    if found.bad:
        raise Failed(
            f"a backup of {found.vm} would fail: {len(found.bad)} of {len(found.findings)} checks failed",
            state=UNTOUCHED,
            hint="fix what is marked FAIL, then check again",
            next_command=f"backupctl doctor {found.vm}",
        )


_MARKS = {"ok": "OK", "warning": "WARN", "bad": "FAIL"}


def _tell(found: Diagnosis) -> None:
    width = max(len(one.subject) for one in found.findings)
    for one in found.findings:
        head = f"{_MARKS[one.verdict]:<4}  {one.subject:<{width}}  "
        output.print_wrapped(head, one.said)
        if one.advice:
            output.print_wrapped(" " * len(head), f"({one.advice})")
    if not found.bad:
        warnings = sum(one.verdict == "warning" for one in found.findings)
        also = f", with {counted(warnings, 'warning')}" if warnings else ""
        output.print_line(f"{found.vm} can be backed up{also}.")
