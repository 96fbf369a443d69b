# SPDX-License-Identifier: GPL-2.0-or-later
"""What `query-block` and `query-named-block-nodes` tell of nodes and devices, member by member."""

import json
from typing import Any

from backupctl.simulator.nodes import Node, Qcow2Node, protocol_of
from backupctl.simulator.store import CLUSTER

_LIMITS = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")


def node(shown: Node, version: tuple[int, int, int], *, with_backing: bool) -> dict[str, Any]:
    """Return a node as `query-named-block-nodes` shows it.

    version: of QEMU. with_backing: its image's backing images too.
    """
    told: dict[str, Any] = dict.fromkeys(_LIMITS, 0)
    told |= {"node-name": shown.name, "drv": shown.driver, "ro": shown.read_only, "file": _file_name(shown)}
    told |= {"detect_zeroes": "off", "encrypted": False}
    told["backing_file_depth"] = _depth(shown) if with_backing else 0
    told |= {"write_threshold": shown.write_threshold}
    told["cache"] = {"writeback": True, "direct": False, "no-flush": False}
    told["image"] = image(shown, version, with_backing=with_backing)
    if version >= (10, 0, 0):
        told["active"] = True
    if version >= (11, 0, 0):
        links = reversed(shown.children.items())
        told["children"] = [{"node-name": link.node.name, "child": role} for role, link in links]
    backing = shown.child("backing")
    if backing is not None:
        told["backing_file"] = _file_name(backing)
    if shown.bitmaps:
        told["dirty-bitmaps"] = [bitmap.describe() for bitmap in reversed(shown.bitmaps.values())]
    return told


def image(shown: Node, version: tuple[int, int, int], *, with_backing: bool) -> dict[str, Any]:
    """Return what QEMU tells of a node's image; version and with_backing as for `node`."""
    told: dict[str, Any] = {"filename": _file_name(shown), "format": shown.driver}
    told |= {"virtual-size": shown.size, "actual-size": _actual_size(shown), "dirty-flag": False}
    if isinstance(shown, Qcow2Node):
        data = {"compat": "1.1", "compression-type": "zlib", "lazy-refcounts": False}
        data |= {"refcount-bits": 16, "corrupt": False, "extended-l2": False}
        told |= {"cluster-size": CLUSTER, "format-specific": {"type": "qcow2", "data": data}}
    if version >= (11, 0, 0):
        told["limits"] = _limits(shown)
    backing = shown.child("backing")
    if backing is not None and with_backing:
        told["backing-image"] = image(backing, version, with_backing=True)
    return told


def _limits(shown: Node) -> dict[str, int]:
    """Return QEMU's limits of requests to a node, as they are on files without direct I/O."""
    told = {"request-alignment": 1, "min-mem-alignment": 1, "opt-mem-alignment": 4096, "max-iov": 1024}
    if isinstance(shown, Qcow2Node):
        told["write-zeroes-alignment"] = CLUSTER
    if _is_made_of_clusters(shown):
        told["discard-alignment"] = CLUSTER
    return told


def _is_made_of_clusters(shown: Node) -> bool:
    children = (link.node for link in shown.children.values())
    return isinstance(shown, Qcow2Node) or any(_is_made_of_clusters(child) for child in children)


def _depth(shown: Node) -> int:
    backing = shown.child("backing")
    return 0 if backing is None else 1 + _depth(backing)


def _actual_size(shown: Node) -> int:
    file = protocol_of(shown.child("file")) or shown
    store = getattr(file, "store", None)
    return int(store.allocated_bytes()) if store is not None else 0


def _file_name(shown: Node) -> str:
    backing = shown.child("backing")
    if backing is None:
        return shown.filename
    # Linked by name, not by what the header says: QEMU then shows the options in place of a name.
    file = {"driver": "file", "filename": shown.filename}
    return "json:" + json.dumps({"backing": backing.filename, "driver": shown.driver, "file": file})
