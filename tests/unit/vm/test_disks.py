# SPDX-License-Identifier: GPL-2.0-or-later
"""Which media of a VM are disks to back up."""

from typing import Any

import pytest

from backupctl.errors import CommandFailed, Refused
from backupctl.vm import disks

KINDS = {"lun": "scsi-block", "tape": "scsi-generic", "sda": "scsi-hd"}


class Monitor:
    """A QEMU with one SCSI device of each kind."""

    def execute(self, command: str, arguments: Any = None) -> Any:
        if command == "query-block":
            return [self._device(name) for name in KINDS]
        if command == "query-named-block-nodes":
            return [self._node(name) for name in KINDS]
        assert command == "qom-get"
        name = arguments["path"].removeprefix("/machine/peripheral/")
        if arguments["property"] != "type" or name not in KINDS:
            raise CommandFailed(command, "DeviceNotFound", "no such thing")
        return KINDS[name]

    def _device(self, name: str) -> dict[str, Any]:
        inserted = {"node-name": f"node-{name}", "drv": "host_device", "ro": False}
        return {"device": "", "qdev": name, "removable": False, "inserted": inserted}

    def _node(self, name: str) -> dict[str, Any]:
        image = {"filename": "/dev/sdx", "format": "host_device", "virtual-size": 1 << 20}
        return {"node-name": f"node-{name}", "drv": "host_device", "ro": False, "image": image}


def test_a_scsi_device_that_is_passed_through_is_left_out():
    """The guest's commands go past all of QEMU's block layer, and past every bitmap."""
    found = disks.inventory(Monitor())
    assert [disk.name for disk in found.disks] == ["sda"]
    assert [name for name, _ in found.left_out] == ["lun", "tape"]
    with pytest.raises(Refused, match="passed through"):
        found.chosen(["lun"])
