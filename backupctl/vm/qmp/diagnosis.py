# SPDX-License-Identifier: GPL-2.0-or-later
"""What `doctor` tells of a QEMU with a monitor of its own."""

from collections.abc import Iterator

from backupctl.errors import Refused
from backupctl.finding import Finding
from backupctl.options import QmpAccess, RunOptions
from backupctl.vm.qmp import preflight, scratch_space
from backupctl.vm.qmp.monitor import Monitor


def findings(monitor: Monitor, access: QmpAccess, options: RunOptions) -> Iterator[Finding]:
    """Look at QEMU's version, its monitor, and iothreads. Raises MonitorError."""
    yield Finding("monitor", "ok", f"QEMU {monitor.version} answers at {access.qmp}")
    try:
        preflight.refuse_qemu(monitor)
    except Refused as err:
        yield Finding("qemu", "bad", err.message)
    if not monitor.passes_descriptors:
        yield Finding(
            "qemu",
            "warning",
            "this monitor cannot pass file descriptors, so QEMU itself needs the rights to open files "
            f"in {options.scratch.directory}, and to create a socket in the temporary directory",
            "a monitor on a unix socket needs no rights",
        )
    yield from _iothreads(monitor)


def _iothreads(monitor: Monitor) -> Iterator[Finding]:
    if "query-iothreads" not in monitor.commands or not monitor.execute("query-iothreads"):
        return
    version = monitor.version
    if version.at_least(7, 2) and not version.at_least(8, 0):
        yield Finding(
            "iothread",
            "warning",
            f"QEMU {version} may abort when an NBD client leaves a disk on an iothread; the guard of each "
            "run prevents that",
            "never kill run and guard together: KillMode=process in a systemd unit",
        )
    if not scratch_space.limits(monitor):
        yield Finding(
            "iothread",
            "warning",
            f"QEMU {version} cannot let a guest with an iothread wait when a scratch file fills up; each "
            "disk has 512 MiB in reserve, so that the run can be given up in time",
            "leave ample free space in the scratch directory",
        )
