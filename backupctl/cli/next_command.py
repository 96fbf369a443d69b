# SPDX-License-Identifier: GPL-2.0-or-later
"""The command to run next, as it is to be typed: with the options that the failed command was given.

The core names a command by what it knows: ``backupctl recover web``. Whoever called it as ``backupctl full
web --qmp unix:/run/web.qmp --repository /backup`` needs the same options there. So each option of the command
line that the next command takes as well is repeated. If it is the same command again, all of them are, with
what the core wants to be different: ``backupctl incremental web --view fleecing``.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import click
from click.core import ParameterSource

from backupctl.cli.invocation import Invocation
from backupctl.errors import (
    BackupctlError,
    DamageFound,
    Locked,
    NeedsRecovery,
    NoSuchPoint,
    RepositoryUnreadable,
)

_WHERE = frozenset(
    {
        *("config", "repository", "qmp", "agent", "plain_tcp", "image", "libvirt", "domain", "scratch"),
        *("command_timeout", "agent_timeout", "stall_timeout"),
    }
)
"""Options that say where VM and repository are: they mean the same in every command."""
_PRINTING = frozenset({"as_json", "quiet"})
_BY_CLASS: dict[type[BackupctlError], str] = {
    NeedsRecovery: "recover",
    Locked: "status",
    DamageFound: "verify",
    RepositoryUnreadable: "verify",
    NoSuchPoint: "list",
}
"""The command that helps after an error whose raiser named none, on the same VM."""


@contextmanager
def added(context: click.Context) -> Iterator[None]:
    """Let the errors of the block name the next command as it is to be typed."""
    try:
        yield
    except BackupctlError as err:
        add_to(err, context)
        raise


def add_to(err: BackupctlError, context: click.Context) -> None:
    """Complete the next command of an error, or name one by the error's class."""
    name = context.params.get("name")
    verb = next((verb for kind, verb in _BY_CLASS.items() if isinstance(err, kind)), "")
    if verb and isinstance(name, str) and not err.hint:
        err.add(next_command=f"backupctl {verb} {name}")
    err.next_command = complete(context, err.next_command)


def complete(context: click.Context, text: str) -> str:
    """Add to a command what it needs of the command line in this context; other texts stay as they are."""
    words = shlex.split(text) if text.startswith("backupctl ") else []
    command, length = _command(context.find_root(), words)
    if command is None:
        return text
    again = command is context.command
    given = _given(context)
    for parameter in command.params:
        name = parameter.name or ""
        if isinstance(parameter, click.Argument) or not (again or name in _WHERE) or name in _PRINTING:
            continue
        flag = max(parameter.opts, key=len)
        if name in given and not set(parameter.opts) & set(words):
            words += _spelt(flag, given[name])
    verbs, rest = words[:length], words[length:]
    return shlex.join([*verbs, *_missing_arguments(context, rest, again=again), *rest])


def _command(root: click.Context, words: Sequence[str]) -> tuple[click.Command | None, int]:
    """Return the command that the words name, None if there is none, and how many words name it."""
    found: click.Command | None = root.command
    length = 1
    while isinstance(found, click.Group) and length < len(words):
        found = found.get_command(root, words[length])
        length += 1
    return (None if isinstance(found, click.Group) else found), length


def _given(context: click.Context) -> dict[str, object]:
    """Return the parameters that were typed, as they were typed, by their names."""
    invocation = Invocation.of(context)
    given = dict(invocation.typed)
    if invocation.config_source is ParameterSource.COMMANDLINE:
        given["config"] = invocation.config_path
    return given


def spelt(command: click.Command, given: Mapping[str, object]) -> list[str]:
    """Return options of a command, as they were typed, as words."""
    flags = {one.name: max(one.opts, key=len) for one in command.params if isinstance(one, click.Option)}
    return [word for name, value in given.items() if name in flags for word in _spelt(flags[name], value)]


def _spelt(flag: str, value: object) -> list[str]:
    if value is True:
        return [flag]
    if isinstance(value, list | tuple):
        return [word for one in value for word in (flag, str(one))]
    return [] if value is False else [flag, str(value)]


def _missing_arguments(context: click.Context, words: list[str], *, again: bool) -> list[str]:
    """Return the arguments that the command was called with, if it is to be called again and names none."""
    if not again or (words and not words[0].startswith("-")):
        return []
    arguments = [one for one in context.command.params if isinstance(one, click.Argument)]
    values = [context.params.get(one.name or "") for one in arguments]
    flat = [one for value in values for one in (value if isinstance(value, tuple) else (value,))]
    return [str(value) for value in flat if value is not None]
