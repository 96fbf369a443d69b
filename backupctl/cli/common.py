# SPDX-License-Identifier: GPL-2.0-or-later
"""What the commands share: NAME and the options that say where VM and repository are, and exit codes.

What an option's value is, click decides: typed on the command line, or else configured for the VM (its
`default_map`), or else the option's default.
"""

import functools
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import click
import msgspec
from click.core import ParameterSource

from backupctl import errors
from backupctl.cli import (
    completion,
    configuration,
    each_vm,
    image_texts,
    next_command,
    param_types,
    settings,
)
from backupctl.cli.help import Documented
from backupctl.cli.invocation import Invocation
from backupctl.cli.selection import Selection
from backupctl.cli.target import Target
from backupctl.errors import (
    UNTOUCHED,
    BackupctlError,
    DamageFound,
    Failed,
    InvalidName,
    Locked,
    NeedsRecovery,
    UsageError,
)
from backupctl.names import VmName
from backupctl.options import DEFAULT_TIMEOUTS, RunOptions, Timeouts

Declared = TypeVar("Declared", bound=Callable[..., Any])
P = ParamSpec("P")

DEFAULTS = RunOptions(kind="incremental")
CONFIG_HELP = (
    "The configuration file; must belong to you or to root. Default: the first that exists of "
    f"${configuration.ENVIRONMENT}, ~/.config/backupctl/{configuration.FILE_NAME}, "
    f"{configuration.SYSTEM_FILE}."
)
_OF_VM = ("qmp", "agent", "plain_tcp", "libvirt", "domain", "image", "scratch", "if_running")
_NOT_OPTIONS = ("disks", "image", "when_off")
"""Settings whose name is that of another parameter (`disks` is also what --disk is given), or of none."""


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


def at_option(text: str) -> Callable[[Declared], Declared]:
    """Give a command `--at`. text: which point it stands for."""
    return click.option(
        "--at",
        type=param_types.TIME,
        metavar='"DATE TIME"',
        help=f"{text}, in local time unless it names UTC or an offset.",
    )


def point_argument(name: str, *, required: bool) -> Callable[[Declared], Declared]:
    """Give a command the argument for a point, without `--at`."""
    return click.argument(
        name, type=param_types.POINT, default=None, required=required, shell_complete=completion.points
    )


