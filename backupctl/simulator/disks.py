# SPDX-License-Identifier: GPL-2.0-or-later
"""The virtual machine's own disks: their options, their files, their devices.

In the state directory each disk has NAME.qcow2 or NAME.raw; a qcow2 also NAME.map (which clusters hold data)
and NAME.bitmaps. A raw disk's file is the disk. A qcow2's file has a real header, but its data are stored as
`opening` describes.
"""

import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backupctl.simulator.failure import CommandError
from backupctl.simulator.faults import BadFault, number
from backupctl.simulator.graph import Graph, check_filters
from backupctl.simulator.nodes import EventSink, FileNode, Link, Node, Qcow2Node, RawNode
from backupctl.simulator.opening import DATA_OFFSET, Opener, RawFile, identity
from backupctl.simulator.store import kept_clusters
from backupctl.simulator.stored import BitmapFile

_SPEC = re.compile(r"([A-Za-z][A-Za-z0-9_.-]*)=([0-9]+[kMGT]?)((?:,[a-z-]+=[A-Za-z0-9_.-]+)*)")
_MEANT = "NAME=SIZE[,format=raw][,node=NAME][,iothread=on][,readonly=on]"


VIRTIO = ("virtio-blk-pci", "virtio-blk")


@dataclass(frozen=True)
class DiskSpec:
    """A disk as the user asks for it: ``NAME=SIZE`` and options.

    node: the name of its block node, ``drive-NAME`` if not said otherwise.
    """

    name: str
    size: int
    node: str
    format: str = "qcow2"
    iothread: bool = False
    read_only: bool = False

    @classmethod
    def parse(cls, text: str) -> "DiskSpec":
        """Parse a disk. Raises BadFault."""
        match = _SPEC.fullmatch(text)
        if match is None:
            raise BadFault(f"invalid disk {text!r}; expected {_MEANT}")
        options = dict(part.split("=") for part in match[3].split(",") if part)
        form, node = options.pop("format", "qcow2"), options.pop("node", f"drive-{match[1]}")
        switches = {name: options.pop(name, "off") == "on" for name in ("iothread", "readonly")}
        if options or form not in ("qcow2", "raw"):
            raise BadFault(
                f"invalid disk {text!r}; its options are format=qcow2|raw, node, iothread=on and readonly=on"
            )
        return cls(match[1], number(match[2]), node, form, switches["iothread"], switches["readonly"])


def check_names(specs: Sequence[DiskSpec], cdroms: Sequence[str]) -> None:
    """Raise BadFault for two disks of one name, or an invalid node name."""
    graph, devices = Graph(), [*(spec.name for spec in specs), *cdroms]
    for name in devices:
        if devices.count(name) > 1:
            raise BadFault(f"disk {name!r} is given twice")
    for spec in specs:
        try:
            graph.check_new_name(spec.node)
        except CommandError as err:
            raise BadFault(f"disk {spec.name!r}: {err}") from err
        graph.add(RawNode(spec.node, "raw", lambda _event, _data: None))


@dataclass(eq=False)
class Device:
    """A device of the guest. link: to its node, None for an empty drive."""

    name: str
    driver: str
    link: Link | None
    iothread: str = ""
    removable: bool = False

    @property
    def qdev(self) -> str:
        """The path that `query-block` shows."""
        return f"/machine/peripheral/{self.name}/virtio-backend" if self.driver in VIRTIO else self.name

    def write_to(self, graph: Graph, node: Node) -> None:
        """Attach the device to a node. Raises CommandError, and then nothing has changed."""
        if self.link is None:
            self.link = graph.link("device", None, self.qdev, node)
            return
        before = self.link.node
        graph.move(self.link, node)
        try:
            check_filters(node)
        except CommandError:
            graph.move(self.link, before)
            raise


def open_disk(spec: DiskSpec, directory: Path, graph: Graph, emit_event: EventSink, opener: Opener) -> Node:
    """Open a disk of the state directory, or create it; its bitmaps are loaded."""
    path = directory / f"{spec.name}.{spec.format}"
    if not path.exists():
        _create(path, spec)
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    opener.locked.add(identity(descriptor))
    store = RawFile(descriptor)
    file = FileNode(
        graph.automatic_name(), "file", emit_event, spec.read_only, True, False, str(path), store=store
    )
    graph.add(file)
    node = (
        _qcow2(spec, directory, path, emit_event)
        if spec.format == "qcow2"
        else RawNode(spec.node, "raw", emit_event)
    )
    node.read_only, node.discards, node.filename = spec.read_only, True, str(path)
    graph.add(node)
    graph.link("file", node, node.name, file)
    return node


def _qcow2(spec: DiskSpec, directory: Path, path: Path, emit_event: EventSink) -> Qcow2Node:
    with path.open("rb") as file:
        size = int(struct.unpack(">Q", file.read(32)[24:])[0])
    store = kept_clusters(path, directory / f"{spec.name}.map", size, DATA_OFFSET)
    node = Qcow2Node(spec.node, "qcow2", emit_event, store=store)
    bitmaps = BitmapFile(directory / f"{spec.name}.bitmaps")
    bitmaps.load(node)
    node.unstore, node.store_bitmaps = bitmaps.forget, lambda: bitmaps.save(node)
    return node


def _create(path: Path, spec: DiskSpec) -> None:
    with path.open("wb") as file:
        if spec.format == "raw":
            # As qemu-img does: it allocates the first block, from which QEMU probes the alignment.
            file.write(bytes(min(4096, spec.size)))
            file.truncate(spec.size)
        else:
            file.write(qcow2_header(spec.size))


def qcow2_header(size: int) -> bytes:
    """Return the header of an empty qcow2 image of version 3, which has no tables."""
    fields = (b"QFI\xfb", 3, 0, 0, 16, size, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 104)
    return struct.pack(">4sIQIIQIIQQIIQQQQII", *fields)
