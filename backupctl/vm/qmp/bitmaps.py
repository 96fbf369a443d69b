# SPDX-License-Identifier: GPL-2.0-or-later
"""Dirty bitmaps: their state as QEMU tells it, and the transactions that change it.

A bitmap of ours is named after the point it records from, and its disk (`names.Namespace`). So for one disk,
with the newest committed point P and a run that makes point N:

::

                                   bitmap P        bitmap N
    before the run                 recording       -
    after the run's transaction    disabled        recording      (incremental)
                                   recording       recording      (full: the old chain goes on)
    N committed                    removed (*)     recording
    N not committed                recording again removed        what N recorded is merged into P

(*) or kept, disabled, as a checkpoint: a differential unites it with those of the points after it.
Only a bitmap on the ACTIVE node is of use: after an external snapshot the old one stays behind on the
backing layer and records nothing more.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, cast

from backupctl.names import BitmapName, Namespace, NodeName, PointId
from backupctl.vm.bitmap import Bitmap
from backupctl.vm.qmp import reply

GRANULARITY_BYTES = 65536
"""One bit for each cluster of the images that we write."""

Action = dict[str, object]
Theirs = Callable[[PointId], bool]
"""Whether a point belongs to another VM of the repository, whose disk this one was."""


def _nobody(_point: PointId) -> bool:
    return False


def parse(node: NodeName, entry: Mapping[str, Any], *, read_only: bool = False) -> Bitmap | None:
    """Read one entry of `dirty-bitmaps`; None for the nameless one of a running job.

    read_only: whether the node is. To be called where `reply.understood` catches what it raises.
    """
    name = entry.get("name")
    if not name:
        return None
    if not isinstance(name, str):
        raise TypeError("a bitmap's name is no text")
    return Bitmap(
        name=BitmapName(name),
        node=node,
        granularity=reply.number(entry["granularity"]),
        dirty_bytes=reply.number(entry["count"]),
        recording=reply.flag(entry["recording"]),
        busy=reply.flag(entry["busy"]),
        persistent=reply.flag(entry["persistent"]),
        inconsistent=reply.flag(entry.get("inconsistent", False)),
        read_only=read_only,
    )


def handover_actions(
    node: NodeName,
    new: BitmapName,
    bases: Sequence[BitmapName],
    *,
    persistent: bool,
    broken: Sequence[BitmapName] = (),
) -> list[Action]:
    """Actions of the run's transaction for one disk: record into `new`, stop recording into `bases`.

    broken: bitmaps of ours that are removed in the same transaction (see `broken_chain_bitmaps`).
    """
    arguments = {"node": node, "name": new, "granularity": GRANULARITY_BYTES, "persistent": persistent}
    return [
        {"type": "block-dirty-bitmap-add", "data": arguments},
        *(_on(node, name, "remove") for name in broken),
        *(_on(node, name, "disable") for name in bases),
    ]


def merge_actions(node: NodeName, merged: BitmapName, bitmaps: Sequence[BitmapName]) -> list[Action]:
    """Actions that make one bitmap of several, which differ from it in nothing but their time."""
    added = {"node": node, "name": merged, "granularity": GRANULARITY_BYTES, "disabled": True}
    return [{"type": "block-dirty-bitmap-add", "data": added}, _merge(node, merged, bitmaps)]


def broken_chain_bitmaps(
    bitmaps: Iterable[Bitmap], namespace: Namespace, theirs: Theirs = _nobody
) -> tuple[BitmapName, ...]:
    """Return our bitmaps of a node if the newest does not record: somebody disabled it, or QEMU crashed.

    Then there is a gap, and neither it nor the checkpoints before it can be used any more. They must not
    stand beside the bitmap of a run either: were that run to fail, the newest would look like a base that
    the run itself had disabled, and be enabled again, gap and all. theirs: as for `plan_bitmap_recovery`.
    """
    ours = _ours(bitmaps, namespace, theirs)
    if not ours or ours[-1][1].recording:
        return ()
    return tuple(bitmap.name for _, bitmap in ours if not bitmap.busy)


@dataclass(frozen=True)
class BitmapPlan:
    """What finishes or undoes the bitmaps of one repository.

    done: in words what was done, to be reported afterwards. planned: the same, before it is done.
    """

    actions: tuple[Action, ...]
    done: tuple[str, ...]
    planned: tuple[str, ...] = ()


def plan_bitmap_recovery(
    bitmaps: Iterable[Bitmap],
    namespace: Namespace,
    committed: Callable[[PointId], bool],
    checkpoints: int = 0,
    absent: Mapping[PointId, str] = MappingProxyType({}),
    theirs: Theirs = _nobody,
) -> BitmapPlan:
    """Decide what must happen to the bitmaps of one node, from their names alone.

    bitmaps: all of one node. committed: whether a point's directory stands under its final name. checkpoints:
    how many bitmaps of older points stay. absent: what became of points that were committed; their bitmaps
    are treated as those of unfinished ones, but not called so. theirs: bitmaps that came along with a disk of
    another VM are left to that VM. The answer is one list of actions for one transaction, empty when there is
    nothing to do.
    """
    bitmaps = tuple(bitmaps)
    ours = _ours(bitmaps, namespace, theirs)
    valid = [one for point, one in ours if committed(point)]
    newest = valid[-1] if valid else None
    gone = [one for point, one in ours if not committed(point)]
    unfinished = [one for one in gone if newest is None or one.name > newest.name]
    pruned = [one for one in gone if one not in unfinished]
    kept = _usable_checkpoints(valid[:-1], gone)[-checkpoints:] if checkpoints else []
    actions = [
        _on(one.node, one.name, "remove") for one in bitmaps if one.name == namespace.differential_bitmap
    ]
    actions += _roll_back(unfinished, newest) + _retain_checkpoints(kept, pruned)
    done = [f"removed the {_which(one, namespace, absent)}" for one in unfinished]
    planned = [f"to clean up: {_which(one, namespace, absent)}" for one in unfinished]
    for old in valid[:-1]:
        if old not in kept and newest is not None:
            actions.append(_on(old.node, old.name, "remove"))
            done.append(f"removed the bitmap {old.name} from {old.node}: {newest.name} replaces it")
            planned.append(f"to clean up: bitmap {old.name} on {old.node}, which {newest.name} replaces")
    return BitmapPlan(tuple(actions), tuple(done), tuple(planned))


def applied(bitmaps: Iterable[Bitmap], actions: Iterable[Action], *, freed: bool) -> tuple[Bitmap, ...]:
    """Return the bitmaps of one node as they will be after the actions of a `BitmapPlan`.

    freed: whether our exports end before that, which keep bitmaps busy. A merge adds the counts up: what
    they have in common is not known.
    """
    found = {one.name: replace(one, busy=one.busy and not freed) for one in bitmaps}
    for action in actions:
        kind, data = str(action["type"]), cast("Mapping[str, Any]", action["data"])
        if kind.endswith("-merge"):
            more = sum(found[name].dirty_bytes for name in data["bitmaps"])
            target = found[data["target"]]
            found[target.name] = replace(target, dirty_bytes=target.dirty_bytes + more)
        elif kind.endswith("-remove"):
            del found[data["name"]]
        else:
            found[data["name"]] = replace(found[data["name"]], recording=kind.endswith("-enable"))
    return tuple(found.values())


def _which(one: Bitmap, namespace: Namespace, absent: Mapping[PointId, str]) -> str:
    point = namespace.point_of(one.name)
    if point is not None and point in absent:
        return f"bitmap {one.name} on {one.node}: the point {point} that it names {absent[point]}"
    return f"unfinished bitmap {one.name} on {one.node}"


def _usable_checkpoints(checkpoints: list[Bitmap], gone: list[Bitmap]) -> list[Bitmap]:
    """Return the checkpoints after the last bitmap that can't be read: those before it have a gap."""
    broken = max((one.name for one in (*checkpoints, *gone) if one.inconsistent), default="")
    return [one for one in checkpoints if one.name > broken]


