# SPDX-License-Identifier: GPL-2.0-or-later
"""The command to run next, as it is to be typed: with the options that the failed command was given.

The core names a command by what it knows: ``backupctl recover web``. Whoever called it as ``backupctl full
web --qmp unix:/run/web.qmp --repository /backup`` needs the same options there. So each option of the command
line that the next command takes as well is repeated. If it is the same command again, all of them are, with
what the core wants to be different: ``backupctl incremental web --view fleecing``.
"""

import shlex

import click
from click.core import ParameterSource

from backupctl.errors import (
    BackupctlError,
    DamageFound,
    Locked,
    NeedsRecovery,
    NoSuchPoint,
    RepositoryUnreadable,
)

_WHERE = frozenset({"config", "repository", "qmp", "agent", "scratch"})
"""Options that say where VM and repository are: they mean the same in every command."""
_SAYING = frozenset({"as_json", "quiet"})
_BY_CLASS: dict[type[BackupctlError], str] = {
    NeedsRecovery: "recover",
    Locked: "status",
    DamageFound: "verify",
    RepositoryUnreadable: "verify",
    NoSuchPoint: "list",
}
"""What gets on after an error whose raiser named nothing, on the same VM."""


def add_to(err: BackupctlError, context: click.Context) -> None:
    """Have an error name the next command as it is to be typed."""
    name = context.params.get("name")
    verb = next((verb for kind, verb in _BY_CLASS.items() if isinstance(err, kind)), "")
    if verb and isinstance(name, str) and not err.hint:
        err.add(next_command=f"backupctl {verb} {name}")
    err.next_command = complete(context, err.next_command)


def complete(context: click.Context, text: str) -> str:
    """Add to a command what it needs of the command line in this context; other texts stay as they are."""
    root = context.find_root()
    if not text.startswith("backupctl ") or not isinstance(root.command, click.Group):
        return text
    words = shlex.split(text)
    command = root.command.get_command(root, words[1])
    if command is None:
        return text
    again = command.name == context.command.name
    given = _given(context, root)
    for parameter in command.params:
        name = parameter.name or ""
        if isinstance(parameter, click.Argument) or not (again or name in _WHERE) or name in _SAYING:
            continue
        flag = max(parameter.opts, key=len)
        if name in given and not set(parameter.opts) & set(words):
            words += _spelt(flag, given[name])
    return shlex.join([*words[:2], *_missing_arguments(context, words[2:], again=again), *words[2:]])


def _given(context: click.Context, root: click.Context) -> dict[str, object]:
    """Return the options that were typed, by their names."""
    return {
        name: value
        for one in (root, context)
        for name, value in one.params.items()
        if one.get_parameter_source(name) is ParameterSource.COMMANDLINE and value is not None
    }


def _spelt(flag: str, value: object) -> list[str]:
    if value is True:
        return [flag]
    if isinstance(value, tuple):
        return [word for one in value for word in (flag, str(one))]
    return [] if value is False else [flag, str(value)]


def _missing_arguments(context: click.Context, words: list[str], *, again: bool) -> list[str]:
    """Return the arguments that the command was called with, if it is to be called again and names none."""
    if not again or (words and not words[0].startswith("-")):
        return []
    arguments = [one for one in context.command.params if isinstance(one, click.Argument)]
    values = [context.params.get(one.name or "") for one in arguments]
    return [str(value) for value in values if value is not None]
