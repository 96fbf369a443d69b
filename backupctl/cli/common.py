# SPDX-License-Identifier: GPL-2.0-or-later
"""What the commands share: the VM's options, exit codes in the help, and acquiring what is named."""

import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from backupctl.cli import config, next_command
from backupctl.errors import (
    BackupctlError,
    DamageFound,
    Failed,
    Locked,
    NeedsRecovery,
    NotARepository,
    RepositoryError,
    UsageError,
)
from backupctl.options import RunOptions, Timeouts, VmConfig
from backupctl.repository.repository import Repository

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULTS = RunOptions(kind="incremental")


@dataclass(frozen=True)
class Target:
    """What a command line names."""

    config: config.Config
    name: str | None
    qmp: str | None
    agent: str | None
    repository_path: str | None
    scratch_path: str | None

    def vm(self) -> VmConfig:
        """Return the VM. Raises UsageError."""
        return self.config.vm(self.name or "", self.qmp, self.agent)

    def has_repository(self) -> bool:
        """Whether there is one. Raises UsageError, RepositoryError."""
        try:
            Repository.open(self.folder())
        except NotARepository:
            return False
        except RepositoryError as err:
            raise err.add(state="nothing was touched") from err
        return True

    def repository(self) -> Repository:
        """Open the repository. Raises UsageError, RepositoryError."""
        return self.open(self.folder())

    def folder(self) -> Path:
        """Return the repository's folder, which need not be there. Raises UsageError."""
        return self.config.repository(self.name, self.repository_path)

    def folders(self) -> tuple[Path, ...]:
        """Return the folders that are meant: the one that is named, the VM's, or all of the configuration.

        Raises UsageError.
        """
        everything = () if self.name or self.repository_path else self.config.repositories()
        return everything or (self.folder(),)

    def open(self, path: Path) -> Repository:
        """Open a repository. Raises UsageError, RepositoryError."""
        try:
            return Repository.open(path)
        except NotARepository as err:
            raise UsageError(
                err.message,
                state="nothing was touched",
                hint="if there should be one: is its file system mounted? The first full makes one",
                next_command=f"backupctl full {owner}" if (owner := self._owner(path)) else "",
            ) from err
        except RepositoryError as err:
            raise err.add(state="nothing was touched") from err

    def _owner(self, path: Path) -> str:
        """Name a VM that is backed up to a repository, for a first full; "" if none is known."""
        given = self.repository_path
        named = (vm for vm in self.config.vms if given or self.config.setting(vm, "repository"))
        return self.name or next((vm for vm in named if self.config.repository(vm, given) == path), "")

    def new_repository(self) -> Repository:
        """Make the repository, or open the one that another run has just made. Raises RepositoryError."""
        try:
            return Repository.open_or_create(self.folder())
        except NotARepository as err:
            raise UsageError(err.message) from err
        except RepositoryError as err:
            raise err.add(state="nothing was touched") from err

    def other_repositories(self) -> list[Repository]:
        """Return the repositories that the configuration names besides this one, as far as they open."""
        own = self.config.repository(self.name, self.repository_path)
        settings = [self.config.defaults, *self.config.vms.values()]
        paths = {Path(found["repository"]).expanduser() for found in settings if found.get("repository")}
        opened: dict[str, Repository] = {}
        for path in sorted(paths - {own}):
            with suppress(BackupctlError, OSError):
                found = Repository.open(path)
                opened[found.id] = found
        with suppress(BackupctlError, OSError):
            opened.pop(Repository.open(own).id, None)
        return list(opened.values())

    def scratch(self) -> Path:
        """Return the folder for scratch files."""
        found = self.scratch_path or self.config.setting(self.name, "scratch")
        return config.absolute(found, "the scratch folder") if found else DEFAULTS.scratch.folder

    def timeouts(self) -> Timeouts:
        """Return how long to wait for the VM."""
        return Timeouts()


def worst(failures: Sequence[BackupctlError]) -> BackupctlError:
    """Return the error to end with where several were met: damage first, with what the others say."""
    found = next((one for one in failures if isinstance(one, DamageFound)), failures[0])
    return found.reworded("; ".join(dict.fromkeys(one.message for one in (found, *failures))))


def config_option(command: Command) -> Command:
    """Give a command `--config`; the group has it too, so that it may stand on either side of the command."""
    places = f"$BACKUPCTL_CONFIG, ~/.config/backupctl/{config.FILE_NAME}, {config.SYSTEM_FILE}"
    said = f"The configuration file; else, whichever is there first: {places}. It must be yours or root's."
    return click.option("--config", metavar="FILE", help=said)(command)


def named(*, needs_vm: bool = True, optional: bool = False) -> Callable[[Command], Command]:
    """Give a command NAME and the options that say where VM and repository are.

    needs_vm: whether the VM itself is spoken to. optional: whether NAME may be left out.
    """

    def decorate(command: Command) -> Command:
        command = config_option(command)
        command = click.option("--repository", metavar="DIR", help="The repository's folder.")(command)
        if needs_vm:
            command = click.option("--scratch", metavar="DIR", help="Folder for scratch files.")(command)
            command = click.option("--agent", metavar="unix:PATH", help="The guest agent's socket.")(command)
            command = click.option("--qmp", metavar="unix:PATH|tcp:HOST:PORT", help="QEMU's monitor.")(
                command
            )
        return click.argument("name", required=not optional)(_with_next_command(command))

    return decorate


def _with_next_command(command: Command) -> Command:
    """Have the errors of a command name the next one with all the options that it needs."""

    @functools.wraps(command)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return command(*arguments, **options)
        except BackupctlError as err:
            next_command.add_to(err, click.get_current_context())
            raise

    return cast("Command", call)


def quiet(command: Command) -> Command:
    """Give a command that timers run `--quiet`."""
    said = "Say nothing but warnings and errors (and the document of --json)."
    return click.option("--quiet", is_flag=True, help=said)(command)


def from_context(context: click.Context, options: dict[str, Any]) -> Target:
    """Take what `named` added out of a command's options."""
    _refuse_no_folder()
    given = options.pop("config", None) or context.find_root().params.get("config")
    return Target(
        config=config.load(given),
        name=options.pop("name", None),
        qmp=options.pop("qmp", None),
        agent=options.pop("agent", None),
        repository_path=options.pop("repository", None),
        scratch_path=options.pop("scratch", None),
    )


def _refuse_no_folder() -> None:
    """Raise UsageError if the current folder is gone: a relative path would mean nothing."""
    try:
        Path.cwd()
    except OSError as err:
        raise UsageError(
            f"cannot find the current directory: {err.strerror}",
            state="nothing was touched",
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


def exit_codes() -> dict[int, str]:
    """Return every exit code with its meaning, from the error classes."""
    return {kind.exit_code if kind else 0: text for kind, text in _MEANINGS}


def exit_help(*codes: int) -> str:
    """Return the part of a command's help that tells its exit codes."""
    known = exit_codes()
    lines = "\n".join(f"  {code:<4}{known[code]}" for code in codes or known)
    return f"\b\nExit codes:\n{lines}"
