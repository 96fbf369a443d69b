# SPDX-License-Identifier: GPL-2.0-or-later
"""What `run` shows: the lines of each VM while it works, the summary, the errors.

All of it is made from the documents of the VMs, so a VM looks the same whichever process worked on it.
"""

import json
import logging
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from backupctl.cli import output, reporters, units
from backupctl.errors import (
    UNTOUCHED,
    BackupctlError,
    DamageFound,
    Failed,
    Interrupted,
    Locked,
    NeedsRecovery,
    UsageError,
)
from backupctl.events import Event
from backupctl.events.routine import VmEnded, VmStarted
from backupctl.names import VmName
from backupctl.operations.fleet.limits import Job
from backupctl.operations.fleet.run import JobResult
from backupctl.outcome import documents
from backupctl.outcome.documents import Document
from backupctl.progress import counted

_log = logging.getLogger("backupctl.events")
_RESULTS = {0: "ok", 1: "failed", 2: "not run", 3: "recover", 4: "damage", 75: "locked"}
_BY_CODE: dict[int, type[BackupctlError]] = {
    kind.exit_code: kind for kind in (Failed, UsageError, NeedsRecovery, DamageFound, Locked)
}


class Watcher:
    """Shows what the processes of several VMs tell, each line with the name of its VM.

    quiet: warnings only. verbose: steps as well.
    """

    def __init__(self, *, quiet: bool, verbose: bool) -> None:
        shown = {"warning", "note", "progress", "step"} if verbose else {"warning", "note", "progress"}
        self._shown = {"warning"} if quiet else shown
        self._last: dict[str, str] = {}

    def started(self, job: Job) -> None:
        """Say so."""
        self._event(VmStarted(job.vm))

    def line(self, vm: VmName, line: str) -> None:
        """Show a line. Of those that are not relayed the last is kept, for a process without outcome."""
        told = reporters.relayed(line)
        if told is None:
            self._last[vm] = line.strip() or self._last.get(vm, "")
            _log.debug("%s: %s", vm, line)
        elif told["severity"] in self._shown:
            severity: Any = told["severity"] if told["severity"] in ("warning", "note") else "step"
            # A verify reports its progress under the name of the VM.
            output.print_message(f"{vm}: {told['text'].removeprefix(f'{vm}: ')}", severity)

    def ended(self, result: JobResult) -> None:
        """Say so, unless it was not even started."""
        if result.seconds:
            self._event(VmEnded(result.vm, entry_of(result)["exit_code"], result.seconds))

    def last_line(self, vm: VmName) -> str:
        """Return the last line that a process wrote and that was not meant for us."""
        return self._last.get(vm, "")

    def _event(self, event: Event) -> None:
        _log.info("%s", event.text, extra={"event": event})
        if "progress" in self._shown:
            output.print_message(event.text, "step")


def entry_of(result: JobResult, last_line: str = "") -> Document:
    """Return the document of a VM by how its process ended."""
    found: Any = None
    with suppress(ValueError):
        found = json.loads(result.document)
    if isinstance(found, dict) and found.get("vms"):
        entry: Document = found["vms"][0]
    elif isinstance(found, dict) and found.get("error"):
        entry = {**documents.routine_failed(result.vm, None), "error": found["error"]}
        entry["exit_code"] = found["error"]["exit_code"]
    else:
        entry = documents.routine_failed(result.vm, _without_document(result, last_line))
    return {**entry, "seconds": round(result.seconds, 3)}


def _without_document(result: JobResult, last_line: str) -> BackupctlError:
    """Return the error of a process that left no document."""
    if result.code is None and not result.seconds:
        return Interrupted(result.why, state=UNTOUCHED)
    if result.code == -signal.SIGTERM:  # our handler was not there yet
        return Interrupted(result.why or "stopped by SIGTERM", state=UNTOUCHED)
    if result.code is not None and result.code > 0:
        return Failed(f"its process ended with exit code {result.code}: {last_line or 'no message'}")
    if result.code is None:
        how = "did not end, even after SIGKILL"
    else:
        how = f"was ended by {signal.Signals(-result.code).name}" if result.code else "left no report"
    return NeedsRecovery(
        f"its process {how}{f' ({result.why})' if result.why else ''}",
        state="what its run had put into the VM may still be there; no committed point is lost",
        next_command=f"backupctl recover {result.vm}",
    )


