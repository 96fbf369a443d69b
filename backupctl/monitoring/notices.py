# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a result is worth a notice, and what the notice says.

A failure always is, except one of the same kind again within `repeat_seconds`. So is the first success after
a failure that was reported. Any other success is only if that was asked for.
"""

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from backupctl.monitoring.memory import Past, Told
from backupctl.monitoring.result import Result

Why = Literal["failure", "recovery", "success"]
DEFAULT_REPEAT_SECONDS = 20 * 3600
"""A failure of every night is reported every night, one of every hour once a day."""


@dataclass(frozen=True)
class Notice:
    """One message. subject: one line. document: for programs."""

    why: Why
    subject: str
    text: str
    document: dict[str, Any]


def due(before: Past, result: Result, now: float, repeat_seconds: float, *, on_success: bool) -> Why | None:
    """Say why a result is worth a notice; None if it is not. before: what was known until then."""
    if result.outcome == "failure":
        told = before.told
        again = told is not None and told.reason == result.reason and 0 <= now - told.at < repeat_seconds
        return None if again else "failure"
    if before.told is not None:
        return "recovery"
    return "success" if on_success else None


def told(past: Past, why: Why, result: Result, now: float) -> Told | None:
    """Return what is to be remembered of notices, once this one has reached somebody."""
    return (
        Told(reason=result.reason, at=now) if why == "failure" else None if why == "recovery" else past.told
    )


def compose(why: Why, result: Result) -> Notice:
    """Write the notice."""
    host = socket.gethostname()
    what = {"failure": "failed", "recovery": "works again", "success": "done"}[why]
    reason = f" ({result.reason})" if result.reason else ""
    return Notice(
        why,
        f"backupctl on {host}: {result.command} of {result.vm} {what}{reason}",
        "\n".join(_lines(result)) + "\n",
        {"notice": why, "host": host, **result.document()},
    )


def _lines(result: Result) -> Iterator[str]:
    error = result.error or {}
    if error:
        yield result.message
    for name in ("step", "state", "hint", "next"):
        if error.get(name):
            yield f"{name}: {error[name]}"
    if result.point:
        yield f"point: {result.point}"
    for warning in result.warnings:
        yield f"warning: {warning['message']}"
    yield f"repository: {result.repository}"
    yield f"exit code {result.exit_code} after {result.seconds:.1f} s"
