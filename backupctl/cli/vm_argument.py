# SPDX-License-Identifier: GPL-2.0-or-later
"""The argument NAME of a command, and the options that say where VM and repository are.

What an option's value is, click decides: typed on the command line, or else configured for the VM (its
`default_map`), or else the option's default.
"""

import functools
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import click
import msgspec
from click.core import ParameterSource

from backupctl.cli import common, completion, image_texts, param_types, settings
from backupctl.cli.common import Declared
from backupctl.cli.invocation import Invocation
from backupctl.cli.selection import Selection
from backupctl.cli.target import Target
from backupctl.errors import UNTOUCHED, InvalidName, UsageError
from backupctl.names import VmName
from backupctl.options import DEFAULT_TIMEOUTS, Timeouts

P = ParamSpec("P")
_OF_VM = ("qmp", "agent", "plain_tcp", "libvirt", "domain", "image", "scratch", "if_running")
_NOT_OPTIONS = ("disks", "image", "when_off")
"""Settings whose name is that of another parameter (`disks` is also what --disk is given), or of none."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """Gives a command NAME and the options that say where VM and repository are; it is called with a Target.

    needs_vm: whether the VM itself is spoken to. optional: whether NAME may be left out. several: whether
    there may be more of them, patterns, and --all. then_point: whether a POINT may follow a single NAME.
    defaults_for_all: without NAME, take what the configuration says for all VMs.
    """

    needs_vm: bool = True
    optional: bool = False
    several: bool = False
    then_point: bool = False
    defaults_for_all: bool = False

    def __call__(self, function: Callable[Concatenate[Target, P], Any]) -> Callable[..., Any]:
        """Declare the parameters, and gather them when the command is called."""

        @functools.wraps(function)
        def call(*arguments: Any, **given: Any) -> Any:
            target = _target(click.get_current_context(), given)
            return function(target, *arguments, **given)

        declared: Callable[..., Any] = common.config_option(call)
        for option in reversed((*(_VM_OPTIONS if self.needs_vm else ()), *_REPOSITORY_OPTIONS)):
            declared = option(declared)
        if self.several:
            declared = _ALL_OPTION(declared)
        return self._argument()(declared)

    def _argument(self) -> Callable[[Declared], Declared]:
        several = "NAME..." if self.several and not self.optional else None
        return click.argument(
            "name",
            nargs=-1 if self.several else 1,
            metavar="[NAME]... [POINT]" if self.then_point else several,
            required=not (self.optional or self.several),
            is_eager=True,
            callback=self._use_names,
            shell_complete=completion.vms_then_points if self.then_point else completion.vms,
        )

    def _use_names(
        self, context: click.Context, _parameter: click.Parameter, value: tuple[str, ...] | str | None
    ) -> VmName | None:
        """Check NAME, and let the configuration say what the other options are by default."""
        _refuse_missing_directory()
        words = (value,) if isinstance(value, str) else (value or ())
        invocation = Invocation.of(context)
        if self.then_point:
            words, context.params["point"] = _split_point(words, invocation.config.vms)
        everything = bool(self.several and invocation.typed.get("everything"))
        invocation.selection = invocation.only or Selection(words, everything)
        name = self._one(invocation.selection)
        if invocation.selection.is_empty and not self.optional:
            raise click.MissingParameter(ctx=context, param_hint="'NAME'", param_type="argument")
        config = invocation.config
        said = option_defaults(config.of(name)) if name or self.defaults_for_all else {}
        of_run = msgspec.to_builtins(config.content.run)
        context.default_map = {**(context.default_map or {}), **of_run, **said}
        return name

    def _one(self, chosen: Selection) -> VmName | None:
        try:
            chosen.check()
            return chosen.one
        except InvalidName as err:
            if self.needs_vm:
                raise UsageError(err.message) from err
            raise


def _split_point(words: tuple[str, ...], vms: Container[str]) -> tuple[tuple[str, ...], str | None]:
    """Take the POINT off NAME POINT; with more names there is none. vms: those of the configuration.

    Some people name VMs by numbers, with which the id of a point may begin: then the VM is meant.
    """
    if len(words) == 2 and words[1] not in vms and param_types.is_point(words[1]):
        return words[:1], words[1]
    return words, None


def timeout(name: str, what: str, default: float) -> Callable[[Declared], Declared]:
    """Return a decorator that gives a command a time-out as an option, in seconds."""
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
        help="The image of a disk, for when the VM is off: a qcow2, or FILE,format=raw. On another host "
        "it begins with ssh://HOST. May be repeated.",
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
        default=common.DEFAULTS.scratch.directory,
        show_default=True,
        help="Directory for scratch files; with ssh: on the VM's host.",
    ),
    timeout("--command-timeout", "one QMP command may take", DEFAULT_TIMEOUTS.command_seconds),
    timeout("--agent-timeout", "one command to the guest agent may take", DEFAULT_TIMEOUTS.agent_seconds),
    timeout("--stall-timeout", "a copy may go without receiving data", DEFAULT_TIMEOUTS.stall_seconds),
)


def _target(context: click.Context, given: dict[str, Any]) -> Target:
    """Take what `Named` added out of a command's parameters."""
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
