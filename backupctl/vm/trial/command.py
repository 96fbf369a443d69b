# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's arguments for a throw-away VM: it gets descriptors, and no name of a file of the host."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from backupctl.vm.trial.options import Accelerator, DiskBus, TrialOptions

AGENT_PORT = "org.qemu.guest_agent.0"
"""The name of the port where a guest agent listens (qga/main.c, QGA_VIRTIO_PATH_DEFAULT)."""
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_ACCELERATORS: Mapping[Accelerator, tuple[str, ...]] = {
    "auto": ("-accel", "kvm", "-accel", "tcg"),
    "tcg": ("-accel", "tcg"),
}
_CONTROLLERS: Mapping[DiskBus, tuple[str, ...]] = {
    "virtio": (),
    "scsi": ("-device", "virtio-scsi-pci,id=scsi0"),
    "sata": ("-device", "ich9-ahci,id=sata0"),
}
_WITH_FLASH = ",pflash0=flash0,pflash1=flash1"
_MOST_SATA = 6  # ports of the controller


@dataclass(frozen=True)
class Flash:
    """Descriptors of the two flash chips. export: of the variables on an NBD server; "": a file in memory."""

    code: int
    variables: int
    export: str


@dataclass(frozen=True)
class Descriptors:
    """What QEMU inherits. monitor, agent: listening sockets. console: connected. disks: export and socket.

    boot: files in memory, by the option that names them. flash: firmware with UEFI variables.
    """

    monitor: int
    agent: int
    console: int
    disks: Sequence[tuple[str, int]]
    boot: Mapping[str, int]
    flash: Flash | None = None

    def all(self) -> list[int]:
        """Return all of them."""
        return [
            *(self.monitor, self.agent, self.console),
            *(number for _, number in self.disks),
            *self.boot.values(),
            *((self.flash.code, self.flash.variables) if self.flash else ()),
        ]


def arguments(options: TrialOptions, given: Descriptors) -> list[str]:
    """Return the arguments."""
    found = ["-name", "backupctl-restore-test", "-no-user-config", "-nodefaults", "-sandbox", _SANDBOX]
    machine = options.machine + (_WITH_FLASH if given.flash else "")
    found += ["-machine", machine, *_ACCELERATORS[options.accelerator], "-cpu", "max"]
    found += ["-m", f"{options.memory_mib}M", "-smp", "1", "-display", "none", "-vga", "std", "-nic", "none"]
    found += ["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]
    found += _chardev("monitor", given.monitor, listening=True)
    found += ["-mon", "chardev=monitor,mode=control"]
    found += _chardev("agent", given.agent, listening=True)
    found += ["-device", f"virtserialport,chardev=agent,name={AGENT_PORT}"]
    found += _chardev("console", given.console, listening=False)
    found += ["-serial", "chardev:console"]
    for option, number in given.boot.items():
        found += [option, f"/proc/self/fd/{number}"]
    if options.kernel and options.append:
        found += ["-append", options.append]
    flash = _flash(given.flash) if given.flash else ()
    return [*found, *flash, *_CONTROLLERS[options.disk_bus], *_disks(options.disk_bus, given.disks)]


def most_disks(bus: DiskBus) -> int:
    """Return how many disks a VM can have."""
    return _MOST_SATA if bus == "sata" else 20


def _chardev(name: str, descriptor: int, *, listening: bool) -> list[str]:
    server = ",server=on,wait=off" if listening else ""
    return ["-chardev", f"socket,id={name},fd={descriptor}{server}"]


def _flash(given: Flash) -> Iterator[str]:
    code = {**_in_memory("flash0", given.code), "read-only": True}
    if given.export:
        variables = {"node-name": "flash1", **_nbd(given.export, given.variables)}
    else:
        variables = _in_memory("flash1", given.variables)
    for node in (code, variables):
        yield from ("-blockdev", json.dumps(node))


def _in_memory(node: str, descriptor: int) -> dict[str, object]:
    file = {"driver": "file", "filename": f"/proc/self/fd/{descriptor}", "locking": "off"}
    return {"driver": "raw", "node-name": node, "file": file}


def _nbd(export: str, descriptor: int) -> dict[str, object]:
    return {"driver": "nbd", "server": {"type": "fd", "str": str(descriptor)}, "export": export}


# Boot index 0 is that of --kernel.
def _disks(bus: DiskBus, disks: Sequence[tuple[str, int]]) -> Iterator[str]:
    for number, (export, descriptor) in enumerate(disks):
        node = {**_nbd(export, descriptor), "node-name": f"disk{number}", "discard": "unmap"}
        yield from (
            "-blockdev",
            json.dumps(node),
            "-device",
            f"{_device(bus, number)},bootindex={number + 1}",
        )


def _device(bus: DiskBus, number: int) -> str:
    drive = f"drive=disk{number}"
    match bus:
        case "virtio":
            return f"virtio-blk-pci,{drive}"
        case "scsi":
            return f"scsi-hd,bus=scsi0.0,{drive}"
        case "sata":
            return f"ide-hd,bus=sata0.{number},{drive}"
