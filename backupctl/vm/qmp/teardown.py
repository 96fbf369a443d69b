# SPDX-License-Identifier: GPL-2.0-or-later
"""Taking a point-in-time view down: in a fixed order, as often as needed, from whatever state.

Nothing is remembered; QEMU is asked what there is of ours, and where there was anything, whether it has gone.
So the same lines serve the end of a good run, the end of a failed one, and `recover` after a death anywhere.

The order: first the limits on scratch files are eased, since what waits in them could keep an export or a
job; then exports (the SERVER closes first, while the client is still connected: on Debian's QEMU 7.2
a client that leaves first kills a VM whose disk has an iothread), NBD server, filters, jobs, nodes,
descriptors.
"""

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from backupctl.errors import CommandFailed, MonitorError
from backupctl.names import Namespace, NodeKind, NodeName, node_parts, removal_order, sibling
from backupctl.system import open_files
from backupctl.vm.qmp import throttle
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.qmp.nbd_export import descriptor_name
from backupctl.vm.qmp.point_in_time import device_path
from backupctl.vm.qmp.reply import flag, number, text, understood


@dataclass(frozen=True)
class Clients:
    """What must be done to what we hold ourselves while the view goes: NBD clients, and scratch files.

    drain: throw away what QEMU has still to say to our clients; it doesn't let go of an export while a reply
    waits to be read, `mode=hard` or not
    (``test_a_run_that_ends_with_replies_unread_leaves_no_export``). close: close them. free_scratch:
    free the space of the scratch files, which no node uses any more.
    """

    drain: Callable[[], None] = lambda: None
    close: Callable[[], None] = lambda: None
    free_scratch: Callable[[], None] = lambda: None


NO_CLIENTS = Clients()


def teardown(
    monitor: Monitor,
    namespace: Namespace,
    actives: Mapping[int, NodeName],
    *,
    clients: Clients = NO_CLIENTS,
    server_is_ours: bool = True,
    patience_seconds: float = 30,
) -> list[str]:
    """Remove every export, filter, job, node and descriptor of ours, and the NBD server for them.

    clients: our own NBD clients, if there are any. They go when no export is left and before the server
    is stopped, since one that has not shaken hands makes that hang QEMU's main loop
    (7.2.22; docs/protocol.md, "Unexpected behaviour of QEMU").
    actives: a disk's number in the run to its active node, from the run's journal; needed to give a
    device its disk back where a filter is in place.
    server_is_ours: false if the run was told that someone else's NBD server runs.
    Returns what was done, in words. Raises MonitorError; what is left then is found again by the next call.
    """
    done = []
    throttle.relax(monitor, namespace)
    ours = _ours(monitor, namespace, "query-block-exports", "id")
    nodes = _ours(monitor, namespace, "query-named-block-nodes", "node-name")
    for name in ours:
        _unless_gone(monitor, "block-export-del", {"id": name, "mode": "hard"})
        done.append(f"removed the export {name}")

    def gone() -> bool:
        clients.drain()
        return not _ours(monitor, namespace, "query-block-exports", "id")

    if ours:
        _until(gone, "its exports", patience_seconds)
    clients.close()
    # Our nodes stand from before the server starts until after it stops, so without them it isn't ours.
    if (ours or nodes) and server_is_ours and not _others_use_nbd(monitor):
        _unless_gone(monitor, "nbd-server-stop", None)
    if "closefd" in monitor.commands:
        _unless_gone(monitor, "closefd", {"fdname": descriptor_name(namespace)})
    done += _remove_filters(monitor, namespace, actives)
    throttle.disable(monitor, namespace)
    if jobs := _ours(monitor, namespace, "query-jobs", "id"):
        for name in jobs:
            _end_job(monitor, name)
            done.append(f"ended the job {name}")
        _until(lambda: not _ours(monitor, namespace, "query-jobs", "id"), "its jobs", patience_seconds)
    # A node before those that it is on top of: QEMU removes none that another uses.
    for name in sorted(nodes, key=removal_order):
        if _kind(name) is NodeKind.FILE:  # QEMU removes it with the scratch node
            continue
        _unless_gone(monitor, "blockdev-del", {"node-name": name})
        done.append(f"removed the node {name}")
    if nodes and (left := _ours(monitor, namespace, "query-named-block-nodes", "node-name")):
        raise MonitorError(f"QEMU did not remove the node {left[0]}: something else uses it")
    done += [f"removed the limit {name}" for name in throttle.remove(monitor, namespace)]
    clients.free_scratch()
    if "query-fdsets" in monitor.commands and (fdsets := _fdsets(monitor, namespace)):
        done += _remove_fdsets(monitor, namespace, fdsets)
    return done


