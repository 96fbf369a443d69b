# SPDX-License-Identifier: GPL-2.0-or-later
"""A limit in QEMU itself on what goes into a scratch file, so that the guest waits rather than fails.

A throttle group lets as many bytes pass at any speed as its bucket holds, and then next to nothing. So
however fast the guest writes, a run has the time to notice that its scratch fills up. The bucket leaks,
so the run sets it anew while it looks.

To take the view down the limit is lifted in two steps: to a speed at which what waits gets on, so that
reads that wait for it end, and with them their export; then, when no client of ours is left, altogether,
since a job that ends while a write waits in a throttle node stops QEMU's main loop until then
(``test_no_scratch_size_fails_a_write_under_a_flood_that_never_ends``).
"""

from typing import TYPE_CHECKING

from backupctl.errors import CommandFailed
from backupctl.vm.qmp.reply import text, understood

if TYPE_CHECKING:  # the guard uses this module too, and must start quickly
    from backupctl.names import Namespace, NodeName
    from backupctl.vm.qmp.monitor import Monitor

TRICKLE_BYTES_PER_SECOND = 2 << 20
"""When the bucket is empty. A request waits for its own size at this speed, whatever happens to the limit."""
SLOW_BYTES_PER_SECOND = 32 << 20
UNLIMITED = 0


def burst_limits(room_bytes: int) -> dict[str, int]:
    """Return the limits that let `room_bytes` pass."""
    room_bytes = max(room_bytes, TRICKLE_BYTES_PER_SECOND)
    return {"bps-write": TRICKLE_BYTES_PER_SECOND, "bps-write-max": room_bytes}


def rate_limits(bytes_per_second: int) -> dict[str, int]:
    """Return the limits of a steady speed."""
    return {"bps-write": bytes_per_second, "bps-write-max": 0}


def make(monitor: "Monitor", name: "NodeName", room_bytes: int) -> None:
    """Make a throttle group that lets `room_bytes` pass. Raises MonitorError."""
    arguments = {"qom-type": "throttle-group", "id": name, "limits": burst_limits(room_bytes)}
    monitor.execute("object-add", arguments)


def change(monitor: "Monitor", name: str, limits: dict[str, int]) -> None:
    """Give a group other limits; its bucket is empty again. Raises MonitorError."""
    monitor.execute("qom-set", {"path": f"/objects/{name}", "property": "limits", "value": limits})


def relax(monitor: "Monitor", namespace: "Namespace") -> None:
    """Let what waits in our groups get on. Raises MonitorError."""
    for name in ours(monitor, namespace):
        change(monitor, name, rate_limits(SLOW_BYTES_PER_SECOND))


def disable(monitor: "Monitor", namespace: "Namespace") -> None:
    """Let everything pass, and wait for what is under way. Not while a client of ours has replies to read.

    Raises MonitorError.
    """
    names = ours(monitor, namespace)
    for name in names:
        change(monitor, name, rate_limits(UNLIMITED))
    if names:
        # Even an empty transaction drains all nodes, and drained, a throttle node holds nothing back.
        monitor.execute("transaction", {"actions": []})


def remove(monitor: "Monitor", namespace: "Namespace") -> list[str]:
    """Remove our groups, which no node uses any more; returns their names. Raises MonitorError."""
    names = ours(monitor, namespace)
    for name in names:
        monitor.execute("object-del", {"id": name})
    return names


def ours(monitor: "Monitor", namespace: "Namespace") -> list[str]:
    """Name our groups. Raises MonitorError."""
    if "qom-list" not in monitor.commands:
        return []
    try:
        found = monitor.execute("qom-list", {"path": "/objects"})
    except CommandFailed:
        return []  # without any object there is no directory for them
    with understood("list of objects"):
        return sorted(name for entry in found if namespace.owns(name := text(entry["name"])))
