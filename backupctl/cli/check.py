# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl check`: a plugin for Nagios, Icinga and their like.

Its exit codes are those of such plugins, and of no other command: an error that elsewhere is a 2 is a 3 here.
See https://www.monitoring-plugins.org/doc/guidelines.html.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from backupctl.cli import common, completion, monitored, output, param_types
from backupctl.cli.common import Declared
from backupctl.cli.configuration import Config
from backupctl.cli.invocation import Invocation
from backupctl.cli.selection import Selection
from backupctl.cli.target import Target
from backupctl.errors import BackupctlError, DamageFound, UsageError
from backupctl.monitoring import memory
from backupctl.names import vm_name
from backupctl.operations import check as core
from backupctl.operations.check import Finding, Level, Limits, Verdict
from backupctl.operations.prune import retention
from backupctl.repository.repository import Repository

DEFAULT_MAX_AGE = "26h"
_CODES = {
    Level.OK: "OK: every VM has a recent, sound recovery point",
    Level.WARNING: "WARNING: older than --warn-age, or the last command failed",
    Level.CRITICAL: "CRITICAL: older than --max-age, missing, or damaged",
    Level.UNKNOWN: "UNKNOWN: wrong use or configuration, or what could not be read",
}
_MOST_NAMED = 10
_MOST_FINDINGS = 3
_MOST_CHARACTERS = 300  # of a finding: some monitoring systems cut a line at 1024 bytes


class PluginCommand(common.Command):
    """A command that ends in one line and one of four exit codes, whatever happens."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parse the command line."""
        made = super().make_context
        found: click.Context = _answered(lambda: made(info_name, args, parent, **extra))
        return found

    def invoke(self, ctx: click.Context) -> Any:
        """Call the command."""
        called = super().invoke
        return _answered(lambda: called(ctx))


