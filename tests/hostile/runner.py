# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line with short time-outs and little memory, as `bounded`.

The most memory that it had goes to the file $PEAK at the end, in KiB. What `wait4` tells would not do: to a
child it counts what its parent had when it forked.
"""

import os
import resource
from pathlib import Path

from backupctl.cli import faulty
from backupctl.cli.main import main
from backupctl.vm.qmp import teardown

faulty.short_timeouts(1.0)
assert teardown.teardown.__kwdefaults__
teardown.teardown.__kwdefaults__["patience_seconds"] = 1.0

MOST_MEMORY = 8 << 30  # of address space: a guard for this machine


def bounded() -> None:
    """Be the command line."""
    peak = Path(os.environ.pop("PEAK"))
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    try:
        main()
    finally:
        status = Path("/proc/self/status").read_text()  # VmHWM of proc(5)
        peak.write_text(status.split("VmHWM:")[1].split()[0])
