# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands of the administrator's that run before and after a backup, never while the guest is frozen.

    before      before anything is done; if it fails, nothing is
    after       when a point is committed and the VM is clean
    failed      when there is no new point, or it came with an error

Each gets a document on stdin, and the main facts of it in its environment.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from backupctl.errors import UNTOUCHED, HookFailed
from backupctl.monitoring.result import Result
from backupctl.system import programs
from backupctl.system.programs import ProgramFailed

HookName = Literal["before", "after", "failed"]
DEFAULT_SECONDS = 60.0


@dataclass(frozen=True)
class Hooks:
    """The commands, each a program and its arguments; empty for none. limit_seconds: for each of them."""

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    limit_seconds: float = DEFAULT_SECONDS

    def command(self, name: HookName) -> tuple[str, ...]:
        """Return the command of a hook."""
        return {"before": self.before, "after": self.after, "failed": self.failed}[name]


def _nothing() -> None:
    pass


def run(hooks: Hooks, name: HookName, result: Result, check: Callable[[], None] = _nothing) -> None:
    """Run one hook, if there is one. check: may raise to end it. Raises HookFailed, or what check raises."""
    command = hooks.command(name)
    if not command:
        return
    environment = {**result.environment(), "BACKUPCTL_HOOK": name}
    try:
        programs.run(command, result.to_json(), environment, hooks.limit_seconds, check)
    except ProgramFailed as err:
        raise HookFailed(f"the hook `{name}`: {err}", state=UNTOUCHED if name == "before" else "") from err
