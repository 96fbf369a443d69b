# SPDX-License-Identifier: GPL-2.0-or-later
"""What a script is given: a monitor, the guest's pen, NBD clients, and the transcript they fill."""

import socket
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conformance import nbdview, normalise, subjects
from tests.conformance.nbdwire import Wire
from tests.conformance.qmp import Monitor, MonitorClosed, matches

Play = Callable[["Session"], None]
SCRIPTS: dict[str, "Script"] = {}


@dataclass(frozen=True)
class Script:
    """A script and what it needs beside the two disks (`subjects` tells of the extras)."""

    name: str
    play: Play
    extras: frozenset[str]


@dataclass
class Transcript:
    """What came back, normalised. replies: (label, value) in order. events: in order.

    Replies and events stand apart because QEMU promises no order between the two.
    """

    replies: list[tuple[str, Any]] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)


def script(*extras: str) -> Callable[[Play], Play]:
    """Register a function as a script under its module's and its own name."""

    def register(play: Play) -> Play:
        name = f"{play.__module__.rpartition('.')[2]}:{play.__name__}"
        assert name not in SCRIPTS, f"two scripts are called {name}"
        SCRIPTS[name] = Script(name, play, frozenset(extras))
        return play

    return register


class Session:
    """A subject under a script. Every method that asks something also records the answer."""

    def __init__(self, subject: subjects.Subject, *, greeted: bool = True) -> None:
        self.subject = subject
        self.directory = subject.directory
        self.nbd_socket = subject.directory / "nbd"
        self.transcript = Transcript()
        self.monitor = Monitor(subject.qmp)
        self._tidy = normalise.Normaliser(subject.directory)
        if greeted:
            self.monitor.receive()
            self.monitor.execute("qmp_capabilities")

    def note(self, label: str, value: Any) -> Any:
        """Record a value under a label."""
        self.transcript.replies.append((label, self._tidy(value)))
        return value

    def do(
        self, command: str, pick: Callable[[Any], Any] | None = None, fd: int | None = None, **arguments: Any
    ) -> Any:
        """Execute a command (in argument names underscores stand for dashes), record the reply, return it.

        pick: makes of a good reply the part that is to be compared.
        """
        dashed = {name.rstrip("_").replace("_", "-"): value for name, value in arguments.items()}
        return self.execute(command, dashed, pick, fd)

    def execute(
        self,
        command: str,
        arguments: dict[str, Any],
        pick: Callable[[Any], Any] | None = None,
        fd: int | None = None,
    ) -> Any:
        """Execute a command exactly as written, record the reply, return it."""
        reply = self.monitor.execute(command, arguments, fd)
        self.note(command, {"return": pick(reply["return"])} if pick and "return" in reply else reply)
        return reply.get("return", reply)

    def transaction(self, *actions: tuple[str, dict[str, Any]], **properties: Any) -> Any:
        """Execute a transaction of (type, data) actions."""
        wire = [{"type": kind, "data": data} for kind, data in actions]
        return self.execute("transaction", {"actions": wire} | properties)

    def await_event(self, name: str, **data: Any) -> None:
        """Wait for an event (dashes as underscores)."""
        self.monitor.await_event(name, **{key.replace("_", "-"): value for key, value in data.items()})

    def bitmaps(self, node: str = "drive-vda") -> list[dict[str, Any]]:
        """Record a node's dirty bitmaps, by name."""
        nodes = self.monitor.execute("query-named-block-nodes", {"flat": True})["return"]
        found = [n.get("dirty-bitmaps", []) for n in nodes if n["node-name"] == node]
        named = sorted((b for b in found[0] if "name" in b), key=lambda b: b["name"]) if found else []
        return self.note(f"bitmaps of {node}", named)

    def nodes(self) -> None:
        """Record the names and drivers of the nodes that have a name of their own."""
        nodes = self.monitor.execute("query-named-block-nodes", {"flat": True})["return"]
        mine = sorted(
            (n["node-name"], n["drv"], n["ro"]) for n in nodes if not n["node-name"].startswith("#")
        )
        self.note("nodes", mine)

    def serve(self) -> Any:
        """Start the NBD server."""
        return self.do("nbd-server-start", addr={"type": "unix", "data": {"path": str(self.nbd_socket)}})

    def export(self, node: str, identity: str = "e0", **more: Any) -> Any:
        """Add an NBD export."""
        return self.do("block-export-add", type="nbd", id=identity, node_name=node, **more)

    def unexport(self, identity: str = "e0") -> None:
        """Take an export away, by force, and wait until it is gone."""
        self.do("block-export-del", id=identity, mode="hard")
        self.await_event("BLOCK_EXPORT_DELETED", id=identity)

    def look(
        self, export: str, *bitmaps: str, without: tuple[str, ...] = (), hazy: AbstractSet[int] = frozenset()
    ) -> Any:
        """Record what an NBD client sees of an export and the bitmaps served with it.

        without: members, or contexts among the extents, that are not to be compared.
        hazy: blocks of `nbdview.BLOCK` bytes whose allocation is not to be compared.
        """
        seen = nbdview.look(self.nbd_socket, export, tuple(f"qemu:dirty-bitmap:{name}" for name in bitmaps))
        kept = {key: value for key, value in seen.items() if key not in without}
        if "extents" in kept:
            kept["extents"] = {name: each for name, each in seen["extents"].items() if name not in without}
            if hazy and (allocation := kept["extents"].get("base:allocation")):
                kept["extents"]["base:allocation"] = nbdview.hazed(allocation, hazy)
        return self.note(f"look at {export}", kept)

    @contextmanager
    def wire(self, timeout: float = 20.0) -> Iterator[Wire]:
        """Open a raw connection to the NBD server."""
        with Wire(self.nbd_socket, timeout) as wire:
            yield wire

    def scratch(
        self, node: str = "tmp0", backing: str | None = "drive-vda", file: str = "", **more: Any
    ) -> Any:
        """Add an empty qcow2 node, over a backing node unless that is None."""
        path = subjects.image(self.directory / (file or f"{node}.img"))
        over = {"backing": backing} | more
        return self.do("blockdev-add", driver="qcow2", node_name=node, file=_file(path), **over)

    def fleece(self, disk: str = "vda", job: str = "job0", target: str = "tmp0", **more: Any) -> Any:
        """Start the job that keeps a point in time in the scratch node."""
        return self.do(
            "blockdev-backup", job_id=job, device=f"drive-{disk}", target=target, sync="none", **more
        )

    def end_job(self, job: str = "job0") -> None:
        """Cancel a job and wait until nothing is left of it."""
        self.do("block-job-cancel", device=job)
        self.await_event("JOB_STATUS_CHANGE", id=job, status="null")

    def restart(self, *, kill: bool = False) -> None:
        """End QEMU, by SIGKILL or by its own `quit`, and start it again with the same disks."""
        if not kill:
            self.do("quit")
            with suppress(MonitorClosed):
                while True:
                    self.monitor.events.append(self.monitor.receive())
        self.monitor.close()
        self.subject.restart(kill=kill)
        before, self.monitor = self.monitor, Monitor(self.subject.qmp)
        self.monitor.events = before.events
        self.monitor.receive()
        self.monitor.execute("qmp_capabilities")

    def another_client(self) -> socket.socket:
        """Connect a further client to the same monitor."""
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(60)
        client.connect(str(self.subject.qmp))
        return client

    def finish(self) -> Transcript:
        """Close the monitor and return the transcript."""
        self.monitor.close()
        self.transcript.events = self._tidy.events(self.monitor.events)
        return self.transcript


def _file(path: Path) -> dict[str, str]:
    return {"driver": "file", "filename": str(path)}


def play(name: str, subject: str, directory: Path) -> Transcript:
    """Play a script on a subject, return its transcript. Raises subjects.Missing."""
    chosen = SCRIPTS[name]
    subjects.available(subject)
    with subjects.started(subject, directory, chosen.extras) as running:
        session = Session(running, greeted=not name.endswith("negotiation"))
        chosen.play(session)
        return session.finish()


__all__ = ["SCRIPTS", "Script", "Session", "Transcript", "matches", "play", "script"]
