# SPDX-License-Identifier: GPL-2.0-or-later
"""Events of what follows a command: hooks, metrics and notices. None of them changes what was done."""

from dataclasses import dataclass
from pathlib import Path

from backupctl.events import WarningEvent


@dataclass(frozen=True)
class FollowingHookFailed(WarningEvent):
    """A hook that follows a run failed or took too long. hook: `after` or `failed`."""

    code = "hook-failed"
    hook: str
    reason: str

    def _text(self) -> str:
        return self.reason


@dataclass(frozen=True)
class NoticeNotSent(WarningEvent):
    """A notice did not reach anybody. channel: mail, webhook, healthchecks or ntfy."""

    code = "notice-not-sent"
    channel: str
    reason: str

    def _text(self) -> str:
        return f"cannot send the notice by {self.channel}: {self.reason}"


@dataclass(frozen=True)
class MetricsNotWritten(WarningEvent):
    """The result was not recorded, or not written for Prometheus. path: the file or its directory."""

    code = "metrics-not-written"
    path: Path
    reason: str

    def _text(self) -> str:
        return f"cannot record the result in {self.path}: {self.reason}"
