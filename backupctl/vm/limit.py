# SPDX-License-Identifier: GPL-2.0-or-later
"""A limit in QEMU itself on what goes into a scratch file, so that the guest waits rather than fails.

A throttle group lets `Room.stop` bytes pass at any speed (its bucket), and then next to nothing. So
however fast the guest writes, a run has the time to notice that its scratch fills up. To take the view
down the limit is lifted: first to a speed at which what waits gets on, then altogether; else ending the
job would wait for it, with QEMU's main loop (measured).
"""

from backupctl.errors import CommandFailed, MonitorError
from backupctl.names import NodeName, Owner
from backupctl.vm.monitor import Monitor

TRICKLE_BYTES_PER_SECOND = 16 * 1024
SLOW_BYTES_PER_SECOND = 32 * 1024 * 1024
UNLIMITED = 0


def make(monitor: Monitor, name: NodeName, stop_bytes: int) -> None:
    """Make a throttle group that lets `stop_bytes` pass. Raises MonitorError."""
    limits = {"bps-write": TRICKLE_BYTES_PER_SECOND, "bps-write-max": stop_bytes}
    monitor.execute("object-add", {"qom-type": "throttle-group", "id": name, "limits": limits})


def lift(monitor: Monitor, owner: Owner, bytes_per_second: int) -> None:
    """Set all our groups to a speed, and let what waits in them pass at once. Raises MonitorError."""
    names = ours(monitor, owner)
    for name in names:
        limits = {"bps-write": bytes_per_second, "bps-write-max": 0}
        monitor.execute("qom-set", {"path": f"/objects/{name}", "property": "limits", "value": limits})
    if names:
        # Even an empty transaction drains all nodes, and drained, a throttle node holds nothing back.
        monitor.execute("transaction", {"actions": []})


def remove(monitor: Monitor, owner: Owner) -> list[str]:
    """Remove our groups, which no node uses any more; returns their names. Raises MonitorError."""
    names = ours(monitor, owner)
    for name in names:
        monitor.execute("object-del", {"id": name})
    return names


def ours(monitor: Monitor, owner: Owner) -> list[str]:
    """Name our groups. Raises MonitorError."""
    if "qom-list" not in monitor.commands:
        return []
    try:
        found = monitor.execute("qom-list", {"path": "/objects"})
        return sorted(str(entry["name"]) for entry in found if owner.owns(str(entry["name"])))
    except CommandFailed:
        return []  # without any object there is no folder for them
    except (KeyError, TypeError) as err:
        raise MonitorError(f"QEMU's qom-list makes no sense: {err!r:.200}") from err
