# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line, dead by SIGKILL as it enters a step: the arguments STEP full … kill a full there.

STEP `impatient` lets it live, with time-outs of seconds, so that a drill need not wait for a minute;
`full-disk` lets no file grow beyond 300 KiB.
"""

import os
import resource
import signal
import sys
from functools import partial
from typing import Any

import click

from backupctl.cli import backup
from backupctl.cli.main import cli, main
from backupctl.operations.backup.context import RunContext

_SHORT_SECONDS = 3.0
_MOST_BYTES = 300 << 10


def kill_at_step(step: str) -> None:
    """Have the run kill itself when it enters a step."""

    def on_step(entered: str) -> None:
        if entered == step:
            os.kill(os.getpid(), signal.SIGKILL)

    command: Any = backup
    command.RunContext = partial(RunContext, on_step=on_step)


def short_timeouts(seconds: float = _SHORT_SECONDS) -> None:
    """Shorten all time-outs, as a configuration would."""
    short = dict.fromkeys(("command_timeout", "agent_timeout", "stall_timeout"), seconds)
    # A default under the name of an option of the group (`--config`, `--version`) would be that option's.
    commands = set(cli.list_commands(click.Context(cli))) - {one.name for one in cli.params}
    cli.context_settings["default_map"] = dict.fromkeys(commands, short)


def faulty_cli() -> None:
    """Be the command line; the first argument says how it ends."""
    fate = sys.argv.pop(1)
    if fate == "impatient":
        short_timeouts()
    elif fate == "full-disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (_MOST_BYTES, _MOST_BYTES))
    else:
        kill_at_step(fate)
    main()
