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

from backupctl.cli import backup, common
from backupctl.cli.main import main
from backupctl.operations.backup.context import RunContext
from backupctl.options import Timeouts

_SHORT = Timeouts(command_seconds=3.0, agent_seconds=3.0, stall_seconds=3.0)
_MOST_BYTES = 300 << 10


def kill_at_step(step: str) -> None:
    """Have the run kill itself when it enters a step."""

    def on_step(entered: str) -> None:
        if entered == step:
            os.kill(os.getpid(), signal.SIGKILL)

    command: Any = backup
    command.RunContext = partial(RunContext, on_step=on_step)


def short_timeouts() -> None:
    """Shorten all time-outs."""
    target: Any = common.Target
    target.timeouts = lambda _target: _SHORT


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