def point(
    name: str = "point", *, default: str | None = None, optional: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command a POINT, or instead of it `--at`. default: what is meant without either."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, at: str | None, **given: Any) -> Any:
            given[name] = point_or_time(given[name], at) or default
            if given[name] is None and not optional:
                raise _missing_argument(name)
            return function(*arguments, **given)

        option = at_option(f"In place of {name.upper()}: the newest point not later than this")
        return point_argument(name, required=False)(option(call))

    return decorate


def point_or_time(point: str | None, at: str | None) -> str | None:
    """Return the point that was named in one of two ways. Raises UsageError if it was in both."""
    if point and at:
        raise UsageError("a point and --at are mutually exclusive")
    return point or at


def point_then_paths(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `[POINT] [PATH]...`, and `--at`; it is called with `point` and `paths`.

    A PATH begins with a slash, so POINT may be left out: it is then `latest`.
    """

    @functools.wraps(command)
    def call(*arguments: Any, words: tuple[str, ...], at: str | None, **given: Any) -> Any:
        named, paths = (None, words) if not words or words[0].startswith("/") else (words[0], words[1:])
        checked = (
            None if named is None else param_types.POINT.convert(named, None, click.get_current_context())
        )
        return command(*arguments, point=point_or_time(checked, at) or "latest", paths=paths, **given)

    option = at_option("In place of POINT: the newest point not later than this")
    words = click.argument("words", metavar="[POINT] [PATH]...", nargs=-1, shell_complete=completion.points)
    return words(option(call))


def _missing_argument(name: str) -> click.MissingParameter:
    context = click.get_current_context()
    return click.MissingParameter(ctx=context, param_hint=f"'{name.upper()}'", param_type="argument")


def named(
    *,
    needs_vm: bool = True,
    optional: bool = False,
    several: bool = False,
    then_point: bool = False,
    defaults_for_all: bool = False,
) -> Callable[[Callable[Concatenate[Target, P], Any]], Callable[..., Any]]:
    """Give a command NAME and the options that say where VM and repository are; it is called with a Target.

    needs_vm: whether the VM itself is spoken to. optional: whether NAME may be left out. several: whether
    there may be more of them, patterns, and --all. then_point: whether a POINT may follow a single NAME.
    defaults_for_all: without NAME, take what the configuration says for all VMs.
    """

    def use_names(
        context: click.Context, _parameter: click.Parameter, value: tuple[str, ...] | str | None
    ) -> VmName | None:
        """Check NAME, and let the configuration say what the other options are by default."""
        _refuse_missing_directory()
        words = (value,) if isinstance(value, str) else (value or ())
        if then_point:
            words, context.params["point"] = _split_point(words, Invocation.of(context).config.vms)
        invocation = Invocation.of(context)
        chosen = invocation.only or Selection(words, bool(several and invocation.typed.get("everything")))
        try:
            chosen.check()
            name = chosen.one
        except InvalidName as err:
            if needs_vm:
                raise UsageError(err.message) from err
            raise
        invocation.selection = chosen
        if chosen.is_empty and not optional:
            raise click.MissingParameter(ctx=context, param_hint="'NAME'", param_type="argument")
        config = invocation.config
        said = option_defaults(config.of(name)) if name or defaults_for_all else {}
        of_run = msgspec.to_builtins(config.content.run)
        context.default_map = {**(context.default_map or {}), **of_run, **said}
        return name

    def decorate(function: Callable[Concatenate[Target, P], Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **given: Any) -> Any:
            context = click.get_current_context()
            target = _target(context, given)
            return function(target, *arguments, **given)

        declared: Callable[..., Any] = config_option(call)
        for option in reversed((*(_VM_OPTIONS if needs_vm else ()), *_REPOSITORY_OPTIONS)):
            declared = option(declared)
        if several:
            declared = _ALL_OPTION(declared)
        return click.argument(
            "name",
            nargs=-1 if several else 1,
            metavar="[NAME]... [POINT]" if then_point else "NAME..." if several and not optional else None,
            required=not (optional or several),
            is_eager=True,
            callback=use_names,
            shell_complete=completion.vms_then_points if then_point else completion.vms,
        )(declared)

    return decorate


def _split_point(words: tuple[str, ...], vms: Container[str]) -> tuple[tuple[str, ...], str | None]:
    """Take the POINT off NAME POINT; with more names there is none. vms: those of the configuration.

    Some people name VMs by numbers, with which the id of a point may begin: then the VM is meant.
    """
    if len(words) == 2 and words[1] not in vms and param_types.is_point(words[1]):
        return words[:1], words[1]
    return words, None


def _timeout(name: str, what: str, default: float) -> Callable[[Declared], Declared]:
    return click.option(
        name,
        type=param_types.SECONDS,
        metavar="SECONDS",
        default=default,
        show_default=True,
        help=f"The longest that {what}.",
    )


_ALL_OPTION = click.option(
    "--all",
    "everything",
    is_flag=True,
    is_eager=True,
    help="All VMs. A NAME may also be a pattern such as 'web*'.",
)
_REPOSITORY_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--repository", type=param_types.PATH, metavar="DIR", help="The repository's directory."),
)
_VM_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--qmp",
        type=param_types.SOCKET,
        default=None,
        metavar="unix:PATH|ssh://HOST/PATH|tcp:HOST:PORT",
        help="The socket of QEMU's monitor; with ssh: on that host.",
    ),
    click.option(
        "--agent",
        type=param_types.SOCKET,
        metavar="unix:PATH|ssh://HOST/PATH",
        help="The socket of the guest agent.",
    ),
    click.option(
        "--plain-tcp",
        is_flag=True,
        help="Allow tcp: to another host, without encryption.",
    ),
    click.option(
        "--image",
        type=image_texts.IMAGE,
        multiple=True,
        metavar="DISK=FILE",
        help="The image of a disk, for when the VM is off: a qcow2, or FILE,format=raw; may be repeated.",
    ),
    click.option(
        "--libvirt",
        type=param_types.LIBVIRT_URI,
        metavar="URI",
        help="libvirt, for a VM that it manages: qemu:///system, or qemu+ssh://HOST/system.",
    ),
    click.option("--domain", metavar="NAME", help="The VM's name in libvirt.  [default: the same]"),
    click.option(
        "--scratch",
        type=param_types.PATH,
        metavar="DIR",
        default=DEFAULTS.scratch.directory,
        show_default=True,
        help="Directory for scratch files; with ssh: on the VM's host.",
    ),
    _timeout("--command-timeout", "one QMP command may take", DEFAULT_TIMEOUTS.command_seconds),
    _timeout("--agent-timeout", "one command to the guest agent may take", DEFAULT_TIMEOUTS.agent_seconds),
    _timeout("--stall-timeout", "a copy may go without receiving data", DEFAULT_TIMEOUTS.stall_seconds),
)


def _target(context: click.Context, given: dict[str, Any]) -> Target:
    """Take what `named` added out of a command's parameters."""
    given.pop("config")
    given.pop("everything", None)
    of_vm = {name: given.pop(name) for name in _OF_VM if name in given}
    _choose_access(context, of_vm)
    waits = {
        f"{name}_seconds": given.pop(f"{name}_timeout")
        for name in ("command", "agent", "stall")
        if f"{name}_timeout" in given
    }
    return Target(
        config=Invocation.of(context).config,
        name=given.pop("name"),
        selection=Invocation.of(context).selection,
        repository_path=given.pop("repository"),
        typed_repository=context.get_parameter_source("repository") is ParameterSource.COMMANDLINE,
        timeouts=Timeouts(**waits),
        **of_vm,
    )


def _choose_access(context: click.Context, of_vm: dict[str, Any]) -> None:
    """Let --qmp or --libvirt win over the other one of the configuration. Raises UsageError."""
    if not (of_vm.get("qmp") and of_vm.get("libvirt")):
        return
    typed = [
        name
        for name in ("qmp", "libvirt")
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    if len(typed) != 1:
        raise UsageError("--qmp and --libvirt are mutually exclusive", state=UNTOUCHED)
    if typed == ["libvirt"]:
        of_vm["qmp"] = of_vm["agent"] = None
    else:
        of_vm["libvirt"] = None


def option_defaults(said: settings.VmSettings) -> Mapping[str, Any]:
    """Return what the configuration says as defaults of options; max_chain = 0 means the default, too."""
    found: dict[str, Any] = msgspec.to_builtins(said)
    return {
        name: value
        for name, value in found.items()
        if name not in _NOT_OPTIONS and (name, value) != ("max_chain", 0)
    }


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


def _refuse_missing_directory() -> None:
    """Raise UsageError if the current directory is gone: a relative path would mean nothing."""
    try:
        Path.cwd()
    except OSError as err:
        raise UsageError(
            f"cannot find the current directory: {err.strerror}",
            state=UNTOUCHED,
            next_command="cd /",
        ) from err


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
