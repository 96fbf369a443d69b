# SPDX-License-Identifier: GPL-2.0-or-later
"""What is in the images of a VM that is off, and how it is finished or undone.

As for a VM that runs (`vm.qmp.recovery`), with two differences: the images are opened for writing only if a
bitmap must change, and the node that a disk writes to is known, so that a read-only one is no backing layer.
"""

from backupctl.names import Namespace, NodeName
from backupctl.vm.driver import Foreseen, PointFacts
from backupctl.vm.offline.daemon import Daemon
from backupctl.vm.offline.inventory import of_images
from backupctl.vm.qmp import bitmaps, inventory, recovery, teardown
from backupctl.vm.qmp.monitor import Monitor


def resolve(daemon: Daemon, facts: PointFacts, clients: teardown.Clients = teardown.NO_CLIENTS) -> list[str]:
    """Do the work of `driver.Resolver.resolve`. Raises MonitorError, RepositoryError."""
    done = teardown.teardown(daemon.monitor, facts.namespace, {}, clients=clients)
    drop_unions(daemon.monitor, facts.namespace)
    root_nodes = {disk.node for disk in daemon.disks}
    plans = recovery.bitmap_plans(daemon.monitor, facts)
    if any(plan.actions for plan, reply in plans if reply["node-name"] in root_nodes):
        with daemon.writable():
            done += recovery.resolve_bitmaps(daemon.monitor, facts)
    return done


def foresee(daemon: Daemon, facts: PointFacts) -> Foreseen:
    """Return what a run finds once it has recovered. Changes nothing. Raises MonitorError, Refused."""
    found = of_images(daemon)
    bitmaps_of = {disk.node: disk.bitmaps for disk in found.disks}
    left: list[str] = []
    after = {}
    for plan, reply in recovery.bitmap_plans(daemon.monitor, facts):
        node = NodeName(reply["node-name"])
        if node in bitmaps_of:
            after[node] = bitmaps.applied(bitmaps_of[node], plan.actions, freed=True)
            left += plan.planned
    return Foreseen(inventory.with_bitmaps(found, after), tuple(left))


def drop_unions(monitor: Monitor, namespace: Namespace) -> None:
    """Remove the bitmaps that a run made for its exports; they are not stored. Raises MonitorError."""
    for one in inventory.all_bitmaps(monitor):
        if one.name == namespace.differential_bitmap and not one.persistent:
            monitor.execute("block-dirty-bitmap-remove", {"node": one.node, "name": one.name})
