# SPDX-License-Identifier: GPL-2.0-or-later
"""Takes out of a transcript what differs from run to run even on one and the same QEMU.

- the time of events, and the name of the package in the version;
- numbers of descriptors, bytes that a file takes on disk;
- by how much the file below a qcow2 (`fil…`) went over its write threshold: in pieces that no one promises;
- the directory of the run, and `json:` file names, whose order of members is nobody's promise;
- names that QEMU makes up (``#block123``), numbered by their first appearance;
- JOB_STATUS_CHANGE to `paused` and back: a job is paused whenever QEMU drains its node, and how often is
  no part of the protocol;
- the order of events of different jobs and exports: QEMU promises it within each of them only.
"""

import re
from pathlib import Path
from typing import Any

_VARIABLE = ("timestamp", "package", "actual-size", "fd")
_AUTOMATIC = re.compile(r"#block\d+")


class Normaliser:
    """Makes values comparable. One for each transcript, since it numbers names."""

    def __init__(self, directory: Path) -> None:
        self._directory = str(directory)
        self._names: dict[str, str] = {}

    def __call__(self, value: Any) -> Any:
        """Return a JSON value without what varies."""
        if isinstance(value, dict):
            return {key: f"<{key}>" if key in _VARIABLE else self(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self(inner) for inner in value]
        return self._text(value) if isinstance(value, str) else value

    def events(self, events: list[dict[str, Any]]) -> list[Any]:
        """Return events without the pauses of jobs."""
        kept = []
        paused: set[str] = set()
        for event in events:
            data = event.get("data", {})
            if event["event"] == "JOB_STATUS_CHANGE" and _is_flip(data, paused):
                continue
            told = self(event)
            if event["event"] == "BLOCK_WRITE_THRESHOLD" and str(data.get("node-name")).startswith("fil"):
                told["data"]["amount-exceeded"] = "<varies>"
            kept.append(told)
        return sorted(kept, key=_whose)

    def _text(self, text: str) -> str:
        if text.startswith("json:"):
            return "<json: file name>"
        text = text.replace(self._directory, "<directory>")
        if text.startswith("Permission conflict"):
            # Which of the jobs' nameless filters QEMU counts first depends on what it refused before.
            return _AUTOMATIC.sub("<auto>", text)
        return _AUTOMATIC.sub(lambda m: self._names.setdefault(m[0], f"<auto {len(self._names)}>"), text)


def _whose(event: dict[str, Any]) -> str:
    data = event.get("data", {})
    return str(data.get("id") or data.get("device") or "")


def _is_flip(data: dict[str, Any], paused: set[str]) -> bool:
    job, status = data.get("id", ""), data.get("status")
    if status == "paused":
        paused.add(job)
        return True
    if status == "running" and job in paused:
        paused.discard(job)
        return True
    return False
