# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line with little memory, and with a teardown of $TEARDOWN_SECONDS if given, as `bounded`.

The most memory that it had goes to the file $PEAK at the end, in KiB. What `wait4` tells would not do: to a
child it counts what its parent had when it forked.
"""

import os
import resource
from pathlib import Path

from backupctl.cli.main import main
from backupctl.vm.qmp import teardown

MOST_MEMORY = 8 << 30  # of address space: a guard for this machine


def bounded() -> None:
    """Be the command line."""
    if seconds := os.environ.pop("TEARDOWN_SECONDS", ""):
        assert teardown.teardown.__kwdefaults__
        teardown.teardown.__kwdefaults__["patience_seconds"] = float(seconds)
    peak = Path(os.environ.pop("PEAK"))
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    try:
        main()
    finally:
        status = Path("/proc/self/status").read_text()  # VmHWM of proc(5)
        peak.write_text(status.split("VmHWM:")[1].split()[0])
