# SPDX-License-Identifier: GPL-2.0-or-later
"""`blockdev-add`: from options to nodes.

The data of a qcow2 node are stored in the very file that was passed, cluster n at 1 MiB + n x 64 KiB; of
the format only the header is read. So space runs out where it really would. Afterwards the file is NOT a
valid qcow2 image: only this process knows which clusters contain data.
"""

import errno
import os
import stat
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from backupctl.simulator import arguments
from backupctl.simulator.descriptors import PREFIX, Descriptors
from backupctl.simulator.failure import CommandError
from backupctl.simulator.filters import CopyBeforeWrite, SnapshotAccess
from backupctl.simulator.graph import Graph, check_filters
from backupctl.simulator.nodes import EventSink, FileNode, Node, Qcow2Node, RawNode, ThrottleNode, protocol_of
from backupctl.simulator.store import CLUSTER, ClusterStore, RawStore, States

DATA_OFFSET = 1 << 20
_COMMON: arguments.Form = {
    "driver": "str",
    "node-name?": "str",
    "read-only?": "bool",
    "auto-read-only?": "bool",
    "force-share?": "bool",
    "discard?": ("ignore", "unmap"),
    "detect-zeroes?": ("off", "on", "unmap"),
    "cache?": "dict",
}
FORMS: dict[str, arguments.Form] = {
    "file": {**_COMMON, "filename": "str", "aio?": "str", "locking?": "str"},
    "raw": {**_COMMON, "file": "any"},
    "qcow2": {**_COMMON, "file": "any", "backing?": "any", "lazy-refcounts?": "bool", "cache-size?": "int"},
    "copy-before-write": {
        **_COMMON,
        "target": "any",
        "file": "any",
        "bitmap?": "dict",
        "on-cbw-error?": ("break-guest-write", "break-snapshot"),
        "cbw-timeout?": "uint32",
    },
    "snapshot-access": {**_COMMON, "file": "any"},
    "throttle": {**_COMMON, "throttle-group": "str", "file": "any"},
}
Options = Mapping[str, Any]


