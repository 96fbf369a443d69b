# SPDX-License-Identifier: GPL-2.0-or-later
"""Which media of a VM are disks to back up."""

from typing import Any

import pytest

from backupctl.errors import CommandFailed, MonitorError, UsageError
from backupctl.vm.qmp import inventory

KINDS = {"lun": "scsi-block", "tape": "scsi-generic", "sda": "scsi-hd"}
UNSEEN = {"fast": "vhost-user-blk-pci"}


class Monitor:
    """A QEMU with one SCSI device of each kind, and a disk that another process serves. shares: share-rw."""

    def __init__(self, shares: object = False) -> None:
        self.shares = shares

    def execute(self, command: str, arguments: Any = None) -> Any:
        if command == "query-block":
            return [self._device(name) for name in KINDS]
        if command == "query-named-block-nodes":
            return [self._node(name) for name in KINDS]
        if command == "query-block-jobs":
            return []
        if command == "qom-get":
            assert arguments == {"path": "/machine/peripheral/sda", "property": "share-rw"}
            return self.shares
        assert command == "qom-list"
        if arguments["path"] != "/machine/peripheral":
            raise CommandFailed(command, "DeviceNotFound", "no such thing")
        made = {"name": "type", "type": "string"}
        return [made, *({"name": name, "type": f"child<{kind}>"} for name, kind in (KINDS | UNSEEN).items())]

    def _device(self, name: str) -> dict[str, Any]:
        inserted = {"node-name": f"node-{name}", "drv": "host_device", "ro": False}
        return {"device": "", "qdev": name, "removable": False, "inserted": inserted}

    def _node(self, name: str) -> dict[str, Any]:
        image = {"filename": "/dev/sdx", "format": "host_device", "virtual-size": 1 << 20}
        return {"node-name": f"node-{name}", "drv": "host_device", "ro": False, "image": image}


def test_a_disk_whose_writes_qemu_does_not_see_is_left_out():
    """The commands of a SCSI device that is passed through go past every bitmap; vhost-user past QEMU."""
    found = inventory.inventory(Monitor())
    assert [disk.name for disk in found.disks] == ["sda"]
    assert [name for name, _ in found.skipped] == ["lun", "tape", "fast"]
    for name, why in (("lun", "passed through"), ("fast", "another process")):
        with pytest.raises(UsageError, match=why):
            found.chosen([name])


def test_a_disk_that_others_may_write_to_says_so():
    for shares in (False, True):
        (disk,) = inventory.inventory(Monitor(shares)).disks
        assert disk.open_to_others is shares
    with pytest.raises(MonitorError, match="share-rw is invalid"):
        inventory.inventory(Monitor("on"))