def leftovers(monitor: Monitor, namespace: Namespace) -> list[str]:
    """Name what `teardown` would remove, changing nothing. Raises MonitorError."""
    found = [f"export {name}" for name in _ours(monitor, namespace, "query-block-exports", "id")]
    found += [f"job {name}" for name in _ours(monitor, namespace, "query-jobs", "id")]
    found += [f"node {name}" for name in _ours(monitor, namespace, "query-named-block-nodes", "node-name")]
    found += [f"limit {name}" for name in throttle.ours(monitor, namespace)]
    if "query-fdsets" in monitor.commands:
        found += _held(monitor, namespace) if _runs(monitor) else _held_by_paused(monitor, namespace)
    return found


def _held(monitor: Monitor, namespace: Namespace) -> list[str]:
    return [f"descriptor set {each}" for each in _fdsets(monitor, namespace)]


def _held_by_paused(monitor: Monitor, namespace: Namespace) -> list[str]:
    """Name the descriptor sets that keep room; an empty file costs nothing, and goes when the VM goes on."""
    found = []
    for each, numbers in _fdsets(monitor, namespace).items():
        held = _held_bytes(monitor, numbers)
        if held != 0:
            room = "an amount that cannot be looked up from here" if held is None else f"{-(-held >> 20)} MiB"
            found.append(f"descriptor set {each}: the paused VM keeps a scratch file open ({room})")
    return found


def _held_bytes(monitor: Monitor, numbers: Iterable[int]) -> int | None:
    """Return what QEMU's descriptors of scratch files take on the disk; None if that is not known."""
    if monitor.process is None or not open_files.is_qemu(monitor.process):
        return None
    try:
        with ExitStack() as opened:
            total = 0
            for each in numbers:
                descriptor = open_files.descriptor(monitor.process, each)
                opened.callback(os.close, descriptor)
                total += os.fstat(descriptor).st_blocks * 512
            return total
    except OSError:
        return None


def _empty_fdsets(monitor: Monitor, fdsets: Mapping[int, Iterable[int]]) -> list[str]:
    """Free the space of scratch files that QEMU keeps open although it was told to remove them.

    No node stands on them any more. Returns what was done.
    """
    done = []
    for each, numbers in fdsets.items():
        if held := _held_bytes(monitor, numbers):
            for descriptor in numbers:
                _empty(monitor, descriptor)
            done.append(
                f"gave back {-(-held >> 20)} MiB of the descriptor set {each}, which the VM keeps open"
            )
    return done


def _empty(monitor: Monitor, its: int) -> None:
    assert monitor.process is not None
    with suppress(OSError):
        descriptor = open_files.descriptor(monitor.process, its)
        try:
            os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)


def _runs(monitor: Monitor) -> bool:
    status = monitor.execute("query-status")
    with understood("query-status"):
        return flag(status["running"])


def _others_use_nbd(monitor: Monitor) -> bool:
    # Ours are gone by now. An export over vhost-user or FUSE needs no NBD server.
    exports = monitor.execute("query-block-exports")
    with understood("query-block-exports"):
        return any(export.get("type", "nbd") == "nbd" for export in exports)


def _end_job(monitor: Monitor, name: str) -> None:
    try:
        monitor.execute("block-job-cancel", {"device": name, "force": True})
    except CommandFailed:
        # It has ended by itself since it was listed, or waits to be dismissed.
        _unless_gone(monitor, "job-dismiss", {"id": name})


