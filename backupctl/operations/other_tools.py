# SPDX-License-Identifier: GPL-2.0-or-later
"""Dirty bitmaps and checkpoints in a VM that another program made: whose they are, and how they go.

They are never used: nothing proves that a bitmap and the backup that it belongs to are whole, and none of its
data have digests. They are never changed either; whoever has left that program removes them with the command
that is named here.
"""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from backupctl.names import PREFIX, NodeName
from backupctl.options import LibvirtAccess, VmConfig
from backupctl.progress import counted
from backupctl.system import ssh
from backupctl.vm.bitmap import Bitmap
from backupctl.vm.driver import Driver

_TOOLS = (
    (re.compile(r"virtnbdbackup\.\d+"), "virtnbdbackup"),
    (re.compile(r"qmpbackup-.+"), "qmpbackup"),
    (re.compile(r"pbs-incremental-dirty-bitmap"), "Proxmox Backup Server"),
    (re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"), "oVirt"),
)
"""How each program names its bitmaps or checkpoints, by its source. oVirt names them by UUIDs."""
UNKNOWN = "another program"


@dataclass(frozen=True)
class OtherTool:
    """What one program left in a VM.

    tool: which it seems to be, by the names. names: of its bitmaps or checkpoints, each once. removal: the
    commands that remove them, one for each bitmap.
    """

    tool: str
    names: tuple[str, ...]
    removal: tuple[str, ...]

    @property
    def said(self) -> str:
        """What there is, in words."""
        count = counted(len(self.names), "bitmap")
        return f"{count} of {self.tool} ({', '.join(self.names):.200}): not used, and left alone"


def found(driver: Driver, vm: VmConfig) -> tuple[OtherTool, ...]:
    """Return what other programs left in a VM. Raises MonitorError, Refused."""
    theirs = [one for one in driver.bitmaps() if not one.name.startswith(PREFIX)]
    if not theirs:
        return ()
    images = {} if driver.has_guest else {one.node: one.filename for one in driver.inventory().disks}
    return tuple(
        OtherTool(
            tool,
            tuple(dict.fromkeys(one.name for one in theirs if tool_of(one.name) == tool)),
            tuple(dict.fromkeys(removal(one, vm, images) for one in theirs if tool_of(one.name) == tool)),
        )
        for tool in dict.fromkeys(tool_of(one.name) for one in theirs)
    )


def tool_of(name: str) -> str:
    """Return the program that gives its bitmaps such names."""
    return next((tool for pattern, tool in _TOOLS if pattern.fullmatch(name)), UNKNOWN)


def removal(one: Bitmap, vm: VmConfig, images: Mapping[NodeName, str]) -> str:
    """Return the command that removes a bitmap: virsh's, qemu-img's, or one of QEMU's monitor.

    images: the file of each disk's node of a VM that is off.
    """
    if isinstance(vm.access, LibvirtAccess):
        words = ["virsh", "-c", vm.access.uri, "checkpoint-delete", vm.access.domain, one.name]
        return shlex.join(words)
    if image := images.get(one.node):
        words = ["qemu-img", "bitmap", "--remove", image, one.name]
        host = next((each.host for each in vm.images if each.host), None)
        return shlex.join([*ssh.command_to(host), shlex.join(words)] if host else words)
    return json.dumps(
        {"execute": "block-dirty-bitmap-remove", "arguments": {"node": one.node, "name": one.name}}
    )
