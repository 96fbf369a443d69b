# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may need the room that we fill; what can't be told counts as there."""

import os
from pathlib import Path
from typing import Any

import pytest

from backupctl.cancel import Cancellation
from backupctl.errors import Failed, WriteFailed
from backupctl.system import open_files
from backupctl.system.open_files import FileSystem, OpenFile
from backupctl.vm import filling
from backupctl.vm.filling import Filling
from backupctl.vm.qmp import shared_files

HERE, FREE = 7, 100 << 20


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with a file system that is nearly full, and the VMs that a test puts there."""
    vms: dict[int, tuple[OpenFile, ...] | None] = {}
    monkeypatch.setattr(FileSystem, "of", lambda _: FileSystem(HERE, FREE))
    monkeypatch.setattr(filling, "free_bytes", lambda _: FREE)
    monkeypatch.setattr(open_files, "writers", lambda: iter([(process, "VM") for process in vms]))
    monkeypatch.setattr(open_files, "written", lambda process: vms.get(process, ()))
    return vms


def test_a_file_system_without_a_vm_may_be_filled(tmp_path):
    Filling(tmp_path).check()


@pytest.mark.parametrize(
    ("file_system", "found"),
    [
        (FileSystem(HERE, 1), True),
        (FileSystem(8, FREE), True),  # another subvolume of the same pool
        (FileSystem(8, FREE + 4096), False),
    ],
)
def test_an_image_of_any_vm_counts(file_system, found, machine, tmp_path):
    machine[41] = (OpenFile(file_system, "/images/a.qcow2"),)
    assert ("a.qcow2 of the VM of process 41" in Filling(tmp_path).who()) is found


def test_a_vm_that_nobody_may_look_at_counts(machine, tmp_path):
    machine[41] = None
    with pytest.raises(WriteFailed, match="cannot look at the files of process 41"):
        filling.watching(Cancellation(), tmp_path / "new.raw").check()


def test_a_device_is_not_watched(machine, tmp_path):
    machine[41] = None
    filling.watching(Cancellation(), Path(os.devnull)).check()


def test_the_process_of_the_vm_at_hand_counts_although_it_is_no_emulator(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(open_files, "writers", lambda: iter(()))
    machine[41] = (OpenFile(FileSystem(HERE, 1), "/images/a.qcow2"),)
    with pytest.raises(Failed, match=r"a\.qcow2"):
        Filling(tmp_path, process=41).check()


def node(filename: str, **more: Any) -> dict[str, Any]:
    return {"drv": "file", "ro": False, "image": {"filename": filename}, **more}


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("/etc/hostname", "/etc/hostname of the VM is on it too"),
        ("/no/such/image", "may be on it"),
        ("disk.qcow2", "may be on it"),
        ('json:{"driver": "file"}', "may be on it"),
        ("/dev/fdset/3", "may be on it"),
        ("/dev/null", ""),
    ],
)
def test_a_name_says_that_a_file_is_there_or_that_nobody_can_tell(named, said, tmp_path):
    class Monitor:
        process = None

        def __init__(self, **nodes: dict[str, Any]) -> None:
            self.nodes = nodes

        def execute(self, *_: object) -> list[dict[str, Any]]:
            return [{"node-name": name.replace("_", "-"), **one} for name, one in self.nodes.items()]

    found = shared_files.filling(tmp_path, Monitor(n0=node(named)), [])  # type: ignore[arg-type]
    assert said in found.who() if said else found.who() == ""
    hidden = Monitor(n0=node(named, ro=True), n1=node(named, drv="nbd"), backupctl_0123abcd_x=node(named))
    assert shared_files.filling(tmp_path, hidden, []).who() == ""  # type: ignore[arg-type]
