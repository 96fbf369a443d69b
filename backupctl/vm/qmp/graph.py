# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's block graph: which nodes lie under which, and which of them a block job has put in.

`x-debug-query-block-graph` is the one command that tells either (4.0 and later). Where it is missing, or
hidden by a policy, callers must do with less: `ask` returns None.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from backupctl.errors import CommandFailed
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.qmp.reply import text, understood

_COMMAND = "x-debug-query-block-graph"
_JOB, _NODE = "block-job", "block-driver"
_MOST_NAME = 4096


@dataclass(frozen=True)
class Graph:
    """The graph as far as it is asked for, by names.

    children: the nodes right under a node: file, data file, backing file, target of a filter. jobs: the
    nodes that a block job works on, to the job's id.
    """

    children: Mapping[str, frozenset[str]]
    jobs: Mapping[str, str]

    def under(self, node: str) -> frozenset[str]:
        """Return a node and all that lies under it."""
        found: set[str] = set()
        left = {node}
        while left:
            found |= left
            left = {child for each in left for child in self.children.get(each, ())} - found
        return frozenset(found)


def ask(monitor: Monitor) -> Graph | None:
    """Ask QEMU for its graph; None if this one does not tell. Raises MonitorError."""
    if _COMMAND not in monitor.commands:
        return None
    try:
        reply = monitor.execute(_COMMAND)
    except CommandFailed:
        return None
    with understood("block graph"):
        return _parse(reply)


def _parse(reply: Mapping[str, Any]) -> Graph:
    kinds = {node["id"]: (node["type"], text(node["name"], _MOST_NAME)) for node in reply["nodes"]}
    links = [(*kinds[edge["parent"]], kinds[edge["child"]][1]) for edge in reply["edges"]]
    children = _gathered((parent, child) for kind, parent, child in links if kind == _NODE)
    jobs = {child: parent for kind, parent, child in links if kind == _JOB}
    return Graph(children, jobs)


def _gathered(links: Iterable[tuple[str, str]]) -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for parent, child in links:
        found.setdefault(parent, set()).add(child)
    return {parent: frozenset(below) for parent, below in found.items()}
