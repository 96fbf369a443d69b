# SPDX-License-Identifier: GPL-2.0-or-later
"""What of ours is in a domain, and how it is finished or undone: decided by the points' names.

Every line may be the last one of a dying process; the next call goes on from there. A checkpoint that must go
is deleted by itself: until then it costs memory, and tells nothing wrong.
"""

from collections.abc import Callable, Mapping

from backupctl.names import VmName
from backupctl.vm import scratch_directory
from backupctl.vm.driver import Foreseen, PointFacts
from backupctl.vm.libvirt import checkpoints, inventory, job
from backupctl.vm.libvirt.connection import PAUSED, PAUSED_BY_IO_ERROR, Connection
from backupctl.vm.libvirt.job import IsOurs


def owns(facts: PointFacts, vm: VmName) -> IsOurs:
    """Return what tells whether the socket of a backup is one of ours: by the directory that it is in."""
    prefix = scratch_directory.private_prefix(facts.namespace, vm)
    return lambda path: any(part.startswith(prefix) for part in path.split("/"))


def resolve(
    connection: Connection,
    facts: PointFacts,
    vm: VmName,
    *,
    drain: Callable[[], object] = lambda: None,
    hang_up: Callable[[], object] = lambda: None,
    close: Callable[[], None] = lambda: None,
) -> list[str]:
    """Do the work of `driver.Resolver.resolve`.

    drain, hang_up: as for `job.end`. close: closes our own NBD clients, when the job is gone, and not before.
    Raises MonitorError, Failed.
    """
    done = ["ended the backup job"] if job.end(connection, owns(facts, vm), drain, hang_up) else []
    close()
    if facts.unfinished() and connection.state() == (PAUSED, PAUSED_BY_IO_ERROR):
        job.resume(connection)
        done.append("resumed the guest, which an I/O error had paused")
    for one in checkpoints.plan(checkpoints.listed(connection), facts):
        checkpoints.delete(connection, one.checkpoint.name)
        done.append(one.done)
    return done


def foresee(
    connection: Connection, facts: PointFacts, vm: VmName, stored_names: Mapping[str, str]
) -> Foreseen:
    """Return what a run finds once it has recovered. Changes nothing. Raises MonitorError, Failed."""
    is_ours = owns(facts, vm)
    socket = job.socket_of_job(connection)
    left = [] if socket is None or not is_ours(socket) else ["backup job of an earlier run"]
    gone = checkpoints.plan(checkpoints.listed(connection), facts)
    found = inventory.inventory(connection, stored_names, is_ours, {one.checkpoint.name for one in gone})
    return Foreseen(found, (*left, *(one.planned for one in gone)))
