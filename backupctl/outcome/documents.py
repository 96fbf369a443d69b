# SPDX-License-Identifier: GPL-2.0-or-later
"""What `--json` prints: each report as one document. Keys are only ever added; tests pin them.

The documents are made of dicts, lists, texts and numbers alone, ready for `json.dumps`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # each command imports only what it runs: all of it would double the start of most
    from backupctl.errors import BackupctlError
    from backupctl.events import Event
    from backupctl.operations.backup.outcome import RunReport
    from backupctl.operations.bitmaps import Removal, StoredBitmap
    from backupctl.operations.diff import DiffReport
    from backupctl.operations.doctor.run import Diagnosis
    from backupctl.operations.prune.run import PruneReport
    from backupctl.operations.recover import Recovered
    from backupctl.operations.restore.in_place import InPlaceReport
    from backupctl.operations.restore.overlay import OverlayReport
    from backupctl.operations.restore.whole import RestoreReport
    from backupctl.operations.routine.forecast import Forecast
    from backupctl.operations.routine.run import RoutineReport, TaskResult
    from backupctl.operations.serve import Export
    from backupctl.operations.status import Status
    from backupctl.operations.timers.install import Change
    from backupctl.operations.verify.layer import VerifyScope
    from backupctl.operations.verify.run import VerifyReport
    from backupctl.operations.versions import Component
    from backupctl.repository.point import Point

Document = dict[str, Any]

_DISK_KEYS = (
    *("name", "kind", "size", "dirty_bytes", "copied_bytes", "zero_bytes", "unchanged_bytes"),
    *("stored_bytes", "scanned", "reason"),
)


_NOT_OF_TASK = {
    "backup": ("vm", "warnings", "notes"),
    "prune": ("vm", "dry_run", "rules", "unused_rules"),
    "verify": ("vms",),
}
"""Keys that the report of a task has not: the document of its VM tells of it."""


def run(report: "RunReport", events: Sequence["Event"]) -> Document:
    """Return the report of a full or incremental. events: what happened during it."""
    return {
        "vm": report.vm,
        "point": report.point,
        "kind": report.kind,
        "parent": report.parent,
        "disks": [
            {
                **{key: getattr(disk, key) for key in _DISK_KEYS},
                "damaged": list(report.damaged_points(disk.name)),
            }
            for disk in report.disks
        ],
        "frozen_ms": report.frozen_ms,
        "consistency": report.consistency,
        "seconds": round(report.seconds, 3),
        "missing_disks": [{"name": name, "point": point} for name, point in report.missing_disks],
        **_by_severity(events),
    }


def recover(vm: str, done: "Recovered", events: Sequence["Event"]) -> Document:
    """Return what a recover did. events: what happened during it."""
    return {"vm": vm, "actions": list(done.actions), **_by_severity(events)}


def status(found: "Status", configuration: str | None) -> Document:
    """Return the state of a VM. configuration: the path of the file in force."""
    return {**asdict(found), "configuration": configuration}


def doctor(found: "Diagnosis", configuration: str | None, report: Path | None = None) -> Document:
    """Return the findings of a doctor.

    configuration: the path of the file in force. report: that of the report that was written.
    """
    return {
        "vm": found.vm,
        "ok": not found.bad,
        "configuration": configuration,
        "findings": [asdict(one) for one in found.findings],
        "report": str(report) if report else None,
    }


def versions(found: "Iterable[Component]") -> Document:
    """Return the versions of everything that is at work."""
    return {"components": [asdict(one) for one in found]}


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
                "ranges": _ranges(damage.ranges),
                "touches": [
                    {"point": one.point, "disk": one.disk, "ranges": _ranges(one.ranges)}
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
            {"point": one.point, "keep": one.keep, "reasons": list(one.reasons)} for one in report.decisions
        ],
        "dropped": list(report.dropped),
        "removed": list(report.removed),
        "merged": [asdict(one) for one in report.merged],
        "left": list(report.left),
        "long_chains": list(report.long_chains),
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


def protection(vm: str, point: str, *, protected: bool) -> Document:
    """Return the outcome of protect and unprotect."""
    return {"vm": vm, "point": point, "protected": protected}


def point(found: "Point") -> Document:
    """Return a point: its manifest under the names of the reports."""
    manifest = found.manifest.to_dict()
    return {
        "vm": manifest["vm"],
        "point": manifest["point"],
        "kind": manifest["kind"],
        "disks_kind": disks_kind(found),
        "parent": manifest["parent"],
        "consistency": manifest["consistency"],
        "frozen_ms": manifest["freeze"]["milliseconds"],
        "start": manifest["start"],
        "end": manifest["end"],
        "qemu": manifest["qemu"],
        "backupctl": manifest["backupctl"],
        "freeze": manifest["freeze"],
        "disks": manifest["disks"],
        "protected": found.protected,
        "path": str(found.path),
    }


def disks_kind(found: "Point") -> str:
    """Return "full", "incremental" or "mixed", by the kinds of a point's disks."""
    kinds = {entry.kind for entry in found.manifest.disks}
    return "mixed" if len(kinds) > 1 else str(next(iter(kinds)))


