# SPDX-License-Identifier: GPL-2.0-or-later
"""The result of one command on one VM, as hooks, metrics and notices are told."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["backup", "prune", "verify", "restore-test"]
"""What is remembered apart: a prune that works says nothing of the backups."""
Outcome = Literal["started", "success", "failure"]


@dataclass(frozen=True)
class Result:
    """What a command did.

    began: seconds since the epoch. error: its document, None for none; `kind` is its code. point: the one
    that was committed, if any. report: the command's document, if it came to one. warnings: documents of
    events.
    """

    vm: str
    command: str
    repository: str
    began: float
    outcome: Outcome = "started"
    seconds: float = 0.0
    exit_code: int = 0
    error: Mapping[str, Any] | None = None
    point: str = ""
    report: Mapping[str, Any] | None = None
    warnings: Sequence[Mapping[str, Any]] = field(default_factory=tuple)

    @property
    def reason(self) -> str:
        """The code of the error, "" for none."""
        return str(self.error["kind"]) if self.error else ""

    @property
    def message(self) -> str:
        """The error's message, "" for none."""
        return str(self.error["message"]) if self.error else ""

    def document(self) -> dict[str, Any]:
        """Return the result as one document."""
        return {
            "vm": self.vm,
            "command": self.command,
            "repository": self.repository,
            "result": self.outcome,
            "began": round(self.began, 3),
            "seconds": round(self.seconds, 3),
            "exit_code": self.exit_code,
            "point": self.point or None,
            "error": self.error,
            "warnings": list(self.warnings),
            "report": self.report,
        }

    def to_json(self) -> bytes:
        """Return the document as a hook reads it."""
        return (json.dumps(self.document()) + "\n").encode()

    def environment(self) -> dict[str, str]:
        """Return the main facts as environment variables, those that do not apply empty."""
        found = {
            "VM": self.vm,
            "COMMAND": self.command,
            "REPOSITORY": self.repository,
            "RESULT": self.outcome,
            "POINT": self.point,
            "ERROR": self.reason,
            "ERROR_MESSAGE": self.message,
            "EXIT_CODE": "" if self.outcome == "started" else str(self.exit_code),
            "SECONDS": f"{self.seconds:.3f}",
        }
        return {f"BACKUPCTL_{name}": value.replace("\0", "") for name, value in found.items()}
