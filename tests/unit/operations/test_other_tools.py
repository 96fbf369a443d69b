# SPDX-License-Identifier: GPL-2.0-or-later
"""What other programs left in a VM: whose it is, and the command that removes it."""

import json
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest

from backupctl.names import DiskName, NodeName, VmName
from backupctl.operations import other_tools
from backupctl.options import LibvirtAccess, NoMonitor, QmpAccess, VmConfig, VmImage
from backupctl.system.address import Address
from backupctl.vm.bitmap import Bitmap
from tests.conftest import ROOT

OURS = "backupctl-0123abcd-20261121T000000Z-vda"


def bitmap(name, node="n"):
    return Bitmap(name, NodeName(node), 65536, 0, True, False, True, False)


def driver(*bitmaps, guest=True):
    disks = [SimpleNamespace(node="n", filename="/images/it's.qcow2")]
    return SimpleNamespace(
        bitmaps=lambda: bitmaps, has_guest=guest, inventory=lambda: SimpleNamespace(disks=disks)
    )


QMP = VmConfig(VmName("web"), QmpAccess(Address(path="/q")))


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        ("virtnbdbackup.0", "virtnbdbackup"),
        ("virtnbdbackup.12", "virtnbdbackup"),
        ("qmpbackup-ide0-hd0-8a1050f7-cabd-4e29-a825-742e5eecdfea", "qmpbackup"),
        ("pbs-incremental-dirty-bitmap", "Proxmox Backup Server"),
        ("8a1050f7-cabd-4e29-a825-742e5eecdfea", "oVirt"),
        ("mine", "another program"),
    ],
)
def test_a_program_is_known_by_the_names_that_it_gives(name, tool):
    assert other_tools.tool_of(name) == tool


def test_what_is_ours_is_not_another_tools():
    assert other_tools.found(driver(bitmap(OURS)), QMP) == ()


def test_each_tool_is_told_once_with_all_its_names():
    found = other_tools.found(
        driver(bitmap("virtnbdbackup.0"), bitmap("virtnbdbackup.0", "m"), bitmap("x"), bitmap(OURS)), QMP
    )
    assert [(one.tool, one.names) for one in found] == [
        ("virtnbdbackup", ("virtnbdbackup.0",)),
        ("another program", ("x",)),
    ]
    assert len(found[0].removal) == 2, "one for each node"


def test_the_command_fits_the_way_in_which_the_vm_is_reached():
    name = "it's; rm -rf /"
    (qmp,) = other_tools.found(driver(bitmap(name)), QMP)
    assert json.loads(qmp.removal[0]) == {
        "execute": "block-dirty-bitmap-remove",
        "arguments": {"node": "n", "name": name},
    }
    domain = replace(QMP, access=LibvirtAccess("qemu:///system", "a b"))
    (libvirt,) = other_tools.found(driver(bitmap(name)), domain)
    assert shlex.split(libvirt.removal[0]) == [
        *("virsh", "-c", "qemu:///system", "checkpoint-delete", "a b", name)
    ]
    (off,) = other_tools.found(driver(bitmap(name), guest=False), replace(QMP, access=NoMonitor()))
    words = ["qemu-img", "bitmap", "--remove", "/images/it's.qcow2", name]
    assert shlex.split(off.removal[0]) == words
    host = Address.parse("ssh://root@vmhost:22/image")
    there = replace(QMP, access=NoMonitor(), images=(VmImage(DiskName("vda"), (), host),))
    (off,) = other_tools.found(driver(bitmap(name), guest=False), there)
    *ssh, command = shlex.split(off.removal[0])
    assert ssh == ["ssh", "-p", "22", "root@vmhost"]
    assert shlex.split(command) == words, "the shell there takes it apart once more"


def test_the_page_names_each_tool_that_is_known():
    page = (ROOT / "docs/moving-in.md").read_text()
    assert [tool for _, tool in other_tools._TOOLS if tool not in page] == []
