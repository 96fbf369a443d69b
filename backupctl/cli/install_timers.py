# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl install-timers`."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from backupctl.cli import common, completion, configuration, output, param_types
from backupctl.cli.configuration import Config
from backupctl.cli.invocation import Invocation
from backupctl.errors import UNTOUCHED, UsageError
from backupctl.monitoring import exposition
from backupctl.names import VmName, did_you_mean, vm_name
from backupctl.operations.timers import install, units
from backupctl.operations.timers.install import Change
from backupctl.operations.timers.units import Paths, Unit
from backupctl.options import ScratchOptions
from backupctl.outcome import documents
from backupctl.system import trusted


@dataclass(frozen=True)
class TimerArguments:
    """What is asked for. root: the directory that stands for /. program: the backupctl that units call."""

    names: tuple[str, ...]
    each: bool
    uninstall: bool
    force: bool
    root: Path | None
    program: Path | None

    @property
    def directory(self) -> Path:
        """The directory of the units."""
        return (self.root or Path("/")) / install.DIRECTORY.relative_to("/")


@common.command(
    "install-timers",
    0,
    1,
    2,
    examples=(
        ("One timer that backs up all configured VMs", "backupctl install-timers"),
        ("A timer of its own for some of them", "backupctl install-timers web mail"),
        ("What would be written", "backupctl install-timers --each --dry-run"),
        ("Remove what was written", "backupctl install-timers --uninstall"),
    ),
)
@click.pass_context
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=completion.vms)
@click.option("--each", is_flag=True, help="A timer for each configured VM, instead of one for all.")
@click.option("--uninstall", is_flag=True, help="Remove all units that this command wrote.")
@click.option("--force", is_flag=True, help="Replace or remove units that were edited, too.")
@click.option(
    "--root",
    type=param_types.PATH,
    metavar="DIR",
    help="Write below this directory instead of /, to make a package or an image.",
)
@click.option(
    "--program",
    type=param_types.PATH,
    metavar="FILE",
    help=f"The backupctl that the units call. Default: this one; with --root {units.PROGRAM}.",
)
@common.dry_run("Only show which units would be written or removed.")
@common.config_option
@common.json_option
@common.gathered(TimerArguments)
def install_timers(
    context: click.Context,
    asked: TimerArguments,
    /,
    *,
    dry_run: bool,
    config: str | None,  # noqa: ARG001 - noted when it was parsed
    as_json: bool,
) -> None:
    """Write systemd units that back up the VMs of the configuration every night.

    Without NAME one timer backs up all of them. The units let backupctl write only to the repositories and
    scratch directories of the configuration: call the command again when these change. A unit that somebody
    has edited is left alone without --force; `systemctl edit` changes a unit without editing it.

    Nothing is started: the commands that enable the timers are printed.
    """
    timers: Sequence[str] = ()
    if asked.uninstall:
        if asked.names or asked.each:
            raise UsageError("--uninstall removes all units; it takes no NAME and no --each")
        changes = install.plan_removal(asked.directory)
    else:
        wanted, timers = _wanted(Invocation.of(context).config, asked)
        changes = install.plan(asked.directory, wanted)
    if not dry_run:
        install.carry_out(changes, force=asked.force)
        output.done(f"the units in {asked.directory} are written")
    _print(changes, timers, dry_run=dry_run, as_json=as_json)


def _wanted(config: Config, asked: TimerArguments) -> tuple[tuple[Unit, ...], Sequence[str]]:
    """Return the units to write, and the timers to enable. Raises UsageError."""
    program = _program(asked)
    if not config.vms:
        raise UsageError("no VM is configured", state=UNTOUCHED, next_command="backupctl config check")
    if not asked.names and not asked.each:
        return units.for_all(_paths(config, config.vms), program), ("backupctl.timer",)
    for name in asked.names:
        if name not in config.vms:
            hint = did_you_mean(name, config.vms)
            raise UsageError(f"VM {name!r:.120} is not configured", state=UNTOUCHED, hint=hint)
    vms = {vm_name(name): _paths(config, (name,)) for name in asked.names or config.vms}
    return units.for_each(vms, program), [_timer(name) for name in vms]


def _timer(vm: VmName) -> str:
    return units.service(vm).replace(".service", ".timer")


def _paths(config: Config, vms: Sequence[str]) -> Paths:
    """Return where the backups of VMs write. Raises UsageError."""
    written = []
    for vm in vms:
        said = config.of(vm)
        if said.repository is None:
            raise UsageError(
                f"VM {vm!r} has no repository",
                state=UNTOUCHED,
                hint=f"set repository in [vm.{vm}] or [defaults] of {config.path}",
            )
        written.append(param_types.absolute(said.repository))
    for vm in vms:
        scratch = config.of(vm).scratch
        written.append(param_types.absolute(scratch) if scratch else ScratchOptions().directory)
    metrics = config.content.metrics
    if metrics.textfile:
        directory, _ = exposition.file_of(param_types.absolute(metrics.textfile), vms[0])
        written.append(directory)
    if metrics.state:
        written.append(param_types.absolute(metrics.state))
    return Paths(tuple(written), config.path if config.path != configuration.SYSTEM_FILE else None)


def _program(asked: TimerArguments) -> str:
    """Return the program that the units call, which root will run. Raises UsageError."""
    if asked.root:
        return str(asked.program or units.PROGRAM)
    beside = Path(sys.executable).with_name("backupctl")
    found = asked.program or (beside if beside.exists() else shutil.which("backupctl"))
    if found is None:
        raise UsageError("cannot find the program backupctl", state=UNTOUCHED, hint="name it with --program")
    try:
        objection = trusted.objection(Path(found))
    except OSError as err:
        raise UsageError(f"cannot open {found}: {err.strerror}", state=UNTOUCHED) from err
    if objection is not None:
        raise objection
    return str(found)


def _print(changes: Sequence[Change], timers: Sequence[str], *, dry_run: bool, as_json: bool) -> None:
    commands = ["systemctl daemon-reload"]
    if timers:
        commands.append(f"systemctl enable --now {' '.join(timers)}")
    if as_json:
        output.print_json(documents.timers(changes, commands, dry_run=dry_run))
        return
    if not changes:
        output.print_line("no units of backupctl to remove")
        return
    output.print_table(("ACTION", "UNIT"), [(one.action, one.path) for one in changes])
    output.print_line("")
    if dry_run:
        output.print_line("nothing was changed")
        return
    output.print_line("Now run:")
    for line in commands:
        output.print_line(f"  {line}")
