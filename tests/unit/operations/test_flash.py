# SPDX-License-Identifier: GPL-2.0-or-later
"""Flash chips are disks of a point, and no disks of the guest."""

import json
from contextlib import contextmanager

import pytest

from backupctl.cancel import Cancellation
from backupctl.operations import flash, restore_test, uefi
from backupctl.operations.restore_test import RestoreTestRequest
from backupctl.progress import Silent
from backupctl.repository.stored_files import NewFile
from backupctl.vm.trial import machine
from backupctl.vm.trial.options import TrialOptions
from tests.unit.points import P1, Builder, disk_entry

CHIP = {"device": "pflash1", "qdev": "/machine/system.flash1", "node": "efivars"}
DISK = {"device": "", "qdev": "/machine/peripheral/vda/virtio-backend", "node": "vda"}
TOLD = {
    "two blocks": ({"format": 1, "block": [CHIP, DISK]}, ["efivars"]),
    "no flash": ({"block": [DISK]}, []),
    "QEMU did not tell": ({"block": None}, []),
    "of a later form": ({"block": {"chips": [CHIP]}}, []),
}


def made(builder: Builder, told: object) -> None:
    content = json.dumps(told).encode()
    disks = [(disk_entry(name), [(0, b"a")]) for name in ("efivars", "vda")]
    builder.point(P1, *disks, definition=[NewFile("qemu.json", "qemu", "", content)])


@pytest.mark.parametrize("case", TOLD)
def test_the_flash_chips_are_those_that_qemu_told_of(builder: Builder, case):
    told, expected = TOLD[case]
    made(builder, told)
    assert [one.name for one in flash.disks(builder.directory.point(P1))] == expected


def test_a_point_without_a_definition_tells_of_none(builder: Builder):
    builder.point(P1, (disk_entry(), [(0, b"a")]))
    assert flash.disks(builder.directory.point(P1)) == ()


@pytest.mark.parametrize(("case", "expected"), [("two blocks", ["vda"]), ("no flash", ["efivars", "vda"])])
def test_uefi_variables_are_no_disk_of_a_guest_that_is_booted(
    builder: Builder, case, expected, tmp_path, monkeypatch
):
    """As the first of its disks they took the place of the one that it boots from."""
    made(builder, TOLD[case][0])
    attached: list[str] = []

    @contextmanager
    def running(_options, disks, _stop, firmware):
        assert firmware is None
        attached.extend(one.export for one in disks)
        raise Attached
        yield

    monkeypatch.setattr(machine, "running", running)
    monkeypatch.setattr(uefi, "of_point", lambda *_: None)
    asked = RestoreTestRequest(builder.directory, P1, (), TrialOptions(), tmp_path)
    with pytest.raises(Attached):
        restore_test.test(asked, Silent(), Cancellation())
    assert attached == expected


class Attached(Exception):
    """The disks were seen; no VM is started."""
