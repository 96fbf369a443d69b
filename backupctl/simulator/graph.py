# SPDX-License-Identifier: GPL-2.0-or-later
"""The graph of block nodes: their names, their links, and the permissions that these imply."""

import itertools
import re
from collections.abc import Iterator

from backupctl.simulator.dirty import DirtyBitmap
from backupctl.simulator.failure import CommandError
from backupctl.simulator.filters import CopyBeforeWrite
from backupctl.simulator.nodes import Link, Node

MAX_NODE_NAME = 31
_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*\Z")
UNNAMED = "an unnamed block device"
OUTSIDE = ("device", "export")
"""Roles of users that are not nodes: QEMU's block backends."""


class Graph:
    """All nodes of a virtual machine, oldest first."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self._numbers = itertools.count(100)

    def automatic_name(self) -> str:
        """Generate a name, as QEMU does for nodes without one."""
        return f"#block{next(self._numbers):03d}"

    def check_new_name(self, name: str) -> None:
        """Raise CommandError for a node name that is taken or invalid."""
        if not is_id(name):
            raise CommandError(f"Invalid node-name: '{name}'")
        if len(name) > MAX_NODE_NAME:
            raise CommandError("Node name too long")
        if name in self.nodes:
            raise CommandError(f"Duplicate nodes with node-name='{name}'")

    def add(self, node: Node) -> None:
        """Add a node."""
        self.nodes[node.name] = node

    def find(self, name: str, device: str | None = None) -> Node:
        """Return a node. device: the device that the command names, if any. Raises CommandError."""
        if name not in self.nodes:
            shown = name if device is None else device
            raise CommandError(f"Cannot find device='{shown}' nor node-name='{name}'")
        return self.nodes[name]

    def bitmap(self, node: str, name: str) -> tuple[Node, DirtyBitmap]:
        """Return a bitmap and its node, as the bitmap commands look for them. Raises CommandError."""
        if node not in self.nodes:
            raise CommandError(f"Node '{node}' not found")
        found = self.nodes[node]
        if name not in found.bitmaps:
            raise CommandError(f"Dirty bitmap '{name}' not found")
        return found, found.bitmaps[name]

    def link(self, role: str, user: Node | None, name: str, node: Node) -> Link:
        """Add a link to a node. name: of the user, as QEMU prints it. Raises CommandError."""
        made = Link(role, user, name, node)
        node.parents.append(made)
        if user is not None:
            user.children[role] = made
        if role == "backing":
            node.blockers.append(f"node is used as backing hd of '{name}'")
        return made

    def unlink(self, link: Link) -> None:
        """Remove a link; a node that `blockdev-add` did not make is deleted with its last link."""
        node = link.node
        node.parents.remove(link)
        if link.user is not None:
            del link.user.children[link.role]
        if link.role == "backing":
            node.blockers.remove(f"node is used as backing hd of '{link.name}'")
        if not node.owned and not node.parents:
            self.drop(node)

    def move(self, link: Link, node: Node) -> None:
        """Point a link at another node."""
        link.node.parents.remove(link)
        if link.role == "backing":
            reason = f"node is used as backing hd of '{link.name}'"
            link.node.blockers.remove(reason)
            node.blockers.append(reason)
        link.node = node
        node.parents.append(link)

    def replace(self, old: Node, new: Node) -> None:
        """Point all links to a node at another one, except those that would make a cycle."""
        for link in [each for each in old.parents if self.may_move(each, new)]:
            self.move(link, new)

    def may_move(self, link: Link, node: Node) -> bool:
        """Whether a link to this node makes no cycle."""
        return link.user is None or all(link.user is not each for each in (node, *descendants(node)))

    def delete(self, name: str) -> None:
        """Delete a node as `blockdev-del` does. Raises CommandError while it is in use."""
        if name not in self.nodes:
            raise CommandError(f"Failed to find node with node-name='{name}'")
        node = self.nodes[name]
        if any(link.role in OUTSIDE for link in node.parents):
            raise CommandError(f"Node {name} is in use")
        if node.blockers:
            raise CommandError(f"Node '{name}' is busy: {node.blockers[-1]}")
        if not node.owned:
            raise CommandError(f"Node {name} is not owned by the monitor")
        if node.parents:
            raise CommandError(f"Block device {name} is in use")
        self.drop(node)

    def drop(self, node: Node) -> None:
        """Delete an unused node, and the nodes that only it used."""
        for link in list(node.children.values()):
            self.unlink(link)
        del self.nodes[node.name]
        _close_store(node)

    def connected(self, one: Node, other: Node) -> bool:
        """Whether two nodes share a node below them."""
        below = {id(node) for node in (one, *descendants(one))}
        return any(id(node) in below for node in (other, *descendants(other)))

    def close(self) -> None:
        """Close all files, whatever the state of the nodes."""
        for node in self.nodes.values():
            _close_store(node)
        self.nodes = {}


def descendants(node: Node) -> Iterator[Node]:
    """Yield all nodes below a node."""
    for link in node.children.values():
        yield link.node
        yield from descendants(link.node)


def chain(node: Node | None) -> Iterator[Node]:
    """Yield a node and those below it that its content comes from: backing files and filtered nodes."""
    while node is not None:
        yield node
        node = node.child("backing") or (None if node.driver == "qcow2" else node.child("file"))


def check_filters(node: Node) -> None:
    """Raise CommandError where a user writes to a node past a copy-before-write filter that is in use.

    node: a filter, or a node below filters.
    """
    below = node.file if isinstance(node, CopyBeforeWrite) else node
    for held in filters_in_use(below):
        writer = next((each for each in below.parents if each is not held and _writes(each)), None)
        if writer is not None:
            raise refuse(below, "write", shown(writer), shown(held))


def filters_in_use(node: Node) -> list[Link]:
    """Return the links to a node from copy-before-write filters that are themselves in use."""
    filters = [
        link for link in node.parents if link.role == "file" and isinstance(link.user, CopyBeforeWrite)
    ]
    return [link for link in filters if link.user is not None and link.user.parents]


def _writes(link: Link) -> bool:
    if link.role == "device":
        return not link.node.read_only
    return isinstance(link.user, CopyBeforeWrite) and any(_writes(each) for each in link.user.parents)


def refuse(node: Node, what: str, wanting: str, holding: str) -> CommandError:
    """Return the error for a permission that one user of a node needs and another one forbids.

    what: the permission. wanting, holding: the two users, as `shown` prints them.
    """
    return CommandError(
        f"Permission conflict on node '{node.name}': permissions '{what}' are both required by {wanting} "
        f"and unshared by {holding}."
    )


def shown(link: Link) -> str:
    """Return a link as QEMU prints it in messages."""
    if link.user is not None:
        return f"node '{link.name}' (uses node '{link.node.name}' as '{link.role}' child)"
    user = link.name if link.role == "export" else f"block device '{link.name}'"
    return f"{user} (uses node '{link.node.name}' as 'root' child)"


def is_id(text: str) -> bool:
    """Whether a text is an identifier to QEMU."""
    return bool(_ID.match(text))


def writing_device(node: Node) -> Link | None:
    """Return the device that writes to a node directly, None if there is none."""
    return next((link for link in node.parents if link.role == "device" and not node.read_only), None)


def _close_store(node: Node) -> None:
    store = getattr(node, "store", None)
    if store is not None:
        store.close()