def restore(report: "RestoreReport") -> Document:
    """Return what a whole restore made."""
    disks = [
        {
            "name": one.name,
            "point": one.point,
            "path": one.path,
            "format": one.format,
            "size": one.size,
            "seconds": round(one.seconds, 3),
            "damaged": _ranges(one.damaged),
            "unproven": one.unverified or None,
        }
        for one in report.images
    ]
    return _restored(report, disks)


def restore_in_place(report: "InPlaceReport") -> Document:
    """Return what a restore with --only-changed wrote."""
    disks = [
        {
            "name": one.name,
            "point": one.point,
            "path": str(one.path),
            "format": one.format,
            "size": one.size,
            "written_bytes": one.written_bytes,
            "same_bytes": one.same_bytes,
            "seconds": round(one.seconds, 3),
        }
        for one in report.images
    ]
    return _restored(report, disks)


def overlay(report: "OverlayReport") -> Document:
    """Return what a restore with --thin made."""
    disks = [
        {
            "name": one.name,
            "point": one.point,
            "path": str(one.path),
            "size": one.size,
            "backing": str(one.backing),
        }
        for one in report.images
    ]
    return _restored(report, disks)


def _restored(report: "RestoreReport | InPlaceReport | OverlayReport", disks: list[Document]) -> Document:
    missing = [{"name": one.name, "point": one.point} for one in report.missing]
    return {"vm": report.vm, "point": report.point, "disks": disks, "missing": missing}


def served(vm: str, point_id: str, exports: Iterable["Export"]) -> Document:
    """Return where the disks of a point are served."""
    listed = [
        {"disk": one.disk, "uri": one.uri, "size": one.size, "writable": one.writable} for one in exports
    ]
    return {"vm": vm, "point": point_id, "exports": listed}


def bitmaps(vm: str, found: Iterable["StoredBitmap"]) -> Document:
    """Return the bitmaps of a VM."""
    return {"vm": vm, "bitmaps": [asdict(one) for one in found]}


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


def diff(report: "DiffReport") -> Document:
    """Return what changed between two points."""
    return {
        "vm": report.vm,
        "before": report.before,
        "after": report.after,
        "disks": [
            {
                "name": one.name,
                "size_before": one.size_before,
                "size_after": one.size_after,
                "changed_bytes": one.changed_bytes,
                "ranges": _ranges(one.ranges()),
            }
            for one in report.disks
        ],
        "only_before": list(report.only_before),
        "only_after": list(report.only_after),
    }


