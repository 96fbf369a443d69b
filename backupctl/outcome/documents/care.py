# SPDX-License-Identifier: GPL-2.0-or-later
"""What the commands print with `--json` that check or remove what is stored, or install timers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from backupctl.outcome.documents.parts import Document, byte_ranges, error

if TYPE_CHECKING:  # see `documents`
    from backupctl.errors import BackupctlError
    from backupctl.operations.bitmaps import Removal
    from backupctl.operations.delete import Deletion
    from backupctl.operations.prune.run import PruneReport
    from backupctl.operations.remove_vm import VmRemoval
    from backupctl.operations.timers.install import Change
    from backupctl.operations.verify.layer import VerifyScope
    from backupctl.operations.verify.run import VerifyReport


def verify(report: "VerifyReport", scope: "VerifyScope") -> Document:
    """Return what a verify found. scope: how much was read."""
    return {
        "vms": list(report.vms),
        "points": report.points,
        "layers": report.layers,
        "data": scope.data,
        "percent": scope.percent if scope.data else 0,
        "seed": scope.seed if scope.data and scope.percent < 100 else None,
        "read_bytes": report.read_bytes,
        "seconds": round(report.seconds, 3),
        "notes": list(report.notes),
        "unchecked": [
            {"vm": one.vm, "path": str(one.path), "disk": one.disk or None, "message": one.message}
            for one in report.unchecked
        ],
        "damage": [
            {
                "vm": damage.vm,
                "kind": damage.kind,
                "path": str(damage.path),
                "disk": damage.disk or None,
                "message": damage.message,
                "ranges": byte_ranges(damage.ranges),
                "touches": [
                    {"point": one.point, "disk": one.disk, "ranges": byte_ranges(one.ranges)}
                    for one in damage.touches
                ],
            }
            for damage in report.damage
        ],
    }


def prune(
    vm: str, report: "PruneReport", rules: Mapping[str, Any], unused: Mapping[str, Any], *, dry_run: bool
) -> Document:
    """Return what a prune of one VM did. rules: those in force. unused: configured ones that were not."""
    return {
        "vm": vm,
        "dry_run": dry_run,
        "rules": dict(rules),
        "unused_rules": dict(unused),
        "points": [
            {
                "point": one.point,
                "keep": one.keep,
                "reasons": list(one.reasons),
                "freed_bytes": (report.freed or {}).get(one.point),
            }
            for one in report.decisions
        ],
        "dropped": list(report.dropped),
        "removed": list(report.removed),
        "merged": [asdict(one) for one in report.merged],
        "left": list(report.left),
        "long_chains": list(report.long_chains),
        "freed_bytes": report.freed_bytes,
        "freed_is_estimate": dry_run,
    }


def prune_all(
    vms: Sequence[Document],
    skipped: Mapping[str, str],
    failed: Mapping[str, "BackupctlError"],
    *,
    dry_run: bool,
) -> Document:
    """Return what a prune of all VMs did. skipped: why nothing was done for a VM."""
    return {
        "dry_run": dry_run,
        "vms": list(vms),
        "skipped": [{"vm": vm, "reason": why} for vm, why in skipped.items()],
        "failed": [{"vm": vm, "error": error(err)} for vm, err in failed.items()],
    }


def deletion(vm: str, done: "Deletion", *, dry_run: bool) -> Document:
    """Return what `delete` did, or would do."""
    points = list(done.points)
    return {
        "vm": vm,
        "dry_run": dry_run,
        "deleted": [] if dry_run else points,
        "would_delete": points if dry_run else [],
        "already_deleted": list(done.already),
        "newest": [{"disk": disk, "point": point} for disk, point in done.newest],
        "freed_bytes": done.freed_bytes,
        "freed_is_estimate": dry_run,
        "left": list(done.left),
    }


def vm_removal(done: "VmRemoval", *, dry_run: bool) -> Document:
    """Return what `remove` did, or would do."""
    return {
        "vm": done.vm,
        "dry_run": dry_run,
        "points": list(done.points),
        "protected": list(done.protected),
        "unfinished": list(done.unfinished),
        "freed_bytes": done.freed_bytes,
        "finished_earlier_removal": done.finished,
    }


def vm_rename(old: str, new: str, *, renamed: bool, configured: bool, dry_run: bool) -> Document:
    """Return what `rename` did. renamed: not before. configured: whether the file still has the old name."""
    return {"vm": old, "new_name": new, "dry_run": dry_run, "renamed": renamed, "configured": configured}


def protection(vm: str, point: str, *, protected: bool) -> Document:
    """Return the outcome of protect and unprotect."""
    return {"vm": vm, "point": point, "protected": protected}


def bitmaps_removed(done: "Removal", *, dry_run: bool) -> Document:
    """Return which bitmaps were removed, or would be."""
    removed = [asdict(one) for one in done.removed]
    return {
        "vm": done.vm,
        "dry_run": dry_run,
        "removed": [] if dry_run else removed,
        "would_remove": removed if dry_run else [],
        "left": [{**asdict(one), "reason": why} for one, why in done.left],
    }


def timers(changes: "Iterable[Change]", commands: Sequence[str], *, dry_run: bool) -> Document:
    """Return what became of systemd units. commands: to be run next."""
    return {
        "dry_run": dry_run,
        "units": [
            {
                "path": str(one.path),
                "action": one.action,
                "content": one.content.decode() if one.content is not None else None,
            }
            for one in changes
        ],
        "commands": list(commands),
    }
