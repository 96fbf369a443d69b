# SPDX-License-Identifier: GPL-2.0-or-later
"""The NBD server and its exports."""

import errno
import os
import socket
from pathlib import Path
from typing import Any

from backupctl.simulator import arguments
from backupctl.simulator.arguments import Form
from backupctl.simulator.commands.bitmaps import check_sources
from backupctl.simulator.commands.table import Arguments, command
from backupctl.simulator.dirty import DirtyBitmap
from backupctl.simulator.failure import CommandError
from backupctl.simulator.graph import (
    UNNAMED,
    chain,
    check_filters,
    filters_in_use,
    is_id,
    refuse,
    shown,
    writing_device,
)
from backupctl.simulator.machine import Machine
from backupctl.simulator.nbd.export import Export
from backupctl.simulator.nbd.wire import MAX_NAME_BYTES
from backupctl.simulator.nodes import Link, Node

EXPORT: Form = {
    "type": ("nbd",),
    "id": "str",
    "node-name": "str",
    "name?": "str",
    "writable?": "bool",
    "bitmaps?": "list",
    "description?": "str",
    "allocation-depth?": "bool",
    "writethrough?": "bool",
    "iothread?": "str",
    "fixed-iothread?": "bool",
}
_BACKLOG = 10
_MOST_CLIENTS = 100
_PATH_BYTES = 107  # of a socket's address


@command(
    "nbd-server-start",
    {"addr": "dict", "tls-creds?": "str", "tls-authz?": "str", "max-connections?": "uint32"},
)
def nbd_server_start(vm: Machine, given: Arguments) -> dict[str, Any]:
    """Listen on a unix socket, by name or as a descriptor."""
    arguments.check({"type": ("unix", "fd"), "data": "dict"}, given["addr"], "addr.")
    if vm.nbd.running:
        raise CommandError("NBD server already running")
    if "tls-creds" in given:
        raise CommandError(f"No TLS credentials with id '{given['tls-creds']}'")
    most = given.get("max-connections", _MOST_CLIENTS)
    kind, data = given["addr"]["type"], given["addr"]["data"]
    if kind == "fd":
        arguments.check({"str": "str"}, data, "addr.data.")
        vm.nbd.start(socket.socket(fileno=vm.descriptors.take(data["str"])), most)
    else:
        arguments.check({"path": "str"}, data, "addr.data.")
        vm.nbd.start(_listen(data["path"]), most)
    return {}


@command("nbd-server-stop")
def nbd_server_stop(vm: Machine, _given: Arguments) -> dict[str, Any]:
    """Stop the server."""
    vm.stop_nbd()
    return {}


@command("block-export-add", EXPORT)
def block_export_add(vm: Machine, given: Arguments) -> dict[str, Any]:
    """Export a node."""
    if not is_id(given["id"]):
        raise CommandError("Invalid block export id")
    if given["id"] in vm.exports:
        raise CommandError(f"Block export id '{given['id']}' is already in use")
    check_sources(given)
    node = vm.graph.find(given["node-name"], "")
    writable = bool(given.get("writable"))
    if writable and node.read_only:
        raise CommandError("Cannot export read-only node as writable")
    if (iothread := given.get("iothread")) and all(d.iothread != iothread for d in vm.devices.values()):
        raise CommandError(f'iothread "{iothread}" not found')
    name, description = str(given.get("name", given["node-name"])), given.get("description", "")
    for what, text in (("export name", name), ("description", description)):
        if len(text.encode()) > MAX_NAME_BYTES:
            raise CommandError(f"{what} '{text}' too long")
    vm.nbd.check_new(name)
    if writable:
        _check_sole_writer(node)
    bitmaps = _bitmaps(vm, node, given.get("bitmaps", []), writable=writable)
    link = vm.graph.link("export", None, UNNAMED, node)
    try:
        check_filters(node)
    except CommandError:
        vm.graph.unlink(link)
        raise
    for bitmap in bitmaps:
        bitmap.busy += 1
    export = Export(given["id"], name, link, writable, description)
    export.depth, export.bitmaps = bool(given.get("allocation-depth")), bitmaps
    vm.exports[export.id] = vm.nbd.exports[name] = export
    return {}


@command("block-export-del", {"id": "str", "mode?": ("safe", "hard")})
def block_export_del(vm: Machine, given: Arguments) -> dict[str, Any]:
    """Remove an export; one with clients only with mode=hard."""
    export = vm.exports.get(given["id"])
    if export is None:
        raise CommandError(f"Export '{given['id']}' is not found")
    if given.get("mode", "safe") == "safe" and export.clients:
        raise CommandError(f"export '{export.id}' still in use")
    vm.drop_export(export)
    return {}


@command("query-block-exports")
def query_block_exports(vm: Machine, _given: Arguments) -> list[dict[str, Any]]:
    """Return all exports."""
    return [
        {"id": each.id, "type": "nbd", "node-name": each.node.name, "shutting-down": each.shutting_down}
        for each in vm.exports.values()
    ]


def _listen(path: str) -> socket.socket:
    if len(path.encode()) > _PATH_BYTES:
        raise CommandError(f"UNIX socket path '{path}' is too long")
    if "\0" in path:
        raise CommandError(f"Failed to bind socket to {path}: {os.strerror(errno.ENOENT)}")
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as err:
        raise CommandError(f"Failed to unlink socket {path}: {err.strerror}") from err
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError as err:
        listener.close()
        raise CommandError(f"Failed to bind socket to {path}: {err.strerror}") from err
    return listener


def _check_sole_writer(node: Node) -> None:
    held = writing_device(node) or next(iter(filters_in_use(node)), None)
    if held is not None:
        raise refuse(node, "write", shown(Link("export", None, UNNAMED, node)), shown(held))


def _bitmaps(vm: Machine, node: Node, wanted: list[Any], *, writable: bool) -> tuple[DirtyBitmap, ...]:
    found = []
    for each in wanted:
        if isinstance(each, str):
            bitmap = next((n.bitmaps[each] for n in chain(node) if each in n.bitmaps), None)
            if bitmap is None:
                raise CommandError(f"Bitmap '{each}' is not found")
        else:
            bitmap = vm.graph.bitmap(each["node"], each["name"])[1]
        bitmap.check(read_only_too=True)
        if not writable and bitmap.recording and _on_chain(node, bitmap):
            raise CommandError(f"Enabled bitmap '{bitmap.name}' incompatible with readonly export")
        found.append(bitmap)
    return tuple(found)


def _on_chain(node: Node, bitmap: DirtyBitmap) -> bool:
    return any(each is bitmap for layer in chain(node) for each in layer.bitmaps.values())
