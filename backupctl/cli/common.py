# SPDX-License-Identifier: GPL-2.0-or-later
"""What the commands share: their class, their exit codes, and options that many have."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import click

from backupctl import errors
from backupctl.cli import (
    configuration,
    each_vm,
    next_command,
)
from backupctl.cli.help import Documented
from backupctl.cli.invocation import Invocation
from backupctl.errors import (
    BackupctlError,
    DamageFound,
    Failed,
    Locked,
    NeedsRecovery,
    UsageError,
)
from backupctl.options import RunOptions

Declared = TypeVar("Declared", bound=Callable[..., Any])

DEFAULTS = RunOptions(kind="incremental")
CONFIG_HELP = (
    "The configuration file; must belong to you or to root. Default: the first that exists of "
    f"${configuration.ENVIRONMENT}, ~/.config/backupctl/{configuration.FILE_NAME}, "
    f"{configuration.SYSTEM_FILE}."
)


class Command(Documented):
    """A command whose errors name the next one with all the options that it needs.

    for_each: it is about one VM, and called for each of them if several are named.
    """

    def __init__(self, *arguments: Any, for_each: bool = False, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.for_each = for_each

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse. Options stay known as they were typed, and NAME finds --config wherever that was typed."""
        if ctx.resilient_parsing and args and args[-1].startswith("-"):
            args = args[:-1]  # its value is to be completed; without one, click would parse nothing
        ctx.meta[each_vm.WORDS] = tuple(args)
        typed, _, _ = self.make_parser(ctx).parse_args(list(args))
        Invocation.of(ctx).note_typed(typed)
        with next_command.added(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Call the command; for each VM, if it is one about one VM and several are named."""
        with next_command.added(ctx):
            if self.for_each and ctx.params["name"] is None:
                return each_vm.call(self, ctx)
            return super().invoke(ctx)


def command(
    name: str, *codes: int, for_each: bool = False, examples: Iterable[tuple[str, str]] = ()
) -> Callable[[Callable[..., Any]], Command]:
    """Make a command of a function, whose docstring is its help.

    codes: its exit codes. for_each: see `Command`. examples: what each is good for, and the call itself.
    """
    return click.command(
        name, cls=Command, exit_codes=exit_codes(*codes), for_each=for_each, examples=examples
    )


def worst(failures: Sequence[BackupctlError]) -> BackupctlError:
    """Return the error to end with where several were met: the worst one, with what the others say."""
    found = errors.worst(failures)
    return found.reworded("; ".join(dict.fromkeys(one.message for one in (found, *failures))))


def config_option(command: Declared) -> Declared:
    """Give a command `--config`; the group has it too, so that it may stand on either side of the command."""
    return click.option("-c", "--config", metavar="FILE", help=CONFIG_HELP)(command)


def json_option(command: Declared) -> Declared:
    """Give a command `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(command)


def quiet(command: Declared) -> Declared:
    """Give a command that timers run `--quiet`."""
    said = "Print only warnings and errors (and the document of --json)."
    return click.option("-q", "--quiet", is_flag=True, help=said)(command)


def if_running(command: Declared) -> Declared:
    """Give a command that backs up `--if-running`."""
    said = "Skip a VM that is off, with exit code 0, whatever when_off in the configuration says."
    return click.option("--if-running", is_flag=True, help=said)(command)


def dry_run(text: str) -> Callable[[Declared], Declared]:
    """Give a command `--dry-run`. text: its help."""
    return click.option("-n", "--dry-run", is_flag=True, help=text)


def gathered(kind: type[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command a dataclass of its options that are called as the fields are, as a further argument."""
    names = [one.name for one in fields(kind)]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **given: Any) -> Any:
            mine = kind(**{name: given.pop(name) for name in names if name in given})
            return function(*arguments, mine, **given)

        return call

    return decorate


_MEANINGS: tuple[tuple[type[BackupctlError] | None, str], ...] = (
    (None, "done"),
    (Failed, "failed and rolled back: nothing is lost"),
    (UsageError, "wrong use or configuration: nothing was touched"),
    (NeedsRecovery, "failed, and the VM needs `backupctl recover`"),
    (DamageFound, "damage found in the repository"),
    (Locked, "another run holds the VM's lock"),
)


def exit_codes(*codes: int) -> dict[int, str]:
    """Return exit codes with their meanings, from the error classes; without arguments, all."""
    found = {kind.exit_code if kind else 0: text for kind, text in _MEANINGS}
    return {code: found[code] for code in codes or found}