def print_summary(vms: Sequence[Document], seconds: float, *, dry_run: bool) -> None:
    """Print what became of all VMs."""
    if dry_run:
        planned = ("VM", "BACKUP", "AT MOST>", "PRUNE", "VERIFY", "RESTORE TEST")
        output.print_table(planned, [_planned_row(one) for one in vms], narrow=True)
    else:
        columns = ("VM", "RESULT", "BACKUP", "POINT", "STORED>", "PRUNE", "VERIFY", "TIME>")
        output.print_table(columns, [_row(one) for one in vms], spare=("POINT", "TIME", "BACKUP"))
    if len(vms) > 1:
        results = Counter(_RESULTS[one["exit_code"]] for one in vms)
        listed = ", ".join(f"{number} {result}" for result, number in results.items())
        total = sum(map(_most_bytes if dry_run else _stored_bytes, vms))
        stored = f"{'at most ' if dry_run else ''}{units.size(total)} {'to store' if dry_run else 'stored'}"
        output.print_line(f"{counted(len(vms), 'VM')}: {listed}; {stored}, {units.duration(seconds)}")


def print_errors(vms: Sequence[Document]) -> None:
    """Print every error, with the names of its VMs: what several have in common is printed once."""
    alike: dict[tuple[object, ...], tuple[list[str], Mapping[str, Any]]] = {}
    for one in vms:
        failed = [task["error"] for task in one["tasks"] if task["error"]] or [one["error"]]
        for error in filter(None, failed):
            what = tuple(error.get(key) for key in ("exit_code", "message", "step", "state", "hint"))
            alike.setdefault((*what, error.get("log")), ([], error))[0].append(one["vm"])
    for names, error in alike.values():
        output.print_error(_error(", ".join(names), error), as_json=False, log=error.get("log") or "")


def _error(vm: str, told: Mapping[str, Any]) -> BackupctlError:
    """Return the error that a document tells of."""
    return _BY_CODE[told["exit_code"]](
        told["message"],
        subject=vm,
        step=told["step"],
        state=told["state"],
        hint=told["hint"],
        next_command=told["next"],
    )


def _tasks(one: Document) -> dict[str, Document]:
    return {task["task"]: task for task in one["tasks"]}


def _report(one: Document, task: str) -> Document:
    return _tasks(one).get(task, {}).get("report") or {}


def _stored_bytes(one: Document) -> int:
    return sum(disk["stored_bytes"] for disk in _report(one, "backup").get("disks", ()))


def _most_bytes(one: Document) -> int:
    return int(_report(one, "backup").get("most_bytes", 0))


def _row(one: Document) -> tuple[str, ...]:
    backup = _report(one, "backup")
    return (
        one["vm"],
        "skipped" if _is_skipped(one) else _RESULTS[one["exit_code"]],
        backup.get("kind", "-"),
        backup.get("point", "-"),
        units.size(_stored_bytes(one)) if backup else "-",
        _cell(one, "prune", f"{len(_report(one, 'prune').get('dropped', ()))} dropped"),
        _cell(one, "verify", units.size(_report(one, "verify").get("read_bytes", 0))),
        units.duration(one["seconds"]),
    )


def _is_skipped(one: Document) -> bool:
    """Whether no backup was taken, because the VM is off, and nothing else went wrong."""
    return not one["exit_code"] and _tasks(one).get("backup", {}).get("outcome") == "skipped"


def _cell(one: Document, task: str, done: str) -> str:
    """Return what became of a task in a word or two. done: for one that was done."""
    found = _tasks(one).get(task)
    if found is None or found["outcome"] == "skipped":
        return "-"
    if found["error"]:
        return _RESULTS[found["error"]["exit_code"]]
    return done


def _planned_row(one: Document) -> tuple[str, ...]:
    backup, prune, verify = (_report(one, task) for task in ("backup", "prune", "verify"))
    if one["error"]:
        return (one["vm"], _RESULTS[one["exit_code"]], "-", "-", "-", "")
    if not backup:
        return (one["vm"], "skipped", "-", "-", "-", "")
    return (
        one["vm"],
        _planned_kind(backup),
        units.size(backup["most_bytes"]),
        f"drops {len(prune['dropped'])}" if prune else "-",
        f"{verify['percent']:g} %" if verify else "-",
        _DUE[_tasks(one).get("restore-test", {}).get("outcome", "")],
    )


_DUE = {"planned": "due", "skipped": "not due", "": ""}
"""Of a restore test that is configured, by what would become of it."""


def _planned_kind(backup: Document) -> str:
    """Say how the disks would be taken: "incremental (vda scan, vdb full)"."""
    others = [f"{disk['name']} {disk['how']}" for disk in backup["disks"] if disk["how"] != backup["kind"]]
    return f"{backup['kind']} ({', '.join(others)})" if others else str(backup["kind"])
