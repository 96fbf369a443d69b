# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl config check` and `backupctl config show`."""

import os
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import click
import msgspec
from click.core import ParameterSource

from backupctl.cli import (
    backup,
    common,
    configuration,
    output,
    prune,
    restore_test,
    run,
    settings,
    vm_argument,
)
from backupctl.cli import check as thresholds
from backupctl.cli.configuration import Config
from backupctl.cli.help import Group
from backupctl.cli.invocation import Invocation
from backupctl.cli.target import Target
from backupctl.errors import UsageError
from backupctl.progress import counted
from backupctl.system.log import HIDDEN

Source = Literal["command line", "environment", "file", "default"]
_SOURCES: dict[ParameterSource | None, Source] = {
    ParameterSource.COMMANDLINE: "command line",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.DEFAULT_MAP: "file",
}


_PROGRAMS = {
    "QEMU_IMG": "qemu-img",
    "QEMU_STORAGE_DAEMON": "qemu-storage-daemon",
    "QEMU_SYSTEM": "qemu-system-x86_64",
}


@click.group(
    "config",
    cls=Group,
    exit_codes=common.exit_codes(0, 2),
    examples=(
        ("Every mistake in the file", "backupctl config check"),
        ("The settings in force for a VM", "backupctl config show web"),
    ),
)
def config() -> None:
    """Check the configuration, or show the settings in force and where they come from."""


@config.command(
    "check",
    cls=common.Command,
    exit_codes=common.exit_codes(0, 2),
    examples=(("Before it is put in place", "backupctl config check --config ./backupctl.toml"),),
)
@common.config_option
@common.json_option
@click.pass_context
def check(context: click.Context, config: str | None, *, as_json: bool) -> None:  # noqa: ARG001 - noted when it was parsed
    """Report every mistake in the configuration file, with its line."""
    found = configuration.examine(Invocation.of(context).config_path)
    if as_json:
        output.print_json(
            {
                "configuration": found.file,
                "ok": not found.mistakes,
                "vms": list(found.vms),
                "mistakes": [{"line": one.line or None, "message": one.message} for one in found.mistakes],
            }
        )
    elif found.file:
        for one in found.mistakes:
            output.print_line(f"{found.file}:{one.line}: {one.message}")
    if found.mistakes:
        raise UsageError(
            f"{counted(len(found.mistakes), 'mistake')} in {found.file}",
            hint="no command runs until all are fixed",
        )
    if not as_json:
        output.print_line(
            f"{found.file}: no mistakes, {counted(len(found.vms), 'VM')}"
            if found.file
            else "no configuration file found; commands use the command line only"
        )


@dataclass(frozen=True)
class Setting:
    """One setting in force. value: None if it is not set. file, line: where it stands, if in a file."""

    name: str
    value: Any
    source: Source
    file: str | None = None
    line: int | None = None


@config.command(
    "show",
    cls=common.Command,
    exit_codes=common.exit_codes(0, 2),
    examples=(
        ("What an incremental of a VM would use", "backupctl config show web"),
        ("Which settings hold for every VM", "backupctl config show"),
    ),
)
@click.pass_context
@vm_argument.Named(optional=True, defaults_for_all=True)
@backup.run_options(incremental=True)
@prune.rule_options
@thresholds.threshold_options
@run.run_options
@restore_test.trial_options
@common.json_option
def show(target: Target, context: click.Context, /, *, as_json: bool, **_options: Any) -> None:
    """Show the settings in force for a VM, and where each comes from.

    Without NAME: those for any VM. Options given here override, as they do for the commands that take them.
    """
    reached = target.qmp or target.image or target.libvirt
    if target.name and target.name not in target.config.vms and not reached:
        target.vm()  # which says that it is not configured
    found = list(_settings(context, target))
    if as_json:
        output.print_json({"vm": target.name, "settings": [asdict(one) for one in found]})
        return
    output.print_table(
        ("SETTING", "VALUE", "FROM"), [(one.name, _shown(one.value), _place(one)) for one in found]
    )


def _settings(context: click.Context, target: Target) -> Iterator[Setting]:
    yield _file(Invocation.of(context), target.config)
    for name in (*settings.settable(), *settings.settable_for_run()):
        yield _setting(context, target, name)
    yield from _tables(target)
    for name, program in _PROGRAMS.items():
        named = os.environ.get(name)
        yield Setting(name, named or program, "environment" if named else "default")


def _file(invocation: Invocation, config: Config) -> Setting:
    return Setting("configuration", config.file, _SOURCES.get(invocation.config_source, "default"))


def _setting(context: click.Context, target: Target, name: str) -> Setting:
    """Return one setting, its value as it was written."""
    of_run = name in settings.settable_for_run()
    place = target.config.content.run if of_run else target.config.of(target.name)
    configured = getattr(place, name, None)
    source = _SOURCES.get(context.get_parameter_source(name), "default")
    if source == "command line":
        return Setting(name, Invocation.of(context).typed[name], source)
    if configured:  # a 0 is as if it was not set, and disks are no option
        return Setting(name, configured, "file", target.config.file, target.config.line(target.name, name))
    default = context.params.get(name) if context.params.get(name) != () else None
    return Setting(name, str(default) if isinstance(default, Path) else default, "default")


def _tables(target: Target) -> Iterator[Setting]:
    """Yield what is set for metrics, hooks and notices. A URL is a secret: only its host is shown."""
    of_vm = target.config.of(target.name)
    tables = {"metrics": target.config.content.metrics, "hooks": of_vm.hooks, "notify": of_vm.notify}
    for table, said in tables.items():
        for name, value in msgspec.to_builtins(said).items():
            line = target.config.line(target.name, name, table)
            yield Setting(f"{table}.{name}", _redacted(name, value), "file", target.config.file, line)


def _redacted(name: str, value: Any) -> Any:
    if name not in settings.SECRETS:
        return value
    parts = urlsplit(value)
    return f"{parts.scheme}://{parts.hostname}/{HIDDEN}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{disk} = {stored}" for disk, stored in value.items())
    if isinstance(value, list | tuple):
        return shlex.join(map(str, value))
    return "-" if value is None else str(value)


def _place(one: Setting) -> str:
    return f"{one.file}:{one.line}" if one.source == "file" else one.source
