# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line with short time-outs: `python -m tests.hostile.runner full web …`."""

from dataclasses import replace
from functools import partial

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
main()