def _answered(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (click.exceptions.Exit, click.Abort):
        raise
    except click.ClickException as err:
        why = err.format_message()
    except BackupctlError as err:
        why = err.message
    except Exception as err:  # noqa: BLE001 - a traceback would be a WARNING, as its exit code is 1
        why = f"an error in backupctl itself: {type(err).__name__}: {err}"
    _print(Level.UNKNOWN, why)
    raise SystemExit(Level.UNKNOWN.value)


def _print(level: Level, text: str, data: str = "") -> None:
    """Print the one line. data: performance data, which begin behind the first `|`."""
    output.print_line(f"BACKUPCTL {level.name} - {text.replace('|', '/')}{f' | {data}' if data else ''}")


def threshold_options(command: Declared) -> Declared:
    """Give a command the options that say how old the newest point may be."""
    command = click.option(
        "--warn-age",
        type=param_types.DURATION,
        metavar="DURATION",
        default=None,
        help="Warn if the newest point is older than this.",
    )(command)
    return click.option(
        "--max-age",
        type=param_types.DURATION,
        metavar="DURATION",
        default=DEFAULT_MAX_AGE,
        show_default=True,
        help="Critical if the newest point is older than this: 26h, 8d.",
    )(command)


@click.command(
    "check",
    cls=PluginCommand,
    exit_codes={code.value: text for code, text in _CODES.items()},
    examples=(
        ("All VMs of the configuration, by their own limits", "backupctl check"),
        ("One VM that is backed up every night", "backupctl check web --max-age 26h --warn-age 25h"),
    ),
)
@click.pass_context
@click.argument("names", metavar="[NAME]...", nargs=-1, shell_complete=completion.vms)
@click.option("--all", "everything", is_flag=True, help="Every VM of the configuration; so is no NAME.")
@threshold_options
@click.option("--repository", type=param_types.PATH, metavar="DIR", help="The repository's directory.")
@common.config_option
def check(context: click.Context, /, names: tuple[str, ...], **_options: Any) -> None:
    """Check that the newest recovery point is recent and sound, and none is missing, for Nagios or Icinga.

    The VM is not needed, and no stored data is read: `verify` does that. It prints one line, with the age of
    the newest point in seconds as performance data. Its exit codes are those of monitoring plugins, and
    differ from those of all other commands.
    """
    given = _Given.of(context)
    chosen = Selection(names, bool(context.params["everything"]))
    _report([given.checked(vm) for vm in given.vms(chosen)])


@dataclass(frozen=True)
class _Given:
    """What the command line says. max_age, warn_age: None if they were not typed."""

    config: Config
    repository: Path | None
    max_age: str | None
    warn_age: str | None

    @classmethod
    def of(cls, context: click.Context) -> "_Given":
        """Take it out of a context."""

        def typed(name: str) -> str | None:
            given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
            return context.params[name] if given else None

        config = Invocation.of(context).config
        return cls(config, context.params["repository"], typed("max_age"), typed("warn_age"))

    def vms(self, chosen: Selection) -> Sequence[str]:
        """Return the VMs that are meant. Raises UsageError, RepositoryError."""
        known = Repository.open(self.repository).vms() if self.repository else self.config.vms
        vms = known if chosen.is_empty else chosen.of(known)
        if not vms:
            raise UsageError("no VM is configured or named, so there is nothing to check")
        return vms

    def checked(self, vm: str) -> "_Checked":
        """Check one VM. That it cannot be done for one must not hide what another one's verdict is."""
        limits = self._limits(vm)
        try:
            target = self._target(vm)
        except BackupctlError as err:
            return _Checked(Verdict(vm, (Finding(Level.UNKNOWN, err.message),)), limits)
        try:
            directory = target.vm_directory()
        except BackupctlError as err:  # most likely a file system that is not mounted
            return _Checked(core.refused(vm, err), limits)
        verdict = core.examine(directory, limits, datetime.now(UTC))
        return _Checked(verdict.also(*remembered(target)), limits)

    def _target(self, vm: str) -> Target:
        """Return where the points of a VM are. Raises UsageError, InvalidName."""
        typed = self.repository is not None
        target = Target(self.config, vm_name(vm), self.repository, typed_repository=typed).of(vm)
        if not typed and vm not in self.config.vms:
            target.vm()  # which says that it is not configured
        target.directory()  # which says that it has no repository
        return target

    def _limits(self, vm: str) -> Limits:
        configured = self.config.of(vm)
        warning = self.warn_age or configured.warn_age
        critical = self.max_age or configured.max_age or DEFAULT_MAX_AGE
        return Limits(retention.duration(critical), retention.duration(warning) if warning else None)


def remembered(target: Target) -> Iterator[Finding]:
    """Yield what the last commands on a VM found, if that is remembered."""
    if not monitored.is_remembered(target):
        return
    known = memory.read(monitored.state_directory(target.config), target.vm_name, str(target.directory()))
    for past in (known.backup, known.verify, known.prune):
        if past.last and past.last.reason:
            ended = datetime.fromtimestamp(past.last.ended, UTC)
            text = f"the {past.last.command} of {ended:%Y-%m-%d %H:%M} UTC failed ({past.last.reason})"
            damage = past is known.verify and past.last.reason == DamageFound.code
            yield Finding(Level.CRITICAL if damage else Level.WARNING, text)


@dataclass(frozen=True)
class _Checked:
    """The verdict on one VM, and the limits that it was measured by."""

    verdict: Verdict
    limits: Limits

    def data(self, label: str) -> str:
        """Return the performance data, "" if there is no age."""
        if self.verdict.age_seconds is None:
            return ""
        limits = [one.total_seconds() if one else None for one in (self.limits.warning, self.limits.critical)]
        warning, critical = ("" if one is None else f"{one:.0f}" for one in limits)
        return f"'{label}'={self.verdict.age_seconds:.0f}s;{warning};{critical};0"


def _report(checked: Sequence[_Checked]) -> None:
    verdicts = [one.verdict for one in checked]
    level = core.worst(one.level for one in verdicts)
    alone = len(checked) == 1
    data = (one.data("age" if alone else f"{one.verdict.vm}_age") for one in checked)
    _print(level, _text(verdicts, level), " ".join(filter(None, data)))
    raise SystemExit(level.value)


def _text(verdicts: Sequence[Verdict], level: Level) -> str:
    if len(verdicts) == 1:
        return f"{verdicts[0].vm}: {_findings(verdicts[0])}"
    if level is Level.OK:
        return f"{len(verdicts)} VMs, each with a recent, sound recovery point"
    bad = sorted((one for one in verdicts if one.level), key=lambda one: one.level is not level)
    more = f"; and {len(bad) - _MOST_NAMED} more" if len(bad) > _MOST_NAMED else ""
    named = "; ".join(f"{one.vm}: {_findings(one)}" for one in bad[:_MOST_NAMED])
    return f"{len(bad)} of {len(verdicts)} VMs: {named}{more}"


def _findings(verdict: Verdict) -> str:
    found = [one for one in verdict.findings if one.level or not verdict.level]
    more = f" (and {len(found) - _MOST_FINDINGS} more)" if len(found) > _MOST_FINDINGS else ""
    return ", ".join(one.text[:_MOST_CHARACTERS] for one in found[:_MOST_FINDINGS]) + more
