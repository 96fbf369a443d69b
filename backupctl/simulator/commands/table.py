# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of commands, filled by the modules beside this one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from backupctl.simulator.arguments import Form
from backupctl.simulator.machine import Machine

Arguments = dict[str, Any]
Action = Callable[[Machine, Arguments], Any]


@dataclass(frozen=True)
class Command:
    """A command. form: of its arguments, None for a command that checks them itself."""

    name: str
    form: Form | None
    run: Action


TABLE: dict[str, Command] = {}


def command(name: str, form: Form | None = None) -> Callable[[Action], Action]:
    """Add a function to the table; without a form it takes no arguments."""

    def register(run: Action) -> Action:
        TABLE[name] = Command(name, {} if form is None else form, run)
        return run

    return register


def open_command(name: str) -> Callable[[Action], Action]:
    """Add a function that checks its arguments itself to the table."""

    def register(run: Action) -> Action:
        TABLE[name] = Command(name, None, run)
        return run

    return register