class Opener:
    """Makes nodes.

    closes_fds_at_once: whether QEMU closes removed descriptors at once.
    groups: throttle groups with their limits. version: of QEMU.
    capacity: how many bytes the file of a qcow2 node of this name may take, None for no limit.
    """

    def __init__(
        self,
        graph: Graph,
        descriptors: Descriptors,
        emit_event: EventSink,
        closes_fds_at_once: Callable[[], bool],
    ) -> None:
        self._closes_fds_at_once = closes_fds_at_once
        self._graph = graph
        self._descriptors = descriptors
        self._emit_event = emit_event
        self._states: dict[tuple[int, int], States] = {}
        self.locked: set[tuple[int, int]] = set()
        self.capacity: Callable[[str], int | None] = lambda _node: None
        self.version = (7, 2, 0)
        self.groups: dict[str, dict[str, int]] = {}

    def open(self, options: Options) -> Node:
        """Make a node that the monitor owns. Raises CommandError, and then nothing was made."""
        if "node-name" not in options:
            raise CommandError("'node-name' must be specified for the root node")
        return self._open(options, owned=True)

    def _open(self, options: Options, *, owned: bool) -> Node:
        driver = str(options.get("driver"))
        if driver not in FORMS:
            raise CommandError(f"Parameter 'driver' does not accept value '{driver}'")
        arguments.check(FORMS[driver], options)
        name = options.get("node-name")
        if isinstance(options.get("file"), str):
            self._graph.find(options["file"])  # QEMU checks this before the name
        if name is not None:
            self._graph.check_new_name(name)
        makers = {"file": self._file, "raw": self._raw, "qcow2": self._qcow2}
        makers |= {"copy-before-write": self._before_write, "snapshot-access": self._access}
        makers |= {"throttle": self._throttle}
        node = makers[driver](name or self._graph.automatic_name(), options)
        node.owned = owned
        node.discards = options.get("discard") in ("unmap", "on")
        self._graph.add(node)
        try:
            for link in node.children.values():
                check_filters(link.node)
        except CommandError:
            self._graph.drop(node)
            raise
        return node

    def _child(self, options: Options, role: str) -> Node:
        """Return the node that a child option names, or make the one that it describes."""
        given = options[role]
        if isinstance(given, str):
            return self._graph.find(given)
        if not isinstance(given, dict):
            raise CommandError(f"Invalid parameter type for '{role}', expected: BlockdevRef")
        inherited = {key: options[key] for key in ("read-only",) if key in options}
        return self._open(inherited | dict(given), owned=False)

    def _file(self, name: str, options: Options) -> FileNode:
        path = options["filename"]
        read_only = bool(options.get("read-only"))
        descriptor = self._descriptor(path, read_only=read_only)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            self._release(path)
            raise CommandError(f"'file' driver requires '{path}' to be a regular file")
        whose = identity(descriptor)
        if not read_only and whose in self.locked:
            os.close(descriptor)
            self._release(path)
            raise CommandError('Failed to get "write" lock')
        if not read_only:
            self.locked.add(whose)
        store = RawFile(descriptor, lambda: self._closed(path, whose))
        made = FileNode(name, "file", self._emit_event, read_only, filename=path, store=store)
        made.grown_bytes = min(
            store.allocated_bytes(), store.size
        )  # space preallocated behind the end is not used
        return made

    def _descriptor(self, path: str, *, read_only: bool) -> int:
        flags = os.O_RDONLY if read_only else os.O_RDWR
        if not path:
            raise CommandError("The 'file' block driver requires a file name")
        if "\0" in path:
            raise CommandError(f"Could not open '{path}': {os.strerror(errno.ENOENT)}")
        try:
            if path.startswith(PREFIX):
                return self._descriptors.open(path, read_only=read_only)
            # Opening a pipe must not block everything until it has a writer.
            return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as err:
            why = os.strerror(err.errno or errno.EIO)
            if path.startswith(PREFIX):
                raise CommandError(self._no_descriptor(path, flags, err)) from err
            raise CommandError(f"Could not open '{path}': {why}") from err

    def _no_descriptor(self, path: str, flags: int, err: OSError) -> str:
        if self.version < (9, 1, 0):
            return f"Could not dup FD for {path} flags {flags:x}: {os.strerror(err.errno or 0)}"
        if err.errno == errno.ENOENT:
            return f"Failed to find fdset {path}"
        return f"Failed to find file descriptor with matching flags=0x{flags:x}"

    def _closed(self, path: str, whose: tuple[int, int]) -> None:
        self.locked.discard(whose)
        self._release(path)

    def _release(self, path: str) -> None:
        if path.startswith(PREFIX):
            self._descriptors.release(path, at_once=self._closes_fds_at_once())

    def _raw(self, name: str, options: Options) -> RawNode:
        file = self._child(options, "file")
        made = RawNode(name, "raw", self._emit_event, file.read_only, filename=file.filename)
        self._graph.link("file", made, name, file)
        return made

    def _qcow2(self, name: str, options: Options) -> Qcow2Node:
        file = self._child(options, "file")
        try:
            size = _virtual_size(file)
            backing = self._backing(options)
        except CommandError:
            if not isinstance(options["file"], str):
                self._graph.drop(file)
            raise
        made = Qcow2Node(
            name,
            "qcow2",
            self._emit_event,
            file.read_only,
            filename=file.filename,
            store=self._clusters(file, size),
        )
        if (protocol := protocol_of(file)) is not None:
            protocol.capacity = lambda: self.capacity(name)
        self._graph.link("file", made, name, file)
        if backing is not None:
            self._graph.link("backing", made, name, backing)
        return made

    def _throttle(self, name: str, options: Options) -> ThrottleNode:
        group = options["throttle-group"]
        if group not in self.groups:
            raise CommandError(f"Throttle group '{group}' does not exist")
        file = self._child(options, "file")
        made = ThrottleNode(name, "throttle", self._emit_event, file.read_only, filename=file.filename)
        made.group = group
        self._graph.link("file", made, name, file)
        return made

    def _backing(self, options: Options) -> Node | None:
        given = options.get("backing")
        if given is None:
            return None
        try:
            return self._child(options, "backing")
        except CommandError as err:
            raise CommandError(f"Could not open backing file: {err}") from err

    def _clusters(self, file: Node, size: int) -> ClusterStore:
        descriptor = os.dup(opened(file).descriptor)
        whose = identity(descriptor)
        if os.fstat(descriptor).st_size <= DATA_OFFSET:
            # Fresh from qemu-img. Its inode number may be that of an earlier, deleted file: forget that one.
            self._states[whose] = np.zeros(max(-(-size // CLUSTER), 1), np.uint8)
            if not file.read_only:
                os.ftruncate(descriptor, DATA_OFFSET + 1)  # this image owns it now
        states = self._states.setdefault(whose, np.zeros(max(-(-size // CLUSTER), 1), np.uint8))
        return ClusterStore(descriptor, states, size, DATA_OFFSET)

    def _before_write(self, name: str, options: Options) -> CopyBeforeWrite:
        file = self._child(options, "file")
        target = self._child(options, "target")
        made = CopyBeforeWrite(
            name, "copy-before-write", self._emit_event, file.read_only, filename=file.filename
        )
        made.break_guest = options.get("on-cbw-error", "break-guest-write") == "break-guest-write"
        self._limit(made, options)
        self._graph.link("file", made, name, file)
        self._graph.link("target", made, name, target)
        made.begin()
        return made

    def _limit(self, made: CopyBeforeWrite, options: Options) -> None:
        if chosen := options.get("bitmap"):
            arguments.check({"node": "str", "name": "str"}, chosen, "bitmap.")
            _, bitmap = self._graph.bitmap(chosen["node"], chosen["name"])
            coarse = bitmap.bits.copy()
            if bitmap.granularity != CLUSTER:
                coarse = type(coarse)(-(-bitmap.size // CLUSTER))
                for start, length in bitmap.bits.areas():
                    first = start * bitmap.granularity // CLUSTER
                    last = ((start + length) * bitmap.granularity - 1) // CLUSTER
                    coarse.set(first, min(last, coarse.bits - 1) - first + 1)
            made.limit = coarse

    def _access(self, name: str, options: Options) -> SnapshotAccess:
        file = self._child(options, "file")
        made = SnapshotAccess(name, "snapshot-access", self._emit_event, filename=file.filename)
        made.copies_are_data = self.version < (8, 0, 0)
        self._graph.link("file", made, name, file)
        return made


class RawFile(RawStore):
    """A file that calls back when it is closed."""

    def __init__(self, descriptor: int, on_close: Callable[[], None] = lambda: None) -> None:
        super().__init__(descriptor)
        self._on_close = on_close

    def close(self) -> None:
        """See `Store`."""
        super().close()
        self._on_close()


def opened(node: Node) -> RawFile:
    """Return the file of a file node. Raises CommandError for any other kind of node."""
    file = protocol_of(node)
    if file is None or not isinstance(file.store, RawFile):
        raise CommandError(
            f"Node '{node.name}' is not a file node: the simulator supports images in files only"
        )
    return file.store


def _virtual_size(file: Node) -> int:
    header = os.pread(opened(file).descriptor, 32, 0)
    if len(header) < 32 or header[:4] != b"QFI\xfb":
        raise CommandError("Image is not in qcow2 format")
    return int(struct.unpack_from(">Q", header, 24)[0])


def identity(descriptor: int) -> tuple[int, int]:
    """Return what identifies a file."""
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino
