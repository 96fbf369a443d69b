# SPDX-License-Identifier: GPL-2.0-or-later
"""Which retention rules hold for a VM: those of the command line, or those of the configuration."""

from dataclasses import dataclass
from typing import Any

import msgspec

from backupctl.cli.target import Target
from backupctl.operations.prune import retention
from backupctl.operations.prune.retention import Rules

COUNTED = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
"""The rules that are numbers, by their names in `Rules`; `keep_` comes before them in the configuration."""
_KEYS = (*(f"keep_{name}" for name in COUNTED), "keep_within")


@dataclass(frozen=True)
class Policy:
    """Which points are kept. typed: whether the command line says so. said: the rules, by their keys.

    unused: rules of the configuration that do not count, because the command line has some.
    """

    rules: Rules
    typed: bool
    said: dict[str, Any]
    unused: dict[str, Any]

    @classmethod
    def of(cls, target: Target, typed: dict[str, Any]) -> "Policy":
        """Take the command line's rules, if it has any, or else those of the configuration, never both."""
        found = msgspec.to_builtins(target.config.of(target.name))
        configured = {key: found[key] for key in _KEYS if found.get(key)}
        said = typed or configured
        within = said.get("keep_within")
        rules = Rules(
            **{name: int(said.get(f"keep_{name}", 0)) for name in COUNTED},
            within=retention.duration(within) if within else None,
        )
        unused = {key: value for key, value in configured.items() if typed and typed.get(key) != value}
        return cls(rules, bool(typed), said, unused)


def configured(target: Target) -> Rules:
    """Return what the configuration keeps of a VM's points."""
    return Policy.of(target, {}).rules
