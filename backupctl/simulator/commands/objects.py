# SPDX-License-Identifier: GPL-2.0-or-later
"""Objects: throttle groups and iothreads."""

from typing import Any

from backupctl.simulator import arguments
from backupctl.simulator.arguments import Form
from backupctl.simulator.commands.table import Arguments, command, open_command
from backupctl.simulator.failure import CommandError
from backupctl.simulator.graph import is_id
from backupctl.simulator.machine import Machine
from backupctl.simulator.nodes import ThrottleNode

OBJECTS = "/objects"
_MOST = 10**15
_LIMITS: Form = {
    f"{what}-{of}{more}?": "int"
    for what in ("bps", "iops")
    for of in ("total", "read", "write")
    for more in ("", "-max", "-max-length")
} | {"iops-size?": "int"}
_GROUP: Form = {"qom-type": "str", "id": "str", "limits?": "dict"}


@open_command("object-add")
def object_add(vm: Machine, given: Arguments) -> dict[str, Any]:
    """Create a throttle group."""
    for name in ("qom-type", "id"):
        if name not in given:
            raise CommandError(f"Parameter '{name}' is missing")
    if given["qom-type"] != "throttle-group":
        raise CommandError(f"Parameter 'qom-type' does not accept value '{given['qom-type']}'")
    arguments.check(_GROUP, given)
    name = given["id"]
    limits = _limits({}, given.get("limits", {}), "limits.")
    if not is_id(name):
        raise CommandError("Parameter 'id' expects an identifier")
    if name in vm.opener.groups:
        raise CommandError(f"attempt to add duplicate property '{name}' to object (type 'container')")
    vm.opener.groups[name] = limits
    return {}


@command("object-del", {"id": "str"})
def object_del(vm: Machine, given: Arguments) -> dict[str, Any]:
    """Delete a throttle group that no node uses."""
    name = given["id"]
    if name not in vm.opener.groups:
        raise CommandError(f"object '{name}' not found")
    if any(isinstance(node, ThrottleNode) and node.group == name for node in vm.graph.nodes.values()):
        if vm.settings.version >= (11, 0, 0):
            raise CommandError(f"Cannot delete throttle group '{name}' with active references")
        raise CommandError(f"object '{name}' is in use, can not be deleted")
    del vm.opener.groups[name]
    return {}


@command("query-iothreads")
def query_iothreads(vm: Machine, _given: Arguments) -> list[dict[str, Any]]:
    """Return the iothreads."""
    return [{"id": name} for name in _iothreads(vm)]


def listed(vm: Machine) -> list[dict[str, str]]:
    """Return all objects as `qom-list` shows them."""
    found = [{"name": "type", "type": "string"}]
    found += [{"name": name, "type": "child<iothread>"} for name in _iothreads(vm)]
    return found + [{"name": name, "type": "child<throttle-group>"} for name in vm.opener.groups]


def set_property(vm: Machine, name: str, wanted: str, value: Any) -> None:
    """Change a throttle group. Raises CommandError."""
    if name not in vm.opener.groups:
        raise CommandError(f"Device '{OBJECTS}/{name}' not found", "DeviceNotFound")
    if wanted != "limits":
        raise CommandError(f"Property 'throttle-group.{wanted}' not found")
    if not isinstance(value, dict):
        raise CommandError("Invalid parameter type for 'limits', expected: object")
    vm.opener.groups[name] = _limits(vm.opener.groups[name], value)


def get_property(vm: Machine, name: str, wanted: str) -> Any:
    """Return the limits of a throttle group. Raises CommandError."""
    if name not in vm.opener.groups:
        raise CommandError(f"Device '{OBJECTS}/{name}' not found", "DeviceNotFound")
    if wanted != "limits":
        raise CommandError(f"Property 'throttle-group.{wanted}' not found")
    none = {each.removesuffix("?"): int(each.endswith("-length?")) for each in _LIMITS}
    return none | vm.opener.groups[name]


def _limits(before: dict[str, int], given: dict[str, Any], where: str = "") -> dict[str, int]:
    """Return the changed limits. Raises CommandError for invalid ones."""
    arguments.check(_LIMITS, given, where)
    found = before | given
    for what in ("bps", "iops"):
        for more in ("", "-max"):
            if found.get(f"{what}-total{more}") and any(
                found.get(f"{what}-{of}{more}") for of in ("read", "write")
            ):
                raise CommandError(
                    "bps/iops/max total values and read/write values cannot be used at the same time"
                )
    for name, value in found.items():
        average = found.get(name.removesuffix("-max"), 0)
        if not 0 <= value <= _MOST:
            raise CommandError(f"bps/iops/max values must be within [0, {_MOST}]")
        if name.endswith("-max") and value and not average:
            raise CommandError("bps_max/iops_max require corresponding bps/iops values")
        if name.endswith("-max") and value and value < average:
            raise CommandError("bps_max/iops_max cannot be lower than bps/iops")
    return found


def _iothreads(vm: Machine) -> list[str]:
    return sorted({device.iothread for device in vm.devices.values() if device.iothread})
