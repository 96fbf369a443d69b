# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices and the object tree, as far as disks need them."""

from typing import Any

from backupctl.simulator import describe
from backupctl.simulator.arguments import Form
from backupctl.simulator.commands import objects
from backupctl.simulator.commands.table import Arguments, command, open_command
from backupctl.simulator.disks import Device
from backupctl.simulator.failure import CommandError
from backupctl.simulator.filters import CopyBeforeWrite
from backupctl.simulator.graph import refuse, shown, writing_device
from backupctl.simulator.machine import Machine
from backupctl.simulator.nodes import Link

PERIPHERAL = "/machine/peripheral"
_DISKS = ("virtio-blk-pci", "scsi-hd", "virtio-blk")
PROPERTY: Form = {"path": "str", "property": "str"}


@command("query-block")
def query_block(vm: Machine, _given: Arguments) -> list[dict[str, Any]]:
    """Return all devices with their nodes."""
    return [_device(vm, each) for each in vm.devices.values()]


def _device(vm: Machine, device: Device) -> dict[str, Any]:
    described: dict[str, Any] = {"device": "", "qdev": device.qdev, "type": "unknown", "locked": False}
    described |= {"removable": device.removable, "io-status": "ok"}
    if device.removable:
        described["tray_open"] = False
    if device.link is not None:
        described["inserted"] = describe.node(device.link.node, vm.settings.version, with_backing=True)
    return described


@command("qom-list", {"path": "str"})
def qom_list(vm: Machine, given: Arguments) -> list[dict[str, Any]]:
    """Return the properties of an object."""
    if given["path"].rstrip("/") == PERIPHERAL:
        found = [{"name": name, "type": f"child<{each.driver}>"} for name, each in vm.devices.items()]
        return [{"name": "type", "type": "string"}, *found]
    if given["path"].rstrip("/") == objects.OBJECTS:
        return objects.listed(vm)
    device = _find(vm, given["path"])
    kinds = {"type": "string", "drive": "str", "serial": "str"}
    kinds |= {"iothread": "link<iothread>"} if device.driver.startswith("virtio") else {}
    return [{"name": name, "type": kind} for name, kind in kinds.items()]


@command("qom-get", PROPERTY)
def qom_get(vm: Machine, given: Arguments) -> Any:
    """Return a property of a device."""
    if given["path"].startswith(objects.OBJECTS + "/"):
        return objects.get_property(vm, given["path"].removeprefix(objects.OBJECTS + "/"), given["property"])
    device, wanted = _find(vm, given["path"]), given["property"]
    known = {
        "type": device.driver,
        "drive": device.link.node.name if device.link else "",
        "serial": "",
        "share-rw": False,
        "iothread": f"/objects/{device.iothread}" if device.iothread else "",
    }
    if wanted not in known:
        raise CommandError(f"Property '{device.driver}.{wanted}' not found")
    return known[wanted]


@command("qom-set", {**PROPERTY, "value": "any"})
def qom_set(vm: Machine, given: Arguments) -> dict[str, Any]:
    """Attach a device to another node, or change a throttle group."""
    if given["path"].startswith(objects.OBJECTS + "/"):
        name = given["path"].removeprefix(objects.OBJECTS + "/")
        objects.set_property(vm, name, given["property"], given["value"])
        return {}
    device, wanted = _find(vm, given["path"]), given["property"]
    if wanted != "drive":
        raise CommandError(f"Property '{device.driver}.{wanted}' not found")
    if not isinstance(given["value"], str):
        raise CommandError("Invalid parameter type for 'drive', expected: string")
    node = vm.graph.find(given["value"], "")
    if device.link is not None and device.link.node is node:
        vm.power.end("segv")  # where QEMU's assertion fails
    device.write_to(vm.graph, node)
    if isinstance(node, CopyBeforeWrite):
        vm.keep_moment()
    return {}


@open_command("device_add")
def device_add(vm: Machine, given: Arguments) -> dict[str, Any]:
    """Plug in a disk."""
    for name in ("driver",):
        if name not in given:
            raise CommandError(f"Parameter '{name}' is missing")
    name, driver = str(given.get("id", "")), str(given["driver"])
    if driver not in _DISKS:
        raise CommandError(f"'{driver}' is not a valid device model name")
    if name in vm.devices:
        raise CommandError(f"Duplicate device ID '{name}'")
    drive = str(given.get("drive", ""))
    if drive not in vm.graph.nodes:
        raise CommandError(f"Property 'virtio-blk-device.drive' can't find value '{drive}'")
    node = vm.graph.nodes[drive]
    device = Device(name, driver, None)
    if other := writing_device(node):
        raise refuse(node, "write", shown(other), shown(Link("device", None, device.qdev, node)))
    device.write_to(vm.graph, node)
    vm.devices[name] = device
    return {}


@command("device_del", {"id": "str"})
def device_del(vm: Machine, given: Arguments) -> dict[str, Any]:
    """Unplug a disk; the guest agrees at once."""
    name = given["id"].removeprefix(PERIPHERAL + "/")
    device = vm.devices.get(name)
    if device is None:
        raise CommandError(f"Device '{given['id']}' not found", "DeviceNotFound")
    if device.link is not None:
        vm.graph.unlink(device.link)
    del vm.devices[name]
    vm.emit_event("DEVICE_DELETED", {"device": name, "path": f"{PERIPHERAL}/{name}"})
    return {}


def _find(vm: Machine, path: str) -> Device:
    name = path.removeprefix(PERIPHERAL + "/") if path.startswith(PERIPHERAL + "/") else path.strip("/")
    if name not in vm.devices:
        raise CommandError(f"Device '{path}' not found", "DeviceNotFound")
    return vm.devices[name]
