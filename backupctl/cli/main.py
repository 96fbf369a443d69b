# SPDX-License-Identifier: GPL-2.0-or-later
"""The command `backupctl`: its subcommands, and what becomes of errors."""

import importlib
import io
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import click

from backupctl import __version__
from backupctl.cli import common, configuration, logs, output, requirements
from backupctl.cli.help import NAMES, Group
from backupctl.cli.invocation import Invocation
from backupctl.errors import (
    UNTOUCHED,
    BackupctlError,
    Failed,
    Interrupted,
    InvalidName,
    UsageError,
)

PRIVATE = 0o077
"""The umask of every file we create, whatever the caller's is: the files hold the guests' disks."""
_MANY_FILES = 1 << 16
SECTIONS = {
    "Back up": {
        "run": "run.run",
        "full": "backup.full",
        "incremental": "backup.incremental",
    },
    "Look": {
        "list": "list_show.list_points",
        "show": "list_show.show",
        "du": "du.du",
        "diff": "diff.diff",
        "status": "status_recover.status",
        "check": "check.check",
        "report": "report.report",
        "bitmaps": "bitmaps.bitmaps",
    },
    "Restore": {
        "restore": "restore.restore",
        "restore-test": "restore_test.restore_test",
        "files": "files.files",
        "mount": "mount.mount",
        "umount": "mount.umount",
        "serve": "serve.serve",
    },
    "Care": {
        "doctor": "doctor.doctor",
        "verify": "verify.verify",
        "prune": "prune.prune",
        "protect": "prune.protect",
        "unprotect": "prune.unprotect",
        "delete": "delete.delete",
        "rename": "rename.rename",
        "remove": "remove.remove",
        "recover": "status_recover.recover",
        "config": "config.config",
        "discover": "discover.discover",
        "install-timers": "install_timers.install_timers",
        "version": "version.version",
    },
    "Try": {
        "demo": "demo.demo",
        "drill": "drill.drill",
        "simulate": "simulate.simulate",
    },
}
"""The commands as the help groups them, each with the module and function that it is loaded from."""
_COMMANDS = {name: place for section in SECTIONS.values() for name, place in section.items()}


class _Commands(Group):
    """The commands, each loaded only when it is needed: loading all takes three times as long as one."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Make the root context, which carries the state of this call."""
        extra.setdefault("obj", Invocation(args))
        return super().make_context(info_name, args, parent, **extra)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Name them all."""
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - as above
        """Load one."""
        module, _, function = _COMMANDS.get(cmd_name, "").partition(".")
        if not module:
            return None
        found: click.Command = getattr(importlib.import_module(f"backupctl.cli.{module}"), function)
        return logs.add_options(found, hidden=True)


def _use_config(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    source = context.get_parameter_source(parameter.name or "")
    if value and source:
        invocation = Invocation.of(context)
        invocation.config_path, invocation.config_source = value, source
    return value


@click.group(
    cls=_Commands,
    sections=SECTIONS,
    exit_codes=common.exit_codes(),
    examples=(
        ("Check that a VM can be backed up", "backupctl doctor web"),
        ("The first backup", "backupctl full web"),
        ("Every night, all that is due for every VM", "backupctl run --all --quiet"),
        ("All disks of the newest point, as qcow2 images", "backupctl restore web --to /srv/restored/"),
        ("Try it without a VM", "backupctl demo"),
    ),
    context_settings={"help_option_names": NAMES},
)
@click.option(
    "-c",
    "--config",
    metavar="FILE",
    envvar=configuration.ENVIRONMENT,
    callback=_use_config,
    help=common.CONFIG_HELP,
)
@click.version_option(__version__, "-V", "--version", prog_name="backupctl")
def cli(config: str | None) -> None:
    """Incremental backups of running QEMU virtual machines, through QEMU's own monitor.

    NAME is a VM of the configuration file, or any name together with --qmp and --repository.
    """


logs.add_options(cli)


def main() -> NoReturn:
    """Run the command line; the one place where every error ends."""
    os.umask(PRIVATE)
    prepare_streams()
    _allow_many_files()
    output.start()
    with logs.begin():
        code = _call(Invocation(sys.argv[1:]))
    sys.exit(output.finish(code))


def _call(invocation: Invocation) -> int:
    """Call the command; return its exit code, after any error was printed."""
    try:
        requirements.check()
        cli.main(args=list(invocation.words), prog_name="backupctl", standalone_mode=False, obj=invocation)
    except SystemExit as err:
        return err.code if isinstance(err.code, int) else int(err.code is not None)
    except click.exceptions.Exit as err:
        return err.exit_code
    except click.ClickException as err:
        if not invocation.as_json:
            with suppress(OSError):
                err.show()
        return _failed(UsageError(err.format_message()), invocation, say=invocation.as_json)
    except (click.Abort, KeyboardInterrupt):
        # What is done stays done: only its report was cut off.
        return 0 if output.is_done() else _failed(Interrupted("interrupted"), invocation)
    except BackupctlError as err:
        return _failed(err, invocation)
    except BrokenPipeError:
        return 0 if output.is_done() else 1  # whoever read our output has gone
    except Exception:  # noqa: BLE001 - the one place: a bug must not greet anybody with a traceback
        return _failed(_bug(), invocation, bug=True)
    return 0


def _allow_many_files() -> None:
    """Raise the limit of open files, usually 1024: verify and restore keep the files of every layer open.

    A sandbox may refuse it (systemd's `SystemCallFilter=~@resources`); only long chains need it.
    """
    with suppress(OSError, ValueError):
        few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(few, min(most, _MANY_FILES)), most))


def _failed(err: BackupctlError, invocation: Invocation, *, say: bool = True, bug: bool = False) -> int:
    if isinstance(err, UsageError | InvalidName):
        err.add(state=UNTOUCHED)
    if say:
        from backupctl.cli import crash_log  # noqa: PLC0415 - few calls need it

        output.print_error(err, as_json=invocation.as_json, log=crash_log.of(err, bug=bug))
    return err.exit_code


def prepare_streams() -> None:
    """Make every standard stream usable, even if it was closed when we were started.

    A closed one is opened on /dev/null: else the next file to be opened would get its number, and our output.
    It is opened for reading only: a restore to a closed stdout must fail.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)
    nowhere = Path(os.devnull)
    sys.stdout = sys.stdout or nowhere.open("w", encoding="utf-8")
    sys.stderr = sys.stderr or nowhere.open("w", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):  # the name of a directory must not make a command fail
        sys.stdout.reconfigure(errors="backslashreplace")


def _bug() -> Failed:
    kind, text, _ = sys.exc_info()
    return Failed(
        f"an error in backupctl itself: {kind.__name__ if kind else ''}: {text!s:.200}",
        state="everything that could be rolled back was rolled back",
        hint="please report it, with the log",
    )


if __name__ == "__main__":
    main()
