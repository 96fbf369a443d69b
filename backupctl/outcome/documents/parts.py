# SPDX-License-Identifier: GPL-2.0-or-later
"""The parts that several documents have: errors, events, ranges."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # see `documents`
    from backupctl.errors import BackupctlError
    from backupctl.events import Event

Document = dict[str, Any]


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


def event(happened: "Event") -> Document:
    """Return an event: its code, its text as `message`, and its fields."""
    found = {one.name: _plain(getattr(happened, one.name)) for one in fields(happened)}
    return {"code": happened.code, "message": happened.text, **found}


def by_severity(events: Iterable["Event"]) -> Document:
    """Return the events that are no steps, as `warnings` and `notes`."""
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


def byte_ranges(ranges: Iterable[tuple[int, int]]) -> list[dict[str, int]]:
    """Return ranges of bytes, each as `offset` and `length`."""
    return [{"offset": offset, "length": length} for offset, length in ranges]
