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
    from backupctl.filesystems.tree import Node
    from backupctl.operations.backup.outcome import RunReport
    from backupctl.operations.bitmaps import Removal, StoredBitmap
    from backupctl.operations.delete import Deletion
    from backupctl.operations.diff import DiffReport
    from backupctl.operations.doctor.run import Diagnosis
    from backupctl.operations.files.extract import ExtractReport
    from backupctl.operations.files.run import Found, Place
    from backupctl.operations.mount import MountedDisk
    from backupctl.operations.prune.run import PruneReport
    from backupctl.operations.recover import Recovered
    from backupctl.operations.remove_vm import VmRemoval
    from backupctl.operations.report.facts import Report, VmFacts
    from backupctl.operations.restore.in_place import InPlaceReport
    from backupctl.operations.restore.overlay import OverlayReport
    from backupctl.operations.restore.whole import RestoreReport
    from backupctl.operations.restore_test import RestoreTestReport
    from backupctl.operations.routine.forecast import Forecast
    from backupctl.operations.routine.run import RoutineReport, TaskResult
    from backupctl.operations.serve import Export
    from backupctl.operations.status import Status
    from backupctl.operations.timers.install import Change
    from backupctl.operations.usage import VmUsage
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
    "prune": ("vm", "dry_run", "rules", "unused_rules", "freed_is_estimate"),
    "verify": ("vms",),
    "restore-test": ("vm", "error", "screenshot", "console"),
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


def skipped(vm: str, why: str, events: Sequence["Event"]) -> Document:
    """Return what a full or incremental came to that was not taken, because the VM is off."""
    return {"vm": vm, "point": None, "skipped": why, **_by_severity(events)}


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


def report(found: "Report", path: Path, size_bytes: int) -> Document:
    """Return what the page of `report` says, in short. path: the file. size_bytes: its length."""
    return {
        "file": str(path),
        "bytes": size_bytes,
        "made": f"{found.made:%Y-%m-%dT%H:%M:%SZ}",
        "repositories": [
            {"path": one.path, "problem": one.problem, "vms": [_reported(vm) for vm in one.vms]}
            for one in found.repositories
        ],
    }


def report_served(address: str) -> Document:
    """Return where `report --web` serves the page."""
    return {"uri": address}


def _reported(vm: "VmFacts") -> Document:
    return {
        "vm": vm.name,
        "state": vm.verdict.level.name,
        "points": len(vm.points),
        "damaged": sum(bool(one.broken) for one in vm.points) + sum(not one.unreadable for one in vm.bad),
        "unreadable": sum(one.unreadable for one in vm.bad),
        "stored_bytes": vm.stored_bytes,
        "next_prune_drops": [point.id for point in vm.dropped],
        "findings": [one.text for one in vm.verdict.findings if one.level],
    }


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


def point(found: "Point", chain_bytes: int | None) -> Document:
    """Return a point: its manifest under the names of the reports. chain_bytes: what a restore reads."""
    manifest = found.manifest.to_dict()
    return {
        "vm": found.path.parent.name,
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
        "stored_bytes": sum(entry.stored_bytes for entry in found.manifest.disks),
        "chain_bytes": chain_bytes,
    }


def usage(vms: "Sequence[VmUsage]") -> Document:
    """Return what VMs take."""
    return {"vms": [_vm_usage(one) for one in vms], "stored_bytes": sum(one.stored_bytes for one in vms)}


def _vm_usage(found: "VmUsage") -> Document:
    points = [
        {
            "point": one.point.id,
            "kind": disks_kind(one.point),
            "dropped": one.dropped,
            "protected": one.point.protected,
            "image_bytes": one.image_bytes,
            "metadata_bytes": one.metadata_bytes,
            "stored_bytes": one.stored_bytes,
            "alone_bytes": one.alone_bytes,
            "chain_bytes": one.chain_bytes,
        }
        for one in found.points
    ]
    chains = [
        {
            "disk": one.disk,
            "root": one.root,
            "layers": len(one.points),
            "points": list(one.points),
            "stored_bytes": one.stored_bytes,
        }
        for one in found.chains
    ]
    return {
        "vm": found.vm,
        "path": str(found.path),
        "points": points,
        "chains": chains,
        "other_bytes": found.other_bytes,
        "stored_bytes": found.stored_bytes,
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


def places(found: Iterable["Place"]) -> Document:
    """Return the partitions of a point's disks, and what they hold."""
    return {
        "file_systems": [
            {
                "disk": one.disk or None,
                "partition": one.number,
                "volume": one.volume or None,
                "size": one.size,
                "kind": one.kind or None,
                "problem": one.problem or None,
                "warnings": list(one.warnings),
            }
            for one in found
        ]
    }


def guest_files(listed: Iterable[tuple["Found", Iterable[tuple[bytes, "Node"]]]]) -> Document:
    """Return what is at some paths of a guest."""
    return {
        "paths": [
            {
                "path": _text(found.path),
                "disk": found.place.disk or None,
                "partition": found.place.number,
                "volume": found.place.volume or None,
                "entries": [_guest_file(name, node) for name, node in entries],
            }
            for found, entries in listed
        ]
    }


def _guest_file(name: bytes, node: "Node") -> Document:
    return {
        "name": _text(name),
        "kind": node.kind,
        "mode": f"{node.mode:04o}",
        "owner": node.owner,
        "group": node.group,
        "size": node.size,
        "modified": node.modified,
    }


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def extracted(report: "ExtractReport") -> Document:
    """Return what was copied out of a point."""
    return {
        "target": str(report.target),
        "files": report.files,
        "directories": report.directories,
        "data_bytes": report.data_bytes,
        "skipped_count": report.skipped_count,
        "skipped": [asdict(one) for one in report.skipped],
    }


def restore_test(report: "RestoreTestReport", kept: Mapping[str, Path]) -> Document:
    """Return what a restore test came to. kept: the files that show it."""
    return {
        "vm": report.vm,
        "point": report.point,
        "passed": report.passed,
        "until": report.until,
        "seconds": round(report.seconds, 3),
        "accelerator": report.accelerator,
        "error": error(report.error) if report.error else None,
        "screenshot": str(kept["screenshot"]) if "screenshot" in kept else None,
        "console": str(kept["console"]) if "console" in kept else None,
    }


def mounted(vm: str, point_id: str, disks: Iterable["MountedDisk"]) -> Document:
    """Return where the disks of a point are mounted."""
    listed = [{"disk": one.disk, "path": str(one.path), "size": one.size} for one in disks]
    return {"vm": vm, "point": point_id, "mounted": listed}


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
    elif one.task == "restore-test":
        found = restore_test(report, {})
    else:
        assert one.scope is not None
        found = verify(report, one.scope)
    return {key: value for key, value in found.items() if key not in _NOT_OF_TASK[one.task]}


def forecast_skipped(vm: str, why: str) -> Document:
    """Return what `run` would do for a VM that is off, and is skipped then."""
    task = {"task": "backup", "outcome": "skipped", "reason": why, "report": None, "error": None}
    return {**routine_failed(vm, None), "tasks": [task]}


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