def _retain_checkpoints(kept: list[Bitmap], pruned: list[Bitmap]) -> list[Action]:
    """Have checkpoints stand still, and take over what the bitmaps of pruned points recorded.

    A bitmap is named after the point that it records from; with that point gone, its record goes on the
    one before it, which must not begin to record for that.
    """
    actions: list[Action] = []
    for one in pruned:
        before = [checkpoint for checkpoint in kept if checkpoint.name < one.name]
        if before:
            actions.append(_merge(one.node, before[-1].name, [one.name]))
    actions += [_on(one.node, one.name, "disable") for one in kept if one.recording]
    return actions + [_on(one.node, one.name, "remove") for one in pruned]


def _roll_back(unfinished: list[Bitmap], base: Bitmap | None) -> list[Action]:
    """Undo `begin` for one node: what the unfinished bitmaps recorded belongs to `base`.

    Also if the base records: it did so all the time (a full), and loses nothing by it, or somebody has
    enabled it since. Not if the record has a gap: an inconsistent bitmap, or none that records up to now.
    Then base must not look sound: it stays disabled or inconsistent, or goes, if it records; the next run
    sees that and does not use it.
    """
    removals = [_on(new.node, new.name, "remove") for new in unfinished]
    if base is None or not unfinished or base.inconsistent:
        return removals
    if any(bitmap.inconsistent for bitmap in unfinished) or not unfinished[-1].recording:
        return [*removals, _on(base.node, base.name, "remove")] if base.recording else removals
    # Merge first: it refuses when a bitmap has vanished meanwhile, where `enable` in a transaction makes
    # QEMU itself crash (tests/conformance/test_dangers.py, `enable_an_absent_bitmap`). Within one
    # transaction all actions take effect at once, whatever their order.
    merge = _merge(base.node, base.name, [new.name for new in unfinished])
    return [merge, *(() if base.recording else (_on(base.node, base.name, "enable"),)), *removals]


def _ours(bitmaps: Iterable[Bitmap], namespace: Namespace, theirs: Theirs) -> list[tuple[PointId, Bitmap]]:
    """Return our bitmaps with their points, oldest first: the point comes first in the name."""
    named = [(point, one) for one in bitmaps if (point := namespace.point_of(one.name)) is not None]
    found = [(point, one) for point, one in named if not theirs(point)]
    return sorted(found, key=lambda each: each[1].name)


def _merge(node: NodeName, target: BitmapName, sources: Sequence[BitmapName]) -> Action:
    arguments = {"node": node, "target": target, "bitmaps": list(sources)}
    return {"type": "block-dirty-bitmap-merge", "data": arguments}


def _on(node: NodeName, name: BitmapName, what: str) -> Action:
    return {"type": f"block-dirty-bitmap-{what}", "data": {"node": node, "name": name}}
