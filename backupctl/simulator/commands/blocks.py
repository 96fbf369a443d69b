# SPDX-License-Identifier: GPL-2.0-or-later
"""Block nodes."""

from typing import Any

from backupctl.simulator import describe
from backupctl.simulator.arguments import Form
from backupctl.simulator.commands.table import Arguments, command, open_command
from backupctl.simulator.failure import CommandError
from backupctl.simulator.graph import UNNAMED, descendants, filters_in_use, refuse, shown
from backupctl.simulator.guest import BLOCK
from backupctl.simulator.machine import Machine
from backupctl.simulator.nodes import Link


@open_command("blockdev-add")
def blockdev_add(vm: Machine, given: Arguments) -> dict[str, Any]:
    """Make a node."""
    if "driver" not in given:
        raise CommandError("Parameter 'driver' is missing")
    vm.opener.open(given)
    return {}


@command("blockdev-del", {"node-name": "str"})
def blockdev_del(vm: Machine, given: Arguments) -> dict[str, Any]:
    """Delete an unused node."""
    vm.graph.delete(given["node-name"])
    return {}


@command("query-named-block-nodes", {"flat?": "bool"})
def query_named_block_nodes(vm: Machine, given: Arguments) -> list[dict[str, Any]]:
    """Return all nodes, newest first."""
    nodes = reversed(vm.graph.nodes.values())
    return [describe.node(node, vm.settings.version, with_backing=not given.get("flat")) for node in nodes]


RESIZE: Form = {"device?": "str", "node-name?": "str", "size": "int"}


@command("block_resize", RESIZE)
def block_resize(vm: Machine, given: Arguments) -> dict[str, Any]:
    """Resize a disk."""
    device, name = given.get("device", ""), given.get("node-name", "")
    node = vm.graph.find(name, device)
    if given["size"] < 0:
        raise CommandError("Parameter 'size' expects a >0 size")
    if node.blockers and vm.settings.version < (8, 0, 0):
        raise CommandError(f"Device '{given.get('device', '(null)')}' is in use")
    if node.blockers:
        raise CommandError(f"Node '{node.name}' is busy: {node.blockers[-1]}")
    fixed = next((each for each in node.parents if each.role in ("export", "target")), None)
    fixed = fixed or next(iter(filters_in_use(node)), None)
    if fixed is not None:
        raise refuse(node, "resize", shown(Link("export", None, UNNAMED, node)), shown(fixed))
    if node.read_only:
        raise CommandError("Image is read-only")
    if node.driver == "qcow2" and given["size"] % BLOCK:
        raise CommandError(f"The new size must be a multiple of {BLOCK}")
    for bitmap in node.bitmaps.values():
        bitmap.check()
    try:
        node.resize(given["size"])
    except OSError as err:
        raise CommandError(f"Could not resize: {err.strerror}") from err
    return {}


@command("blockdev-snapshot", {"node": "str", "overlay": "str"})
def blockdev_snapshot(vm: Machine, given: Arguments) -> dict[str, Any]:
    """Take an external snapshot: from now on the guest writes to the overlay."""
    node = vm.graph.find(given["node"])
    if node.blockers:
        raise CommandError(f"Node '{node.name}' is busy: {node.blockers[-1]}")
    overlay = vm.graph.find(given["overlay"])
    if any(link.role in ("device", "export") for link in overlay.parents):
        raise CommandError("The overlay is already in use")
    if overlay.driver != "qcow2":
        raise CommandError("The overlay does not support backing images")
    if overlay.child("backing") is not None:
        raise CommandError("The overlay already has a backing image")
    if overlay in (node, *descendants(node)):
        raise CommandError(f"Making '{node.name}' a backing child of '{overlay.name}' would create a cycle")
    vm.graph.replace(node, overlay)
    vm.graph.link("backing", overlay, overlay.name, node)
    node.close_for_writing()
    return {}


@command("block-set-write-threshold", {"node-name": "str", "write-threshold": "int"})
def block_set_write_threshold(vm: Machine, given: Arguments) -> dict[str, Any]:
    """Emit an event when a write ends behind an offset; 0 for none."""
    if given["node-name"] not in vm.graph.nodes:
        raise CommandError(f"Device '{given['node-name']}' not found")
    vm.graph.nodes[given["node-name"]].write_threshold = given["write-threshold"]
    return {}
