# SPDX-License-Identifier: GPL-2.0-or-later
"""What the commands share: the VM's options, exit codes in the help, and acquiring what is named."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from backupctl.cli import config
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
from backupctl.repository.layout import Repository
from backupctl.settings import RunOptions, Vm

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULTS = RunOptions(kind="incremental")


@dataclass(frozen=True)
class Named:
    """What a command line names."""

    config: config.Config
    name: str | None
    qmp: str | None
    agent: str | None
    repository_path: str | None
    scratch_path: str | None

    def vm(self) -> Vm:
        """Return the VM. Raises UsageError."""
        return self.config.vm(self.name or "", self.qmp, self.agent)

    def has_repository(self) -> bool:
        """Whether there is one. Raises UsageError, RepositoryError."""
        try:
            Repository.open(self.config.repository(self.name, self.repository_path))
        except NotARepository:
            return False
        except RepositoryError as err:
            raise err.add(state="nothing was touched") from err
        return True

    def repository(self, *, create: bool = False) -> Repository:
        """Open the repository. Raises UsageError, RepositoryError."""
        path = self.config.repository(self.name, self.repository_path)
        try:
            return Repository.open_or_create(path) if create else Repository.open(path)
        except NotARepository as err:
            hint = "is its file system mounted? The first `backupctl full NAME` makes one in an empty folder"
            raise UsageError(err.message, next_command=hint) from err
        except RepositoryError as err:
            raise err.add(state="nothing was touched") from err
        except OSError as err:
            raise Failed(
                f"the repository {path} can't be used: {err.strerror}", state="nothing was touched"
            ) from err

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
        return Path(found).expanduser() if found else DEFAULTS.scratch


def config_option(command: Command) -> Command:
    """Give a command `--config`; the group has it too, so that it may stand on either side of the command."""
    places = f"$BACKUPCTL_CONFIG, ./{config.FILE_NAME}, ~/.config/backupctl/, /etc/backupctl/"
    said = f"The configuration file; else, whichever is there first: {places}."
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
        return click.argument("name", required=not optional)(command)

    return decorate


def quiet(command: Command) -> Command:
    """Give a command that timers run `--quiet`."""
    said = "Say nothing but warnings and errors (and the document of --json)."
    return click.option("--quiet", is_flag=True, help=said)(command)


def take(context: click.Context, options: dict[str, Any]) -> Named:
    """Take what `named` added out of a command's options."""
    return Named(
        config=config.load(options.pop("config", None) or context.find_root().params.get("config")),
        name=options.pop("name", None),
        qmp=options.pop("qmp", None),
        agent=options.pop("agent", None),
        repository_path=options.pop("repository", None),
        scratch_path=options.pop("scratch", None),
    )


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