def _remove_filters(monitor: Monitor, namespace: Namespace, actives: Mapping[int, NodeName]) -> list[str]:
    """Give each device that writes through a filter of ours its active node back."""
    done = []
    devices = monitor.execute("query-block")
    with understood("query-block"):
        roots = {
            device["inserted"].get("node-name", ""): text(device.get("qdev", ""))
            for device in devices
            if device.get("inserted")
        }
        ours = {root: node_parts(root) for root in roots if namespace.owns(root)}
    for root, parts in ours.items():
        if parts is None or parts[0] is not NodeKind.FILTER:
            continue
        qdev = roots[root]
        active = _child_of(monitor, root) or actives.get(parts[1])
        if active is None:
            raise MonitorError(
                f"the device {qdev} writes through the filter {root}, and the run's journal, which "
                "knew its own node, is lost; qom-set its drive property by hand"
            )
        _unless_gone(monitor, "blockdev-del", {"node-name": sibling(root, NodeKind.ACCESS)})
        drive = {"path": device_path(qdev), "property": "drive", "value": active}
        monitor.execute("qom-set", drive)
        done.append(f"removed the filter {root} from {qdev}")
    return done


def _kind(name: str) -> NodeKind | None:
    parts = node_parts(name)
    return parts[0] if parts else None


def _child_of(monitor: Monitor, root: str) -> NodeName | None:
    """Return the node that a filter stands on now, None if this QEMU does not tell.

    Not always the one that it was put on: an external snapshot taken meanwhile has gone in between, and to
    set the device to what lies below it would take from the guest what it wrote since.
    """
    if "x-debug-query-block-graph" not in monitor.commands:
        return None
    graph = monitor.execute("x-debug-query-block-graph")
    with understood("x-debug-query-block-graph"):
        names = {node["id"]: text(node["name"]) for node in graph["nodes"]}
        below = [
            NodeName(names[edge["child"]])
            for edge in graph["edges"]
            if edge["name"] == "file" and names[edge["parent"]] == root
        ]
    return below[0] if below else None


def _remove_fdsets(monitor: Monitor, namespace: Namespace, before: Collection[int]) -> list[str]:
    """Remove our descriptor sets; free the space of those that QEMU keeps.

    QEMU marks them and lets go at once while the guest runs, else (before 9.1) when they are removed again
    or the monitor's last client leaves while it runs (conformance script
    `a_stopped_machine_may_keep_a_removed_set`; its monitor/fds.c asks runstate_is_running).
    """
    for each in before:
        _unless_gone(monitor, "remove-fd", {"fdset-id": each})
    kept = _fdsets(monitor, namespace)
    done = [f"removed the descriptor set {each}" for each in sorted(before) if each not in kept]
    return done + _empty_fdsets(monitor, kept)


def _fdsets(monitor: Monitor, namespace: Namespace) -> dict[int, tuple[int, ...]]:
    """Return our descriptor sets, each with QEMU's own numbers of its descriptors. Raises MonitorError."""
    fdsets = monitor.execute("query-fdsets")
    with understood("query-fdsets"):
        return {
            number(fdset["fdset-id"]): tuple(number(fd["fd"]) for fd in fdset["fds"])
            for fdset in fdsets
            if any(namespace.owns(fd.get("opaque", "")) for fd in fdset["fds"])
        }


def _ours(monitor: Monitor, namespace: Namespace, query: str, key: str) -> list[str]:
    arguments = {"flat": True} if query == "query-named-block-nodes" else None
    entries = monitor.execute(query, arguments)
    with understood(query):
        return [entry[key] for entry in entries if namespace.owns(entry.get(key, ""))]


def _unless_gone(monitor: Monitor, command: str, arguments: dict[str, object] | None) -> None:
    """Send a command that takes something away.

    A refusal is no failure here: most often the thing is gone already. If it isn't, the next question
    to QEMU shows it, and `teardown` fails there.
    """
    try:
        monitor.execute(command, arguments)
    except CommandFailed:
        return


def _until(gone: Callable[[], bool], what: str, patience_seconds: float) -> None:
    deadline = time.monotonic() + patience_seconds
    while not gone():
        if time.monotonic() > deadline:
            raise MonitorError(f"QEMU did not remove {what} within {patience_seconds:g} s")
        time.sleep(0.01)
