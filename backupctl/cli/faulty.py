# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line, dead by SIGKILL as it enters a step: the arguments STEP full … kill a full there.

STEP `impatient` lets it live, with time-outs of seconds, so that a drill need not wait for a minute;
`full-disk` lets no file grow beyond 300 KiB.
"""

import os
import resource
import signal
import sys
from functools import wraps
from typing import Any

import click

from backupctl.cli.main import cli, main
from backupctl.operations.backup import run as backup

_SECONDS = 3.0
_MOST_BYTES = 300 << 10


def kill_at_step(step: str) -> None:
    """Have the run kill itself when it enters a step."""
    run: Any = backup._Run  # noqa: SLF001 - the run's steps are what is drilled
    keep = run.__setattr__
    settle = run._finish_or_roll_back  # noqa: SLF001 - as above

    def set_attribute(self: object, name: str, value: object) -> None:
        keep(self, name, value)
        if name == "step" and value == step and "point" in vars(self):  # there from its begin on
            os.kill(os.getpid(), signal.SIGKILL)

    @wraps(settle)
    def bring_to_rest(self: object, failure: BaseException | None) -> None:
        if step == "settle" and failure is None:
            os.kill(os.getpid(), signal.SIGKILL)
        settle(self, failure)

    run.__setattr__ = set_attribute
    run._finish_or_roll_back = bring_to_rest  # noqa: SLF001 - as above


def short_timeouts(seconds: float = _SECONDS) -> None:
    """Shorten all time-outs, as a configuration would."""
    short = dict.fromkeys(("command_timeout", "agent_timeout", "stall_timeout"), seconds)
    commands = set(cli.list_commands(click.Context(cli))) - {
        "config"
    }  # as the option --config is called, too
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
