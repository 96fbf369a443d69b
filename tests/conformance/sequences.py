# SPDX-License-Identifier: GPL-2.0-or-later
"""Random sequences of graph, bitmap, transaction, job, export and write commands.

A sequence is drawn from a seed alone, before anything runs, so it can be repeated and cut down. Few names
and many commands: so that commands meet each other, in success and in error.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from conformance import subjects
from conformance.session import Session

DISKS = ("vda", "vdb")
BITMAPS = ("b0", "b1", "b2")
# Node, job and export of one number belong together often enough to succeed.
NUMBERS = (0, 1)
_SECTOR = 512


@dataclass(frozen=True)
class Step:
    """One step. kind: the method of Player that takes it. data: its arguments."""

    kind: str
    data: dict[str, Any]


def draw(seed: int, length: int = 25) -> list[Step]:
    """Return the sequence of a seed."""
    chance = random.Random(seed)
    makers = [_bitmap] * 6 + [_transaction] * 4 + [_write] * 6 + [_node] * 3 + [_job] * 3 + [_export] * 3
    return [chance.choice(makers)(chance) for _ in range(length)]


def _bitmap(chance: random.Random) -> Step:
    action, data = _action(chance)
    # Outside a transaction as inside; `enable` included, which is safe there.
    return Step("command", {"command": f"block-dirty-bitmap-{action}", "arguments": data})


def _action(chance: random.Random) -> tuple[str, dict[str, Any]]:
    action = chance.choice(("add", "add", "remove", "clear", "enable", "disable", "merge"))
    node = f"drive-{chance.choice(DISKS)}"
    if action == "merge":
        # Never an empty list: QEMU dies of it (test_dangers).
        sources = [_source(chance) for _ in range(chance.randint(1, 2))]
        return action, {"node": node, "target": chance.choice(BITMAPS), "bitmaps": sources}
    data: dict[str, Any] = {"node": node, "name": chance.choice(BITMAPS)}
    if action == "add":
        data["persistent"] = chance.random() < 0.3
        data["disabled"] = chance.random() < 0.2
        if chance.random() < 0.3:
            data["granularity"] = chance.choice((4096, 32768, 131072))
    return action, data


def _source(chance: random.Random) -> Any:
    name = chance.choice(BITMAPS)
    return name if chance.random() < 0.7 else {"node": f"drive-{chance.choice(DISKS)}", "name": name}


def _transaction(chance: random.Random) -> Step:
    actions = []
    for _ in range(chance.randint(1, 4)):
        if chance.random() < 0.2:
            actions.append({"type": "blockdev-backup", "data": _backup(chance)})
            continue
        action, data = _action(chance)
        while action == "enable":  # of an absent bitmap, in a transaction, it kills QEMU (test_dangers)
            action, data = _action(chance)
        actions.append({"type": f"block-dirty-bitmap-{action}", "data": data})
    return Step("command", {"command": "transaction", "arguments": {"actions": actions}})


def _backup(chance: random.Random) -> dict[str, Any]:
    number = chance.choice(NUMBERS)
    disk = DISKS[number] if chance.random() < 0.8 else chance.choice(DISKS)
    return {"job-id": f"job{number}", "device": f"drive-{disk}", "target": f"tmp{number}", "sync": "none"}


def _write(chance: random.Random) -> Step:
    offset = chance.randrange(subjects.SIZE // _SECTOR) * _SECTOR
    length = min(chance.choice((512, 4096, 65536, 200 * 1024)), subjects.SIZE - offset)
    kind = chance.choice(("write", "write", "zero", "discard"))
    data: dict[str, Any] = {"disk": chance.choice(DISKS), "offset": offset, "length": length}
    return Step(kind, data | ({"pattern": chance.randint(1, 255)} if kind == "write" else {}))


def _node(chance: random.Random) -> Step:
    number = chance.choice(NUMBERS)
    kind = chance.choice(("add_node", "add_node", "delete_node"))
    return Step(kind, {"number": number} | ({"disk": DISKS[number]} if kind == "add_node" else {}))


def _job(chance: random.Random) -> Step:
    if chance.random() < 0.6:
        return Step("command", {"command": "blockdev-backup", "arguments": _backup(chance)})
    return Step("cancel", {"number": chance.choice(NUMBERS)})


def _export(chance: random.Random) -> Step:
    node = chance.choice(("tmp0", "tmp1", "drive-vda", "drive-vdb"))
    return Step("glance", {"node": node, "bitmaps": chance.sample(BITMAPS, chance.randint(0, 2))})


class Player:
    """Takes the steps of a sequence on a session; all that comes back is recorded there."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._files = 0
        session.serve()

    def play(self, steps: list[Step]) -> None:
        """Take all steps, then look at every bitmap and every byte."""
        for step in steps:
            self._taker(step.kind)(**step.data)
        self._look_at_all()

    def _taker(self, kind: str) -> Callable[..., None]:
        if kind in ("write", "zero", "discard"):
            return getattr(self._session.subject, kind)  # type: ignore[no-any-return]
        return getattr(self, kind)  # type: ignore[no-any-return]

    def command(self, command: str, arguments: dict[str, Any]) -> None:
        self._session.execute(command, arguments)
        for disk in DISKS:
            self._session.bitmaps(f"drive-{disk}")

    def add_node(self, number: int, disk: str) -> None:
        self._files += 1
        self._session.scratch(f"tmp{number}", f"drive-{disk}", file=f"scratch{self._files}")

    def delete_node(self, number: int) -> None:
        self._session.do("blockdev-del", node_name=f"tmp{number}")

    def cancel(self, number: int) -> None:
        reply = self._session.do("block-job-cancel", device=f"job{number}")
        if "error" not in reply:
            self._await_end(f"job{number}")

    def glance(self, node: str, bitmaps: list[str]) -> None:
        """Export a node, look at it, take the export away."""
        identity = f"glance{self._files}"
        self._files += 1
        reply = self._session.export(node, identity, name="glance", bitmaps=bitmaps)
        if "error" not in reply:
            # Extents of allocation depend on how a scratch was filled, which the scripts compare.
            self._session.look("glance", *bitmaps, without=() if bitmaps and node.startswith("drive") else ("extents",))
            self._session.unexport(identity)

    def _await_end(self, job: str) -> None:
        """Wait until a job is no more; its earlier namesakes have left events, so ask."""
        while any(each["id"] == job for each in self._session.monitor.execute("query-jobs")["return"]):
            self._session.monitor.events.append(self._session.monitor.receive())

    def _look_at_all(self) -> None:
        for number in NUMBERS:
            self.cancel(number)
        for disk in DISKS:
            node = f"drive-{disk}"
            names = [bitmap["name"] for bitmap in self._session.bitmaps(node)]
            for name in names:
                self._session.do("block-dirty-bitmap-disable", node=node, name=name)
            self.glance(node, names)
