# SPDX-License-Identifier: GPL-2.0-or-later
"""The monitor commands: each is a function of the machine and its checked arguments."""

from backupctl.simulator.commands import (
    bitmaps,
    blocks,
    descriptors,
    devices,
    exports,
    jobs,
    machine,
    objects,
)
from backupctl.simulator.commands.table import TABLE, Command

__all__ = [
    "TABLE",
    "Command",
    "bitmaps",
    "blocks",
    "descriptors",
    "devices",
    "exports",
    "jobs",
    "machine",
    "objects",
]
