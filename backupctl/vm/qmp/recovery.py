# SPDX-License-Identifier: GPL-2.0-or-later
"""What of ours is in a QEMU, and how it is finished or undone: asked of QEMU, decided by the points' names.

Every line may be the last one of a dying process; the next call goes on from there.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from backupctl.errors import CommandFailed
from backupctl.names import DiskName, NodeKind, NodeName, PointId
from backupctl.vm.bitmap import Bitmap
from backupctl.vm.driver import Foreseen, PointFacts
from backupctl.vm.qmp import bitmaps, inventory, teardown
from backupctl.vm.qmp.monitor import Monitor


def resolve(
    monitor: Monitor,
    facts: PointFacts,
    *,
    clients: teardown.Clients = teardown.NO_CLIENTS,
    server_is_ours: bool = True,
) -> list[str]:
    """Do the work of `driver.Resolver.resolve`. clients, server_is_ours: as for `teardown.teardown`."""
    unfinished = facts.unfinished()
    # An unfinished run that had not come to its exports started no NBD server, so one that runs is not ours.
    may_export = not unfinished or any(run.may_export for run in unfinished)
    done = teardown.teardown(
        monitor,
        facts.namespace,
        active_nodes(facts),
        clients=clients,
        server_is_ours=server_is_ours and may_export,
    )
    return done + resolve_bitmaps(monitor, facts)


def resolve_bitmaps(monitor: Monitor, facts: PointFacts) -> list[str]:
    """Finish or undo the bitmaps of all nodes, in one transaction. Raises MonitorError, RepositoryError.

    A read-only node is a backing layer (an external snapshot left the bitmap behind) or a medium; its
    bitmaps are of no use. They are removed where QEMU lets us, and must not stop the others.
    """
    actions: list[bitmaps.Action] = []
    done: list[str] = []
    for plan, reply in bitmap_plans(monitor, facts):
        if not reply.get("ro"):
            actions += plan.actions
            done += plan.done
        elif plan.actions:
            done += _try_apart(monitor, plan)
    monitor.transaction(actions)
    return done


def foresee(monitor: Monitor, facts: PointFacts, stored_names: Mapping[str, str] | None = None) -> Foreseen:
    """Return what a run finds once it has recovered. Changes nothing. Raises MonitorError, Refused."""
    left = teardown.leftovers(monitor, facts.namespace)
    found = inventory.inventory(monitor, stored_names, _beneath_ours(facts, left))
    exported = any(one.startswith("export ") for one in left)
    after = {}
    for plan, reply in bitmap_plans(monitor, facts):
        if not reply.get("ro"):
            node = NodeName(reply["node-name"])
            there = inventory.bitmaps_of(node, reply)
            after[node] = bitmaps.applied(there, plan.actions, freed=exported)
            left += plan.planned
    return Foreseen(inventory.with_bitmaps(found, after), tuple(left))


def active_nodes(facts: PointFacts) -> dict[int, NodeName]:
    """Return the active node of each disk of an unfinished run, by the disk's number in it."""
    return {disk.number: disk.node for run in facts.unfinished() for disk in run.disks}


def bitmap_plans(
    monitor: Monitor, facts: PointFacts
) -> Iterator[tuple[bitmaps.BitmapPlan, Mapping[str, Any]]]:
    """Yield what must happen to each node's bitmaps, with the node's reply. Raises MonitorError."""
    checkpoints = facts.checkpoints()
    found = [
        (inventory.bitmaps_of(node, reply), reply) for node, reply in inventory.named_nodes(monitor).items()
    ]
    undone = {point for each, _ in found for point in _undone(each, facts)}
    absent = facts.what_became_of(undone) if undone else {}
    for each, reply in found:
        yield (
            bitmaps.plan_bitmap_recovery(
                each, facts.namespace, facts.is_committed, checkpoints, absent, facts.is_another_vms
            ),
            reply,
        )


def _undone(found: Iterable[Bitmap], facts: PointFacts) -> Iterator[PointId]:
    """Yield the points that bitmaps of a node name and that are not committed."""
    for one in found:
        point = facts.namespace.point_of(one.name)
        if point is not None and not facts.is_committed(point):
            yield point


def _try_apart(monitor: Monitor, plan: bitmaps.BitmapPlan) -> list[str]:
    try:
        monitor.transaction(list(plan.actions))
    except CommandFailed:
        return []
    return list(plan.done)


def _beneath_ours(facts: PointFacts, left: Iterable[str]) -> dict[DiskName, NodeName]:
    """Return the disks over which an unfinished run has a job or filter, with the nodes below, as noted."""
    ours, name = {one.split()[-1] for one in left}, facts.namespace.node
    return {
        disk.name: disk.node
        for run in facts.unfinished()
        for disk in run.disks
        if ours & {name(NodeKind.JOB, disk.number), name(NodeKind.FILTER, disk.number)}
    }
