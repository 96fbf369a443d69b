# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine's state, and introspection of the monitor."""

from typing import Any

from backupctl.simulator.arguments import Kind
from backupctl.simulator.commands.table import TABLE, Arguments, Command, command
from backupctl.simulator.machine import Machine


def version(vm: Machine) -> dict[str, Any]:
    """Return the version that the simulator claims."""
    major, minor, micro = vm.settings.version
    return {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": "simulated by backupctl"}


@command("query-version")
def query_version(vm: Machine, _given: Arguments) -> dict[str, Any]:
    """Return the version."""
    return version(vm)


@command("query-status")
def query_status(vm: Machine, _given: Arguments) -> dict[str, Any]:
    """Return whether the guest runs."""
    described: dict[str, Any] = {"status": vm.status, "running": vm.running}
    return described | ({"singlestep": False} if vm.settings.version < (9, 0, 0) else {})


@command("query-name")
def query_name(_vm: Machine, _given: Arguments) -> dict[str, Any]:
    """Return the VM's name: it has none."""
    return {}


@command("query-uuid")
def query_uuid(_vm: Machine, _given: Arguments) -> dict[str, Any]:
    """Return the VM's UUID: it was given none."""
    return {"UUID": "00000000-0000-0000-0000-000000000000"}


@command("query-target")
def query_target(_vm: Machine, _given: Arguments) -> dict[str, Any]:
    """Return the architecture."""
    return {"arch": "x86_64"}


@command("query-kvm")
def query_kvm(_vm: Machine, _given: Arguments) -> dict[str, Any]:
    """Return whether KVM is used, which it is not."""
    return {"enabled": False, "present": True}


@command("query-commands")
def query_commands(_vm: Machine, _given: Arguments) -> list[dict[str, Any]]:
    """Return all commands."""
    return [{"name": name} for name in ("qmp_capabilities", *TABLE)]


@command("query-qmp-schema")
def query_qmp_schema(_vm: Machine, _given: Arguments) -> list[dict[str, Any]]:
    """Return the arguments of all commands."""
    schema: list[dict[str, Any]] = [{"name": "any", "meta-type": "any"}]
    schema += [{"name": n, "meta-type": "builtin", "json-type": j} for n, j in _JSON_TYPES.items()]
    for each in TABLE.values():
        schema += _schema(each)
    return [
        *schema,
        {"name": "qmp_capabilities", "meta-type": "command", "arg-type": "any", "ret-type": "any"},
    ]


_JSON_TYPES = {
    "str": "string",
    "int": "int",
    "uint32": "int",
    "bool": "boolean",
    "dict": "object",
    "list": "array",
}


def _schema(shown: Command) -> list[dict[str, Any]]:
    if shown.form is None:
        return [{"name": shown.name, "meta-type": "command", "arg-type": "any", "ret-type": "any"}]
    object_name, enums, members = f"{shown.name}-arg", [], []
    for name, kind in shown.form.items():
        bare = name.removesuffix("?")
        member: dict[str, Any] = {"name": bare, "type": _type_name(shown.name, bare, kind)}
        members.append(member | ({"default": None} if bare != name else {}))
        if isinstance(kind, tuple):
            enums.append({"name": member["type"], "meta-type": "enum", "values": list(kind)})
    return [
        {"name": shown.name, "meta-type": "command", "arg-type": object_name, "ret-type": "any"},
        {"name": object_name, "meta-type": "object", "members": members},
        *enums,
    ]


def _type_name(command_name: str, member: str, kind: Kind) -> str:
    return f"{command_name}-{member}" if isinstance(kind, tuple) else kind


@command("stop")
def stop(vm: Machine, _given: Arguments) -> dict[str, Any]:
    """Stop the guest's processors."""
    if vm.running:
        vm.set_status("paused")
        vm.emit_event("STOP")
    return {}


@command("cont")
def cont(vm: Machine, _given: Arguments) -> dict[str, Any]:
    """Start the guest's processors."""
    if not vm.running:
        vm.set_status("running")
        vm.emit_event("RESUME")
    return {}


@command("system_powerdown")
def system_powerdown(vm: Machine, _given: Arguments) -> dict[str, Any]:
    """Ask the guest to shut down, which it ignores."""
    vm.emit_event("POWERDOWN")
    return {}


@command("quit")
def quit_qemu(vm: Machine, _given: Arguments) -> dict[str, Any]:
    """Exit cleanly, after the reply."""
    vm.power.end("quit")
    return {}
