# SPDX-License-Identifier: GPL-2.0-or-later
"""`transaction`: all actions or none.

Each action takes effect when it is prepared, so that the next one sees it, and returns an undo and a
commit function: if a later action fails, those before it are undone in reverse order.

Three bugs of QEMU are simulated, too (measured on 7.2 and 10.0: tests/conformance/test_dangers.py and the
conformance scripts on transactions). A `block-dirty-bitmap-enable` that fails crashes QEMU if there is no
such bitmap; if the bitmap is in use, the roll-back leaves it disabled. A `block-dirty-bitmap-merge` of an
empty list crashes QEMU on commit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backupctl.simulator.dirty import MAX_NAME_BYTES, DirtyBitmap, check_granularity, check_name
from backupctl.simulator.failure import CommandError
from backupctl.simulator.graph import Graph
from backupctl.simulator.jobs import Job, Jobs
from backupctl.simulator.nodes import Node

DEFAULT_GRANULARITY = 65536
Data = Mapping[str, Any]


def _nothing() -> None:
    return


@dataclass
class Prepared:
    """An action that has taken effect. undo: reverts it. commit: makes it final. job: that it created."""

    undo: Callable[[], None] = _nothing
    commit: Callable[[], None] = _nothing
    job: Job | None = None


class Actions:
    """The actions of a transaction; each also serves the command of its name.

    version: of QEMU. die: called where QEMU would crash.
    """

    def __init__(
        self, graph: Graph, jobs: Jobs, version: tuple[int, int, int], die: Callable[[], None]
    ) -> None:
        self.version = version
        self._die = die
        self._graph = graph
        self._jobs = jobs
        self.makers: dict[str, Callable[[Data], Prepared]] = {
            "block-dirty-bitmap-add": self._add,
            "block-dirty-bitmap-remove": self._remove,
            "block-dirty-bitmap-clear": self._clear,
            "block-dirty-bitmap-enable": lambda data: self._record(data, recording=True),
            "block-dirty-bitmap-disable": lambda data: self._record(data, recording=False),
            "block-dirty-bitmap-merge": self._merge,
            "blockdev-backup": self._backup,
            "abort": self._abort,
        }

    def run_one(self, kind: str, data: Data) -> None:
        """Run one action, as the command of its name. Raises CommandError."""
        self.makers[kind](data).commit()

    def run(self, actions: Sequence[tuple[str, Data]], *, grouped: bool = False) -> None:
        """Run all actions, or none. Raises CommandError."""
        done: list[Prepared] = []
        try:
            for kind, data in actions:
                if grouped:
                    self._check_groups(kind)
                done.append(self._prepare(kind, data))
        except CommandError:
            for prepared in reversed(done):
                prepared.undo()
            raise
        jobs = [prepared.job for prepared in done if prepared.job]
        for job in jobs:
            job.group = jobs if grouped else []
        for prepared in done:
            prepared.commit()

    def _prepare(self, kind: str, data: Data) -> Prepared:
        try:
            return self.makers[kind](data)
        except CommandError:
            if kind == "block-dirty-bitmap-enable":
                self._crash_like_qemu(data)
            raise

    def _crash_like_qemu(self, data: Data) -> None:
        node = self._graph.nodes.get(data["node"])
        bitmap = node.bitmaps.get(data["name"]) if node else None
        if bitmap is None:
            self._die()
        else:
            bitmap.recording = False

    def _check_groups(self, kind: str) -> None:
        if kind != "blockdev-backup":
            word = "Transaction" if self.version < (9, 0, 0) else "transaction"
            raise CommandError(f"Action '{kind}' does not support {word} property completion-mode = grouped")

    def _add(self, data: Data) -> Prepared:
        node, name = self._graph.find(data["node"]), str(data["name"])
        check_name(name)
        granularity = data.get("granularity", DEFAULT_GRANULARITY)
        check_granularity(granularity)
        persistent = bool(data.get("persistent"))
        if persistent:
            if node.read_only and self.version >= (11, 0, 0):
                why = f"Cannot add a persistent bitmap to read-only or inactive node '{node.name}'"
                raise CommandError(why)
            _check_can_persist(node, name)
        _check_new(node, name)
        recording = not data.get("disabled")
        node.bitmaps[name] = DirtyBitmap(name, node.size, granularity, recording, persistent)
        return Prepared(undo=lambda: _forget(node, name))

    def _remove(self, data: Data) -> Prepared:
        node, bitmap = self._graph.bitmap(data["node"], data["name"])
        refused_by_node = bitmap.read_only and self.version >= (11, 0, 0)
        bitmap.check(inconsistent_too=True, read_only_too=refused_by_node)
        if refused_by_node:
            why = f"Cannot remove persistent bitmap '{bitmap.name}': no write access to node '{node.name}'"
            raise CommandError(why)
        bitmap.busy += 1  # it keeps its name until the commit, so that an undo restores it

        def undo() -> None:
            bitmap.busy -= 1

        return Prepared(undo, lambda: _forget(node, bitmap.name))

    def _clear(self, data: Data) -> Prepared:
        bitmap = self._graph.bitmap(data["node"], data["name"])[1]
        bitmap.check()
        before = bitmap.bits.copy()
        bitmap.bits.clear()
        return Prepared(undo=lambda: setattr(bitmap, "bits", before))

    def _record(self, data: Data, *, recording: bool) -> Prepared:
        bitmap = self._graph.bitmap(data["node"], data["name"])[1]
        bitmap.check(read_only_too=True)
        before = bitmap.recording
        bitmap.recording = recording
        return Prepared(undo=lambda: setattr(bitmap, "recording", before))

    def _merge(self, data: Data) -> Prepared:
        node, target = self._graph.bitmap(data["node"], data["target"])
        if not data["bitmaps"]:
            return Prepared(commit=self._die)
        sources = [self._source(node, source) for source in data["bitmaps"]]
        target.check()
        before = target.bits.copy()
        try:
            for source in sources:
                target.merge(source)
        except CommandError:
            target.bits = before
            raise
        return Prepared(undo=lambda: setattr(target, "bits", before))

    def _source(self, node: Node, source: str | Data) -> DirtyBitmap:
        place = (node.name, source) if isinstance(source, str) else (source["node"], source["name"])
        found = self._graph.bitmap(*place)[1]
        found.check(read_only_too=True)
        return found

    def _backup(self, data: Data) -> Prepared:
        source, target = self._graph.find(data["device"]), self._graph.find(data["target"])
        if data["sync"] not in ("none", "full"):
            raise CommandError(
                f"the simulator does not support sync mode '{data['sync']}', only none and full"
            )
        job = self._jobs.create(
            data.get("job-id", ""), source, target, data["sync"], auto_dismiss=data.get("auto-dismiss", True)
        )
        return Prepared(lambda: self._jobs.withdraw(job), lambda: self._jobs.start(job), job)

    def _abort(self, data: Data) -> Prepared:  # noqa: ARG002 - an action like the others
        raise CommandError("Transaction aborted using Abort action")


def _check_new(node: Node, name: str) -> None:
    if name in node.bitmaps:
        raise CommandError(f"Bitmap already exists: {name}")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise CommandError(f"Bitmap name too long: {name}")


def _check_can_persist(node: Node, name: str) -> None:
    if node.driver != "qcow2":
        raise CommandError(f"Can't store persistent bitmaps to {node.name}: Operation not supported")
    if len(name.encode()) > MAX_NAME_BYTES:
        why = f"Name length exceeds maximum ({MAX_NAME_BYTES} characters)"
        raise CommandError(f"Can't make bitmap '{name}' persistent in '{node.name}': {why}")


def _forget(node: Node, name: str) -> None:
    if node.bitmaps.pop(name).persistent:
        node.unstore(name)
