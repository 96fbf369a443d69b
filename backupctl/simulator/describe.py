# SPDX-License-Identifier: GPL-2.0-or-later
"""What `query-block` and `query-named-block-nodes` return of nodes and devices."""

import json
from typing import Any

from backupctl.simulator.nodes import Node, Qcow2Node, protocol_of
from backupctl.simulator.store import CLUSTER

_LIMITS = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")


def node(shown: Node, version: tuple[int, int, int], *, with_backing: bool) -> dict[str, Any]:
    """Return a node as `query-named-block-nodes` does.

    version: of QEMU. with_backing: include the backing images.
    """
    described: dict[str, Any] = dict.fromkeys(_LIMITS, 0)
    described |= {
        "node-name": shown.name,
        "drv": shown.driver,
        "ro": shown.read_only,
        "file": _file_name(shown),
    }
    described |= {"detect_zeroes": "off", "encrypted": False}
    described["backing_file_depth"] = _depth(shown) if with_backing else 0
    described |= {"write_threshold": shown.write_threshold}
    described["cache"] = {"writeback": True, "direct": False, "no-flush": False}
    described["image"] = image(shown, version, with_backing=with_backing)
    if version >= (10, 0, 0):
        described["active"] = True
    if version >= (11, 0, 0):
        links = reversed(shown.children.items())
        described["children"] = [{"node-name": link.node.name, "child": role} for role, link in links]
    backing = shown.child("backing")
    if backing is not None:
        described["backing_file"] = _file_name(backing)
    if shown.bitmaps:
        described["dirty-bitmaps"] = [bitmap.describe() for bitmap in reversed(shown.bitmaps.values())]
    return described


def image(shown: Node, version: tuple[int, int, int], *, with_backing: bool) -> dict[str, Any]:
    """Return a node's image as QEMU describes it; version and with_backing as for `node`."""
    described: dict[str, Any] = {"filename": _file_name(shown), "format": shown.driver}
    described |= {"virtual-size": shown.size, "actual-size": _actual_size(shown), "dirty-flag": False}
    if isinstance(shown, Qcow2Node):
        data = {"compat": "1.1", "compression-type": "zlib", "lazy-refcounts": False}
        data |= {"refcount-bits": 16, "corrupt": False, "extended-l2": False}
        described |= {"cluster-size": CLUSTER, "format-specific": {"type": "qcow2", "data": data}}
    if version >= (11, 0, 0):
        described["limits"] = _limits(shown)
    backing = shown.child("backing")
    if backing is not None and with_backing:
        described["backing-image"] = image(backing, version, with_backing=True)
    return described


def _limits(shown: Node) -> dict[str, int]:
    """Return QEMU's limits of requests to a node, as they are on files without direct I/O."""
    described = {"request-alignment": 1, "min-mem-alignment": 1, "opt-mem-alignment": 4096, "max-iov": 1024}
    if isinstance(shown, Qcow2Node):
        described["write-zeroes-alignment"] = CLUSTER
    if _is_made_of_clusters(shown):
        described["discard-alignment"] = CLUSTER
    return described


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
