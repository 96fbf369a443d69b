# SPDX-License-Identifier: GPL-2.0-or-later
"""Random sequences of graph, bitmap, transaction, job, export and write commands.

A sequence is drawn from a seed alone, before anything runs, so it can be repeated and cut down. Few names
and many commands: so that commands meet each other, in success and in error.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.conformance import subjects
from tests.conformance.nbdview import BLOCK
from tests.conformance.session import Session

DISKS = ("vda", "vdb")
BITMAPS = ("b0", "b1", "b2")
# Never removed, so a transaction may enable it: of an absent bitmap that kills QEMU (test_dangers).
KEPT = "kept"
# Node, job and export of one number belong together often enough to succeed.
NUMBERS = (0, 1)
_SECTOR = 512
# What was zeroed in a raw file shows as data or as a hole, as the host's page cache happens to have it: QEMU
# makes unwritten extents of it, and those are data to SEEK_DATA while pages of them are cached.
RAW = "vdb"


@dataclass(frozen=True)
class Step:
    """One step. kind: the method of Player that takes it. data: its arguments."""

    kind: str
    data: dict[str, Any]


def draw(seed: int, length: int = 25) -> list[Step]:
    """Return the sequence of a seed."""
    chance = random.Random(seed)
    dice = Dice(chance)
    makers = [dice.bitmap] * 5 + [dice.transaction] * 5 + [dice.write] * 6 + [dice.node] * 2
    makers += [dice.job] * 3 + [dice.export] * 3
    return [chance.choice(makers)() for _ in range(length)]


class Dice:
    """Draws steps. It remembers which bitmaps ought to be there, so that more commands succeed than fail."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._there: dict[str, set[str]] = {disk: set() for disk in DISKS}

    def bitmap(self) -> Step:
        """Draw a command for a bitmap."""
        action, data = self._action(("enable", "disable"))
        return Step("command", {"command": f"block-dirty-bitmap-{action}", "arguments": data})

    def transaction(self) -> Step:
        """Draw a transaction of one to four actions."""
        actions = [self._transaction_action() for _ in range(self._chance.randint(1, 4))]
        return Step("command", {"command": "transaction", "arguments": {"actions": actions}})

    def _transaction_action(self) -> dict[str, Any]:
        luck = self._chance.random()
        if luck < 0.15:
            return {"type": "blockdev-backup", "data": self._backup()}
        if luck < 0.3:
            data = {"node": f"drive-{self._chance.choice(DISKS)}", "name": KEPT}
            return {"type": "block-dirty-bitmap-enable", "data": data}
        action, data = self._action(("disable",))
        return {"type": f"block-dirty-bitmap-{action}", "data": data}

    def _action(self, switches: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
        disk = self._chance.choice(DISKS)
        action = self._chance.choice(("add", "add", "remove", "clear", "merge", *switches))
        if action == "add":
            return action, self._addition(disk)
        if action == "merge":
            return action, self._merge(disk)
        name = self._name(disk, keep=action == "remove")
        if action == "remove":
            self._there[disk].discard(name)
        return action, {"node": f"drive-{disk}", "name": name}

    def _addition(self, disk: str) -> dict[str, Any]:
        missing = sorted(set(BITMAPS) - self._there[disk])
        name = self._chance.choice(missing if missing and self._chance.random() < 0.9 else BITMAPS)
        self._there[disk].add(name)
        data = {"node": f"drive-{disk}", "name": name, "disabled": self._chance.random() < 0.2}
        if self._chance.random() < 0.3:
            data["granularity"] = self._chance.choice((4096, 32768, 131072))
        return data | {"persistent": self._chance.random() < (0.3 if disk == "vda" else 0.05)}

    def _merge(self, disk: str) -> dict[str, Any]:
        # Never an empty list: QEMU dies of it (test_dangers).
        sources = [self._source(disk) for _ in range(self._chance.randint(1, 2))]
        return {"node": f"drive-{disk}", "target": self._name(disk), "bitmaps": sources}

    def _source(self, disk: str) -> Any:
        if self._chance.random() < 0.7:
            return self._name(disk)
        other = self._chance.choice(DISKS)
        return {"node": f"drive-{other}", "name": self._name(other)}

    def _name(self, disk: str, *, keep: bool = False) -> str:
        likely = sorted(self._there[disk] | (set() if keep else {KEPT}))
        return self._chance.choice(likely if likely and self._chance.random() < 0.9 else BITMAPS)

    def _backup(self) -> dict[str, Any]:
        number = self._chance.choice(NUMBERS)
        disk = DISKS[number] if self._chance.random() < 0.8 else self._chance.choice(DISKS)
        return {"job-id": f"job{number}", "device": f"drive-{disk}", "target": f"tmp{number}", "sync": "none"}

    def write(self) -> Step:
        """Draw what the guest does."""
        offset = self._chance.randrange(subjects.SIZE // _SECTOR) * _SECTOR
        length = min(self._chance.choice((512, 4096, 65536, 200 * 1024)), subjects.SIZE - offset)
        kind = self._chance.choice(("write", "write", "zero", "discard"))
        data: dict[str, Any] = {"disk": self._chance.choice(DISKS), "offset": offset, "length": length}
        return Step(kind, data | ({"pattern": self._chance.randint(1, 255)} if kind == "write" else {}))

    def node(self) -> Step:
        """Draw a scratch node to add or delete."""
        number = self._chance.choice(NUMBERS)
        kind = self._chance.choice(("add_node", "add_node", "delete_node"))
        return Step(kind, {"number": number} | ({"disk": DISKS[number]} if kind == "add_node" else {}))

    def job(self) -> Step:
        """Draw a job to begin or cancel."""
        if self._chance.random() < 0.6:
            return Step("command", {"command": "blockdev-backup", "arguments": self._backup()})
        return Step("cancel", {"number": self._chance.choice(NUMBERS)})

    def export(self) -> Step:
        """Draw an export to look at."""
        node = self._chance.choice(("tmp0", "tmp1", "drive-vda", "drive-vdb"))
        return Step(
            "glance",
            {"node": node, "bitmaps": self._chance.sample((KEPT, *BITMAPS), self._chance.randint(0, 2))},
        )


class Player:
    """Takes the steps of a sequence on a session; all that comes back is recorded there."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._files = 0
        self._hazy: set[int] = set()
        session.serve()
        for number, disk in enumerate(DISKS):
            session.do("block-dirty-bitmap-add", node=f"drive-{disk}", name=KEPT)
            self.add_node(number, disk)

    def play(self, steps: list[Step]) -> None:
        """Take all steps, then look at every bitmap and every byte."""
        for step in steps:
            self._taker(step.kind)(**step.data)
        self._look_at_all()

    def _taker(self, kind: str) -> Callable[..., None]:
        return getattr(self, kind)  # type: ignore[no-any-return]

    def write(self, disk: str, offset: int, length: int, pattern: int) -> None:
        self._session.subject.write(disk, pattern, offset, length)
        if disk == RAW:
            self._hazy -= _blocks(offset, length)

    def zero(self, disk: str, offset: int, length: int) -> None:
        self._session.subject.zero(disk, offset, length)
        if disk == RAW:
            self._hazy |= _blocks(offset, length)

    def discard(self, disk: str, offset: int, length: int) -> None:
        self._session.subject.discard(disk, offset, length)

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
            # Allocation tells how a scratch was filled; the scripts compare that, with its known difference.
            without = () if node.startswith("drive") else ("base:allocation",)
            hazy = self._hazy if node == f"drive-{RAW}" else frozenset[int]()
            self._session.look("glance", *bitmaps, without=without, hazy=hazy)
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


def _blocks(offset: int, length: int) -> set[int]:
    return set(range(offset // BLOCK, -(-(offset + length) // BLOCK)))
