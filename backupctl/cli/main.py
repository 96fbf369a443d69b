# SPDX-License-Identifier: GPL-2.0-or-later
"""The command `backupctl`: its commands, and what becomes of errors."""

import importlib
import io
import os
import resource
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import click

from backupctl import __version__
from backupctl.cli import (
    common,
    needs,  # noqa: F401 - first of all: it says what is missing
    screen,
)
from backupctl.errors import BackupctlError, Failed, Interrupted, InvalidName, UsageError

_MANY_FILES = 1 << 16
_COMMANDS = {
    "full": "run.full",
    "incremental": "run.incremental",
    "list": "points.list_points",
    "show": "points.show",
    "restore": "restore.restore",
    "serve": "serve.serve",
    "diff": "diff.diff",
    "verify": "verify.verify",
    "prune": "prune.prune",
    "protect": "prune.protect",
    "unprotect": "prune.unprotect",
    "status": "vm.status",
    "recover": "vm.recover",
    "bitmaps": "bitmaps.bitmaps",
    "doctor": "doctor.doctor",
    "simulate": "simulate.simulate",
    "demo": "demo.demo",
    "drill": "drill.drill",
}


class _Commands(click.Group):
    """The commands, each loaded when it is asked for: together they take three times as long as most."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Name them all."""
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - as above
        """Load one."""
        module, _, function = _COMMANDS.get(cmd_name, "").partition(".")
        if not module:
            return None
        found: click.Command = getattr(importlib.import_module(f"backupctl.cli.{module}"), function)
        return found


@click.group(cls=_Commands, epilog=common.exit_help())
@common.config_option
@click.version_option(__version__, prog_name="backupctl")
def cli(config: str | None) -> None:
    """Incremental backups of running QEMU virtual machines, over QEMU's own monitor.

    NAME is a VM of the configuration file, or any name together with --qmp and --repository.
    """


def main() -> NoReturn:
    """Run the command line; the one place where every error ends."""
    prepare_streams()
    as_json = "--json" in sys.argv
    _allow_many_files()
    try:
        cli.main(prog_name="backupctl", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as err:
        sys.exit(err.exit_code)
    except click.ClickException as err:
        if not as_json:
            err.show()
        _fail(UsageError(err.format_message()), as_json=as_json, say=as_json)
    except (click.Abort, KeyboardInterrupt):
        _fail(Interrupted("interrupted"), as_json=as_json)
    except BackupctlError as err:
        _fail(err, as_json=as_json)
    except BrokenPipeError:
        # Who read our output has gone; what was to be done is done.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception:  # noqa: BLE001 - the one place: a bug must not greet anybody with a traceback
        _fail(_bug(), as_json=as_json)
    sys.exit(0)


def _allow_many_files() -> None:
    """Ask for more than the usual 1024: what a verify or a restore reads of each layer is held open.

    A sandbox may refuse it (systemd's `SystemCallFilter=~@resources`); few have so many that they need it.
    """
    with suppress(OSError, ValueError):
        few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(few, min(most, _MANY_FILES)), most))


def _fail(err: BackupctlError, *, as_json: bool, say: bool = True) -> NoReturn:
    if isinstance(err, UsageError | InvalidName):
        err.add(state="nothing was touched")
    if say:
        screen.print_error(err, as_json=as_json)
    sys.exit(err.exit_code)


def prepare_streams() -> None:
    """Have all that is said go somewhere, whatever the streams are that we were started with.

    Where a standard stream is closed something is opened: else the next file to be opened has its number.

    An image that is to go to a closed stdout must be an error, so nothing can be written there.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)
    nowhere = Path(os.devnull)
    sys.stdout = sys.stdout or nowhere.open("w", encoding="utf-8")
    sys.stderr = sys.stderr or nowhere.open("w", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a folder's name must not fail what is done
        sys.stdout.reconfigure(errors="backslashreplace")


def _bug() -> Failed:
    kind, text, _ = sys.exc_info()
    details = ""
    with (
        suppress(OSError),  # no room for it
        tempfile.NamedTemporaryFile(
            "w", prefix="backupctl-error-", suffix=".log", delete=False, encoding="utf-8"
        ) as log,
    ):
        traceback.print_exc(file=log)
        details = f"; the details are in {log.name}"
    return Failed(
        f"an error in backupctl itself: {kind.__name__ if kind else ''}: {text!s:.200}",
        state="whatever was begun was rolled back where that was possible",
        next_command=f"backupctl status NAME{details}",
    )


if __name__ == "__main__":
    main()
