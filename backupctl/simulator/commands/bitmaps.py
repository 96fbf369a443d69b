# SPDX-License-Identifier: GPL-2.0-or-later
"""Dirty bitmaps, and transactions of them."""

from collections.abc import Iterable
from typing import Any

from backupctl.simulator import arguments
from backupctl.simulator.arguments import Form
from backupctl.simulator.commands.table import Arguments, command
from backupctl.simulator.failure import CommandError
from backupctl.simulator.machine import Machine

SYNC = ("none", "full", "top", "incremental", "bitmap")
ADD: Form = {
    "node": "str",
    "name": "str",
    "granularity?": "uint32",
    "persistent?": "bool",
    "disabled?": "bool",
}
ONE: Form = {"node": "str", "name": "str"}
MERGE: Form = {"node": "str", "target": "str", "bitmaps": "list"}
BACKUP: Form = {
    "job-id?": "str",
    "device": "str",
    "target": "str",
    "sync": SYNC,
    "speed?": "int",
    "bitmap?": "str",
    "compress?": "bool",
    "on-source-error?": ("report", "ignore", "enospc", "stop", "auto"),
    "on-target-error?": ("report", "ignore", "enospc", "stop", "auto"),
    "auto-finalize?": "bool",
    "auto-dismiss?": "bool",
    "filter-node-name?": "str",
    "x-perf?": "dict",
}
FORMS: dict[str, Form] = {
    "block-dirty-bitmap-add": ADD,
    "block-dirty-bitmap-remove": ONE,
    "block-dirty-bitmap-clear": ONE,
    "block-dirty-bitmap-enable": ONE,
    "block-dirty-bitmap-disable": ONE,
    "block-dirty-bitmap-merge": MERGE,
    "blockdev-backup": BACKUP,
    "abort": {},
}
_EXTERNAL: Form = {"node": "str", "name": "str"}
_MOMENTS = ("block-dirty-bitmap-add", "blockdev-backup")


def _run(vm: Machine, actions: list[tuple[str, Arguments]], *, grouped: bool = False) -> dict[str, Any]:
    vm.actions.run(actions, grouped=grouped)
    return _moment_of(vm, [kind for kind, _ in actions])


def _moment_of(vm: Machine, kinds: Iterable[str]) -> dict[str, Any]:
    if any(kind in _MOMENTS for kind in kinds):
        vm.keep_moment()
    return {}


def _single(kind: str) -> None:
    def run(vm: Machine, given: Arguments) -> dict[str, Any]:
        check_sources(given)
        vm.actions.run_one(kind, given)
        return _moment_of(vm, (kind,))

    command(kind, FORMS[kind])(run)


def check_sources(given: Arguments) -> None:
    """Check the members of `bitmaps`, if given: each is a name, or {node, name}."""
    for number, each in enumerate(given.get("bitmaps", [])):
        arguments.check_choice(f"bitmaps[{number}]", _EXTERNAL, each)


for _kind in FORMS:
    if _kind != "abort":
        _single(_kind)


@command("transaction", {"actions": "list", "properties?": "dict"})
def transaction(vm: Machine, given: Arguments) -> dict[str, Any]:
    """Do all actions or none."""
    wanted = [_action(number, each) for number, each in enumerate(given["actions"])]
    properties = given.get("properties", {})
    arguments.check({"completion-mode?": ("individual", "grouped")}, properties, "properties.")
    return _run(vm, wanted, grouped=properties.get("completion-mode") == "grouped")


def _action(number: int, given: Any) -> tuple[str, Arguments]:
    where = f"actions[{number}]"
    if not isinstance(given, dict):
        raise CommandError(f"Invalid parameter type for '{where}', expected: object")
    arguments.check({"type": tuple(FORMS), "data": "dict"}, given, f"{where}.")
    arguments.check(FORMS[given["type"]], given["data"], f"{where}.data.")
    check_sources(given["data"])
    return given["type"], given["data"]
