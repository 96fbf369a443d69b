# SPDX-License-Identifier: GPL-2.0-or-later
"""The command `backupctl`: its commands, and what becomes of errors."""

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
from backupctl.cli.demo import demo
from backupctl.cli.diff import diff
from backupctl.cli.doctor import doctor
from backupctl.cli.drill import drill
from backupctl.cli.points import list_points, show
from backupctl.cli.prune import protect, prune, unprotect
from backupctl.cli.restore import restore
from backupctl.cli.run import full, incremental
from backupctl.cli.serve import serve
from backupctl.cli.simulate import simulate
from backupctl.cli.verify import verify
from backupctl.cli.vm import recover, status
from backupctl.errors import BackupctlError, Failed, Interrupted, InvalidName, UsageError

_MANY_FILES = 1 << 16


@click.group(epilog=common.exit_help())
@common.config_option
@click.version_option(__version__, prog_name="backupctl")
def cli(config: str | None) -> None:
    """Incremental backups of running QEMU virtual machines, over QEMU's own monitor.

    NAME is a VM of the configuration file, or any name together with --qmp and --repository.
    """


_COMMANDS = (
    full,
    incremental,
    list_points,
    show,
    restore,
    serve,
    diff,
    verify,
    prune,
    protect,
    unprotect,
    status,
    recover,
    doctor,
    simulate,
    demo,
    drill,
)
for _command in _COMMANDS:
    cli.add_command(_command)


def main() -> NoReturn:
    """Run the command line; the one place where every error ends."""
    prepare_streams()
    as_json = "--json" in sys.argv
    _allow_many_files()
    try:
        cli.main(standalone_mode=False)
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
