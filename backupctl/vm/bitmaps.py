# SPDX-License-Identifier: GPL-2.0-or-later
"""Dirty bitmaps: their state as QEMU tells it, and the transactions that change it.

A bitmap of ours is named after the point it records from (`names.Owner`). So for one disk, with the
newest committed point P and a run that makes point N:

::

                                   bitmap P        bitmap N
    before the run                 recording       -
    after the run's transaction    disabled        recording      (incremental)
                                   recording       recording      (full: the old chain goes on)
    N committed                    removed         recording
    N not committed                recording again removed        what N recorded is merged into P

Only a bitmap on the ACTIVE node is of use: after an external snapshot the old one stays behind on the
backing layer and records nothing more.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from backupctl.names import BitmapName, NodeName, Owner, PointId

GRANULARITY_BYTES = 65536
"""One bit for each cluster of the images that we write."""

Action = dict[str, object]


@dataclass(frozen=True)
class Bitmap:
    """A dirty bitmap as `query-named-block-nodes` shows it. dirty_bytes: QEMU's `count`."""

    name: BitmapName
    node: NodeName
    granularity: int
    dirty_bytes: int
    recording: bool
    busy: bool
    persistent: bool
    inconsistent: bool

    @classmethod
    def parse(cls, node: NodeName, reply: Mapping[str, Any]) -> "Bitmap | None":
        """Read one entry of `dirty-bitmaps`; None for the nameless one of a running job."""
        name = reply.get("name")
        if not name:
            return None
        return cls(
            name=BitmapName(str(name)),
            node=node,
            granularity=int(reply["granularity"]),
            dirty_bytes=int(reply["count"]),
            recording=bool(reply["recording"]),
            busy=bool(reply["busy"]),
            persistent=bool(reply["persistent"]),
            inconsistent=bool(reply.get("inconsistent", False)),
        )

    @property
    def state(self) -> str:
        """The state in one word, for people."""
        if self.inconsistent:
            return "inconsistent"
        return "recording" if self.recording else "disabled"


def begin(
    node: NodeName,
    new: BitmapName,
    base: BitmapName | None,
    *,
    persistent: bool,
    gapped: BitmapName | None = None,
) -> list[Action]:
    """Actions of the run's transaction for one disk: record into `new`, stop recording into `base`.

    gapped: a bitmap of ours that goes at the same moment (see `gapped`).
    """
    arguments = {"node": node, "name": new, "granularity": GRANULARITY_BYTES, "persistent": persistent}
    actions: list[Action] = [{"type": "block-dirty-bitmap-add", "data": arguments}]
    if gapped is not None:
        actions.append(_on(node, gapped, "remove"))
    if base is not None:
        actions.append(_on(node, base, "disable"))
    return actions


def gapped(bitmaps: Iterable[Bitmap], owner: Owner) -> BitmapName | None:
    """Return our newest bitmap of a node if it does not record: somebody disabled it, so it has a gap.

    It can't be used any more. It must not stand beside the bitmap of a run either: were that run to fail,
    it would look like a base that the run itself had disabled, and be enabled again, gap and all.
    """
    ours = {point: bitmap for bitmap in bitmaps if (point := owner.point_of(bitmap.name)) is not None}
    newest = ours[max(ours)] if ours else None
    return newest.name if newest is not None and not newest.recording else None


@dataclass(frozen=True)
class Settlement:
    """What brings the bitmaps of one repository to rest, and in words what it does."""

    actions: tuple[Action, ...]
    told: tuple[str, ...]


def settle(bitmaps: Iterable[Bitmap], owner: Owner, committed: Callable[[PointId], bool]) -> Settlement:
    """Decide what must happen to the bitmaps of one node, from their names alone.

    bitmaps: all of one node. committed: whether a point's folder stands under its final name.
    The answer is one list of actions for one transaction, empty when all is at rest.
    """
    ours = {point: bitmap for bitmap in bitmaps if (point := owner.point_of(bitmap.name)) is not None}
    done = [ours[point] for point in sorted(ours) if committed(point)]
    unfinished = [ours[point] for point in sorted(ours) if not committed(point)]
    actions = _give_back(unfinished, done[-1] if done else None)
    told = [f"undid the unfinished bitmap {new.name} on {new.node}" for new in unfinished]
    for old in done[:-1]:
        actions.append(_on(old.node, old.name, "remove"))
        told.append(f"retired {old.name} on {old.node}: {done[-1].name} has taken over")
    return Settlement(tuple(actions), tuple(told))


def _give_back(unfinished: list[Bitmap], base: Bitmap | None) -> list[Action]:
    """Undo `begin` for one node: what the unfinished bitmaps recorded belongs to `base`.

    Not if the base went on recording all the time (a full), and not if the record has a gap: an
    inconsistent bitmap, or none that records up to now. Then base stays disabled or inconsistent, the
    next run sees that and does not use it; enabling it would hide the gap for ever.
    """
    removals = [_on(new.node, new.name, "remove") for new in unfinished]
    if base is None or base.recording or not unfinished:
        return removals
    if any(bitmap.inconsistent for bitmap in (base, *unfinished)) or not unfinished[-1].recording:
        return removals
    merge: Action = {
        "type": "block-dirty-bitmap-merge",
        "data": {"node": base.node, "target": base.name, "bitmaps": [new.name for new in unfinished]},
    }
    # Merge first: it refuses when a bitmap has vanished meanwhile, where `enable` in a transaction makes
    # QEMU itself crash (measured on 7.2.22 and 10.0.2). Within one transaction the order is one moment.
    return [merge, _on(base.node, base.name, "enable"), *removals]


def _on(node: NodeName, name: BitmapName, what: str) -> Action:
    return {"type": f"block-dirty-bitmap-{what}", "data": {"node": node, "name": name}}
