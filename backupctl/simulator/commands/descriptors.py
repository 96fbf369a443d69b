# SPDX-License-Identifier: GPL-2.0-or-later
"""Descriptors passed over the monitor's socket."""

from typing import Any

from backupctl.simulator.commands.table import Arguments, command
from backupctl.simulator.failure import CommandError
from backupctl.simulator.machine import Machine


def _received(vm: Machine) -> int:
    fd, vm.received_fd = vm.received_fd, None
    if fd is None:
        raise CommandError("No file descriptor supplied via SCM_RIGHTS")
    return fd


@command("add-fd", {"fdset-id?": "int", "opaque?": "str"})
def add_fd(vm: Machine, given: Arguments) -> dict[str, Any]:
    """Add the descriptor to a set."""
    return {**vm.descriptors.add(_received(vm), given.get("fdset-id"), given.get("opaque"))}


@command("remove-fd", {"fdset-id": "int", "fd?": "int"})
def remove_fd(vm: Machine, given: Arguments) -> dict[str, Any]:
    """Remove a set, or one descriptor of it."""
    vm.descriptors.remove(given["fdset-id"], given.get("fd"), at_once=vm.closes_fds_at_once)
    return {}


@command("query-fdsets")
def query_fdsets(vm: Machine, _given: Arguments) -> list[dict[str, Any]]:
    """Return all sets."""
    return vm.descriptors.describe()


@command("getfd", {"fdname": "str"})
def getfd(vm: Machine, given: Arguments) -> dict[str, Any]:
    """Give the descriptor a name."""
    vm.descriptors.name(given["fdname"], _received(vm))
    return {}


@command("closefd", {"fdname": "str"})
def closefd(vm: Machine, given: Arguments) -> dict[str, Any]:
    """Close a named descriptor."""
    vm.descriptors.close_named(given["fdname"])
    return {}
