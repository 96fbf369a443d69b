# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line with short time-outs: `python -m tests.hostile.runner full web …`.

The most memory that it had goes to the descriptor $PEAK at the end. What `wait4` tells would not do: to a
child it counts what its parent had when it forked.
"""

import atexit
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

from backupctl import recovery
from backupctl.cli import run
from backupctl.cli.main import main
from backupctl.settings import RunOptions
from backupctl.vm import cleanup

SHORT = {"command_timeout_seconds": 1.0, "agent_timeout_seconds": 1.0, "stall_timeout_seconds": 1.0}

run.RunOptions = partial(RunOptions, **SHORT)
recovery.DEFAULTS = replace(recovery.DEFAULTS, **SHORT)
assert cleanup.dismantle.__kwdefaults__
cleanup.dismantle.__kwdefaults__["patience_seconds"] = 1.0

PEAK = int(os.environ.pop("PEAK"))


@atexit.register
def tell_peak() -> None:
    """Write VmHWM of proc(5)."""
    status = Path("/proc/self/status").read_text()
    os.write(PEAK, status.split("VmHWM:")[1].split()[0].encode())


main()
