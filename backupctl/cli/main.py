# SPDX-License-Identifier: GPL-2.0-or-later
"""The command `backupctl`: its commands, and what becomes of errors."""

import importlib
import io
import os
import resource
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import click

from backupctl import __version__
from backupctl.cli import common, crash_log, logs, output
from backupctl.errors import BackupctlError, Failed, Interrupted, InvalidName, NeedsRecovery, UsageError

PRIVATE = 0o077
"""The umask of all that we make, whatever we were started with: disks are in it."""
_MANY_FILES = 1 << 16
_WORTH_A_LOG = (Failed.exit_code, NeedsRecovery.exit_code)
_COMMANDS = {
    "full": "backup.full",
    "incremental": "backup.incremental",
    "list": "list_show.list_points",
    "show": "list_show.show",
    "restore": "restore.restore",
    "serve": "serve.serve",
    "diff": "diff.diff",
    "verify": "verify.verify",
    "prune": "prune.prune",
    "protect": "prune.protect",
    "unprotect": "prune.unprotect",
    "status": "status_recover.status",
    "recover": "status_recover.recover",
    "bitmaps": "bitmaps.bitmaps",
    "doctor": "doctor.doctor",
    "simulate": "simulate.simulate",
    "demo": "demo.demo",
    "drill": "drill.drill",
}


class _Formatter(click.HelpFormatter):
    """Help that is wrapped between words, and at no hyphen: `--only-changed` stays in one piece."""

    _HYPHEN = "\u2011"  # does not break, and is written as what it stands for

    def write(self, string: str) -> None:
        """Write what was wrapped."""
        super().write(string.replace(self._HYPHEN, "-"))

    def write_text(self, text: str) -> None:
        """Write a paragraph."""
        super().write_text(text.replace("-", self._HYPHEN))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Write options or commands, each with its text."""
        kept = [(name, text.replace("-", self._HYPHEN)) for name, text in rows]
        super().write_dl(kept, col_max, col_spacing)


click.Context.formatter_class = _Formatter


class _Commands(click.Group):
    """The commands, each loaded when it is asked for: together they take three times as long as most."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Name them all."""
        return sorted(_COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each command with the whole first sentence of its help, wrapped where click would cut it."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.get_short_help_str(limit=1000)) for name, one in found if one])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - as above
        """Load one."""
        module, _, function = _COMMANDS.get(cmd_name, "").partition(".")
        if not module:
            return None
        found: click.Command = getattr(importlib.import_module(f"backupctl.cli.{module}"), function)
        return logs.add_options(found, hidden=True)


@click.group(cls=_Commands, epilog=common.exit_help())
@common.config_option
@click.version_option(__version__, prog_name="backupctl")
def cli(config: str | None) -> None:
    """Incremental backups of running QEMU virtual machines, over QEMU's own monitor.

    NAME is a VM of the configuration file, or any name together with --qmp and --repository.
    """


logs.add_options(cli)


def main() -> NoReturn:
    """Run the command line; the one place where every error ends."""
    os.umask(PRIVATE)
    prepare_streams()
    _allow_many_files()
    with logs.begin():
        code = _call(as_json="--json" in sys.argv)
    sys.exit(output.finish(code))


def _call(*, as_json: bool) -> int:
    """Call the command; return its exit code, after what there was to say of an error was said."""
    try:
        cli.main(prog_name="backupctl", standalone_mode=False)
    except SystemExit as err:
        return err.code if isinstance(err.code, int) else int(err.code is not None)
    except click.exceptions.Exit as err:
        return err.exit_code
    except click.ClickException as err:
        if not as_json:
            with suppress(OSError):
                err.show()
        return _failed(UsageError(err.format_message()), as_json=as_json, say=as_json)
    except (click.Abort, KeyboardInterrupt):
        # What is done stays done: only its report was cut off.
        return 0 if output.is_done() else _failed(Interrupted("interrupted"), as_json=as_json)
    except BackupctlError as err:
        return _failed(err, as_json=as_json)
    except BrokenPipeError:
        return 0 if output.is_done() else 1  # who read our output has gone
    except Exception:  # noqa: BLE001 - the one place: a bug must not greet anybody with a traceback
        return _failed(_bug(), as_json=as_json, bug=True)
    return 0


def _allow_many_files() -> None:
    """Ask for more than the usual 1024: what a verify or a restore reads of each layer is held open.

    A sandbox may refuse it (systemd's `SystemCallFilter=~@resources`); few have so many that they need it.
    """
    with suppress(OSError, ValueError):
        few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(few, min(most, _MANY_FILES)), most))


def _failed(err: BackupctlError, *, as_json: bool, say: bool = True, bug: bool = False) -> int:
    if isinstance(err, UsageError | InvalidName):
        err.add(state="nothing was touched")
    if say:
        output.print_error(err, as_json=as_json, log=_log_of(err, bug=bug))
    return err.exit_code


def _log_of(err: BackupctlError, *, bug: bool) -> str:
    """Return the file that has the details of a failure; "" for errors that are wholly told by their text."""
    found = logs.current()
    if err.exit_code not in _WORTH_A_LOG or isinstance(err, Interrupted):
        return ""
    if found.file and not bug:  # it has all but a traceback
        return str(found.file)
    return crash_log.write(found.transcript) if found.transcript or bug else ""


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
    return Failed(
        f"an error in backupctl itself: {kind.__name__ if kind else ''}: {text!s:.200}",
        state="whatever was begun was rolled back where that was possible",
        hint="please report it, with the log",
    )


if __name__ == "__main__":
    main()
