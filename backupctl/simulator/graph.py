# SPDX-License-Identifier: GPL-2.0-or-later
"""The graph of block nodes: their names, who uses whom, and what that forbids."""

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
"""Roles of users that are no nodes: QEMU's block backends."""


class Graph:
    """All nodes of a virtual machine, oldest first."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self._numbers = itertools.count(100)

    def automatic_name(self) -> str:
        """Make a name up, as QEMU does for nodes that were given none."""
        return f"#block{next(self._numbers):03d}"

    def check_new_name(self, name: str) -> None:
        """Raise CommandError for a node name that is taken or can't be."""
        if not is_id(name):
            raise CommandError(f"Invalid node-name: '{name}'")
        if len(name) > MAX_NODE_NAME:
            raise CommandError("Node name too long")
        if name in self.nodes:
            raise CommandError(f"Duplicate nodes with node-name='{name}'")

    def add(self, node: Node) -> None:
        """Take a node in."""
        self.nodes[node.name] = node

    def find(self, name: str, device: str | None = None) -> Node:
        """Return a node. device: what the command calls the device, where it may name one."""
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
        """Let a node be used. name: of the user, as QEMU prints it."""
        made = Link(role, user, name, node)
        node.parents.append(made)
        if user is not None:
            user.children[role] = made
        if role == "backing":
            node.blockers.append(f"node is used as backing hd of '{name}'")
        return made

    def unlink(self, link: Link) -> None:
        """End a use; a node that `blockdev-add` did not make goes with its last user."""
        node = link.node
        node.parents.remove(link)
        if link.user is not None:
            del link.user.children[link.role]
        if link.role == "backing":
            node.blockers.remove(f"node is used as backing hd of '{link.name}'")
        if not node.owned and not node.parents:
            self.drop(node)

    def move(self, link: Link, node: Node) -> None:
        """Let a user use another node instead."""
        link.node.parents.remove(link)
        if link.role == "backing":
            reason = f"node is used as backing hd of '{link.name}'"
            link.node.blockers.remove(reason)
            node.blockers.append(reason)
        link.node = node
        node.parents.append(link)

    def replace(self, old: Node, new: Node) -> None:
        """Let all users of a node use another, but for those that the other one itself rests on."""
        for link in [each for each in old.parents if self.may_move(each, new)]:
            self.move(link, new)

    def may_move(self, link: Link, node: Node) -> bool:
        """Whether a user could use this node without coming to rest on itself."""
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
        """Take a node out that nobody uses, and what only it used."""
        for link in list(node.children.values()):
            self.unlink(link)
        del self.nodes[node.name]
        _close_store(node)

    def connected(self, one: Node, other: Node) -> bool:
        """Whether two nodes rest on a common one."""
        below = {id(node) for node in (one, *descendants(one))}
        return any(id(node) in below for node in (other, *descendants(other)))

    def close(self) -> None:
        """Let go of all files, in whatever state the nodes are."""
        for node in self.nodes.values():
            _close_store(node)
        self.nodes = {}


def descendants(node: Node) -> Iterator[Node]:
    """Yield all nodes below a node."""
    for link in node.children.values():
        yield link.node
        yield from descendants(link.node)


def chain(node: Node | None) -> Iterator[Node]:
    """Yield a node and those under it whose content shows: backing files and filtered nodes."""
    while node is not None:
        yield node
        node = node.child("backing") or (None if node.driver == "qcow2" else node.child("file"))


def check_filters(node: Node) -> None:
    """Raise CommandError where somebody writes to a node past a copy-before-write filter that is in use.

    node: a filter, or what lies under filters.
    """
    below = node.file if isinstance(node, CopyBeforeWrite) else node
    for held in filters_in_use(below):
        writer = next((each for each in below.parents if each is not held and _writes(each)), None)
        if writer is not None:
            raise refuse(below, "write", shown(writer), shown(held))


def filters_in_use(node: Node) -> list[Link]:
    """Return the uses of a node by copy-before-write filters that somebody uses in turn."""
    filters = [
        link for link in node.parents if link.role == "file" and isinstance(link.user, CopyBeforeWrite)
    ]
    return [link for link in filters if link.user is not None and link.user.parents]


def _writes(link: Link) -> bool:
    if link.role == "device":
        return not link.node.read_only
    return isinstance(link.user, CopyBeforeWrite) and any(_writes(each) for each in link.user.parents)


def refuse(node: Node, what: str, wanting: str, holding: str) -> CommandError:
    """Return the error for a node that one user would use in a way that another one forbids.

    what: the permission. wanting, holding: the two users, in the words of `shown`.
    """
    return CommandError(
        f"Permission conflict on node '{node.name}': permissions '{what}' are both required by {wanting} "
        f"and unshared by {holding}."
    )


def shown(link: Link) -> str:
    """Tell of a use of a node, as QEMU does in messages."""
    if link.user is not None:
        return f"node '{link.name}' (uses node '{link.node.name}' as '{link.role}' child)"
    user = link.name if link.role == "export" else f"block device '{link.name}'"
    return f"{user} (uses node '{link.node.name}' as 'root' child)"


def is_id(text: str) -> bool:
    """Whether QEMU takes a text for an identifier."""
    return bool(_ID.match(text))


def writing_device(node: Node) -> Link | None:
    """Return the device that writes to a node directly, None if there is none."""
    return next((link for link in node.parents if link.role == "device" and not node.read_only), None)


def _close_store(node: Node) -> None:
    store = getattr(node, "store", None)
    if store is not None:
        store.close()