def error(err: "BackupctlError") -> Document:
    """Return an error."""
    return {
        "kind": err.code,
        "message": err.message,
        "step": err.step,
        "state": err.state,
        "hint": err.hint,
        "next": err.next_command,
        "exit_code": err.exit_code,
    }


def of_each(vm: str, report: object, err: "BackupctlError | None") -> Document:
    """Return what a command for each of several VMs came to for one. report: its document, None for none."""
    return {
        "vm": vm,
        "exit_code": err.exit_code if err else 0,
        "report": report,
        "error": error(err) if err else None,
    }


def each(told: Sequence[Document]) -> Document:
    """Return what a command for each of several VMs came to. told: by `of_each`."""
    return {"vms": list(told)}


def routine(vm: str, report: "RoutineReport", events: Sequence["Event"], logs: Mapping[str, str]) -> Document:
    """Return what `run` did for one VM. events: what happened meanwhile. logs: the log of a failed task."""
    tasks = [
        {
            "task": one.task,
            "outcome": "skipped" if one.skipped else "failed" if one.error else "done",
            "reason": one.skipped,
            "report": _of_task(vm, one),
            "error": {**error(one.error), "log": logs.get(one.task) or None} if one.error else None,
        }
        for one in report.tasks
    ]
    return {
        **routine_failed(vm, report.error),
        "seconds": round(report.seconds, 3),
        "tasks": tasks,
        **_by_severity(events),
    }


def _of_task(vm: str, one: "TaskResult") -> Document | None:
    """Return the report of a task under the keys that the command of its own has."""
    report: Any = one.report
    if report is None:
        return None
    if one.task == "backup":
        found = run(report, ())
    elif one.task == "prune":
        found = prune(vm, report, {}, {}, dry_run=False)
    else:
        assert one.scope is not None
        found = verify(report, one.scope)
    return {key: value for key, value in found.items() if key not in _NOT_OF_TASK[one.task]}


def routine_failed(vm: str, err: "BackupctlError | None") -> Document:
    """Return what `run` came to for a VM that nothing else is known of."""
    return {
        "vm": vm,
        "exit_code": err.exit_code if err else 0,
        "seconds": 0.0,
        "tasks": [],
        "error": error(err) if err else None,
        "warnings": [],
        "notes": [],
    }


def forecast(vm: str, found: "Forecast") -> Document:
    """Return what `run` would do for one VM."""
    planned: dict[str, Document | None] = {
        "backup": {
            "kind": found.kind,
            "full_due": found.full_due,
            "most_bytes": found.most_bytes,
            "disks": [asdict(one) for one in found.disks],
        },
        "prune": None if found.dropped is None else {"dropped": list(found.dropped)},
        "verify": {"percent": found.verify_percent} if found.verify_percent else None,
    }
    tasks = [
        {
            "task": task,
            "outcome": "planned" if plan else "skipped",
            "reason": "",
            "report": plan,
            "error": None,
        }
        for task, plan in planned.items()
    ]
    return {**routine_failed(vm, None), "tasks": tasks}


def routines(vms: Sequence[Document], seconds: float, exit_code: int, *, dry_run: bool) -> Document:
    """Return what `run` came to for all VMs."""
    return {
        "dry_run": dry_run,
        "exit_code": exit_code,
        "seconds": round(seconds, 3),
        "vms": list(vms),
    }


def event(happened: "Event") -> Document:
    """Return an event: its code, its text as `message`, and its fields."""
    found = {one.name: _plain(getattr(happened, one.name)) for one in fields(happened)}
    return {"code": happened.code, "message": happened.text, **found}


def _by_severity(events: Iterable["Event"]) -> Document:
    found: dict[str, list[Document]] = {"warnings": [], "notes": []}
    for one in events:
        if one.severity != "step":
            found[f"{one.severity}s"].append(event(one))
    return found


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def _ranges(ranges: Iterable[tuple[int, int]]) -> list[dict[str, int]]:
    return [{"offset": offset, "length": length} for offset, length in ranges]
