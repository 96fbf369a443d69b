# SPDX-License-Identifier: GPL-2.0-or-later
"""What QEMU's graph says of a disk: whose a filter is, which bitmaps can be trusted, what is encrypted."""

from typing import Any

import pytest

from backupctl.errors import CommandFailed, MonitorError
from backupctl.names import Namespace
from backupctl.operations.backup.plan import bitmap_error
from backupctl.vm.qmp import graph, inventory

OWNER = Namespace("a1b2c3d4")
POINT = "20261123T041500Z"


class Monitor:
    """A QEMU with one disk, vda, whose top node is one of `nodes`, the first."""

    def __init__(self, *nodes: dict[str, Any], edges=(), jobs=(), tells: bool = True) -> None:
        self.nodes = nodes
        self.edges = edges
        self.jobs = jobs
        self.commands = frozenset({"x-debug-query-block-graph"}) if tells else frozenset()

    def execute(self, command: str, _arguments: Any = None) -> Any:
        if command in ("qom-list", "qom-get"):
            raise CommandFailed(command, "DeviceNotFound", "no such thing")
        top = self.nodes[0]
        inserted = {"node-name": top["node-name"], "drv": top["drv"], "ro": False}
        return {
            "query-block": [{"device": "", "qdev": "vda", "removable": False, "inserted": inserted}],
            "query-named-block-nodes": list(self.nodes),
            "query-block-jobs": [{"device": job} for job in self.jobs],
            "x-debug-query-block-graph": self._graph(),
        }[command]

    def _graph(self) -> dict[str, Any]:
        names = [*(node["node-name"] for node in self.nodes), *self.jobs]
        kinds = ["block-driver"] * len(self.nodes) + ["block-job"] * len(self.jobs)
        nodes = [
            {"id": n, "type": kind, "name": name}
            for n, (kind, name) in enumerate(zip(kinds, names, strict=True))
        ]
        edges = [
            {"parent": names.index(parent), "child": names.index(child), "name": "any"}
            for parent, child in self.edges
        ]
        return {"nodes": nodes, "edges": edges}


def node(name: str, drv: str = "qcow2", data: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    specific = {"type": drv, "data": {"compat": "1.1", **(data or {})}}
    image = {"filename": "/a", "format": drv, "virtual-size": 1 << 20, "format-specific": specific}
    return {"node-name": name, "drv": drv, "ro": False, "image": image, **more}


def stored(*, persistent: bool) -> dict[str, Any]:
    told = {"granularity": 65536, "count": 0, "recording": True, "busy": False, "persistent": persistent}
    return {"dirty-bitmaps": [{"name": OWNER.bitmap(POINT, "vda"), **told}]}


@pytest.mark.parametrize("data", [{"data-file": "/b", "data-file-raw": True}, {"data-file-raw": False}])
def test_of_a_disk_with_a_data_file_only_a_bitmap_of_this_qemus_life_is_used(data):
    for persistent, why in ((True, "in another file"), (False, "")):
        (disk,) = inventory.inventory(Monitor(node("top", data=data, **stored(persistent=persistent)))).disks
        assert not disk.persistent
        found = bitmap_error(OWNER, POINT, disk, ())
        assert why in found if why else found == ""
    (disk,) = inventory.inventory(Monitor(node("top", **stored(persistent=True)))).disks
    assert (disk.persistent, bitmap_error(OWNER, POINT, disk, ())) == (True, "")


CBW = node("top", "copy-before-write"), node("below")


@pytest.mark.parametrize(
    ("qemu", "busy"),
    [
        (Monitor(*CBW), ""),
        (Monitor(*CBW, edges=[("theirs", "top")], jobs=["theirs"]), "of the job theirs"),
        (Monitor(*CBW, edges=[("theirs", "below")], jobs=["theirs"]), ""),
        (Monitor(*CBW, tells=False), ""),
        (Monitor(*CBW, jobs=["theirs"], tells=False), "another job works on vda"),
        (Monitor(node("#block7", "copy-before-write"), tells=False), "another job works on vda"),
        (Monitor(node("top", "copy-on-read"), jobs=["theirs"], tells=False), ""),
        (Monitor(node("top", "preallocate"), tells=False), ""),
        (
            Monitor(node("top"), edges=[("theirs", "top")], jobs=["theirs"]),
            "another job works on vda: theirs",
        ),
        (Monitor(node("backupctl-12345678-cbw0", "copy-before-write")), "a run of backupctl works on vda"),
    ],
)
def test_a_filter_is_a_jobs_if_qemu_says_so(qemu, busy):
    found = inventory.inventory(qemu)
    assert [disk.name for disk in found.disks] == ([] if busy else ["vda"])
    assert [busy in who for _, who in found.busy] == ([True] if busy else [])


@pytest.mark.parametrize("tells", [True, False])
def test_what_lies_under_a_disk_says_whether_it_is_encrypted(tells):
    nodes = node("top", "throttle"), node("below", encrypted=True)
    (disk,) = inventory.inventory(Monitor(*nodes, edges=[("top", "below")], tells=tells)).disks
    assert disk.encrypted is tells, "without a graph only the top can be looked at"
    (disk,) = inventory.inventory(Monitor(*nodes)).disks
    assert not disk.encrypted, "another disk's"


def test_a_graph_that_goes_round_ends():
    found = graph.ask(Monitor(node("a"), node("b"), edges=[("a", "b"), ("b", "a")]))
    assert found is not None
    assert found.under("a") == {"a", "b"}


def test_a_graph_that_makes_no_sense_is_the_monitors_error():
    qemu = Monitor(node("a"))
    qemu.execute = lambda *_: {"nodes": [], "edges": [{"parent": 1, "child": 2}]}  # type: ignore[method-assign]
    with pytest.raises(MonitorError, match="block graph"):
        graph.ask(qemu)
