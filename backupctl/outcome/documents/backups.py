# SPDX-License-Identifier: GPL-2.0-or-later
"""What backups, recoveries and `run` print with `--json`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from backupctl.outcome.documents.care import prune, verify
from backupctl.outcome.documents.parts import Document, by_severity, error
from backupctl.outcome.documents.restores import restore_test

if TYPE_CHECKING:  # see `documents`
    from backupctl.errors import BackupctlError
    from backupctl.events import Event
    from backupctl.operations.backup.outcome import RunReport
    from backupctl.operations.recover import Recovered
    from backupctl.operations.routine.forecast import Forecast
    from backupctl.operations.routine.run import RoutineReport, TaskResult

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
        **by_severity(events),
    }


def skipped(vm: str, why: str, events: Sequence["Event"]) -> Document:
    """Return what a full or incremental came to that was not taken, because the VM is off."""
    return {"vm": vm, "point": None, "skipped": why, **by_severity(events)}


def recover(vm: str, done: "Recovered", events: Sequence["Event"]) -> Document:
    """Return what a recover did. events: what happened during it."""
    return {"vm": vm, "actions": list(done.actions), **by_severity(events)}


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
        **by_severity(events),
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
    if found.restore_test_due is not None:
        tasks.append(_planned_restore_test(due=found.restore_test_due))
    return {**routine_failed(vm, None), "tasks": tasks}


def _planned_restore_test(*, due: bool) -> Document:
    return {
        "task": "restore-test",
        "outcome": "planned" if due else "skipped",
        "reason": "" if due else "it is not due yet",
        "report": {"of": "the new point"} if due else None,
        "error": None,
    }


def routines(vms: Sequence[Document], seconds: float, exit_code: int, *, dry_run: bool) -> Document:
    """Return what `run` came to for all VMs."""
    return {
        "dry_run": dry_run,
        "exit_code": exit_code,
        "seconds": round(seconds, 3),
        "vms": list(vms),
    }
