# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM that boots by UEFI gets the variables of its point, and firmware of this host."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest

from backupctl.cancel import Cancellation
from backupctl.errors import DamageFound, UsageError
from backupctl.operations import restore_test, uefi
from backupctl.operations.doctor import restore_tests
from backupctl.operations.restore_test import RestoreTestRequest
from backupctl.operations.uefi import Uefi
from backupctl.progress import Silent
from backupctl.repository.stored_files import NewFile
from backupctl.vm.trial import firmware, machine
from backupctl.vm.trial.options import TrialOptions
from tests.unit.points import P1, Builder, disk_entry

SMALL, LARGE = 131072, 540672
VARIABLES = b"_FVH" * (SMALL // 4)
BIOS = Path("/usr/share/seabios/bios.bin")


@pytest.fixture
def ovmf(tmp_path, monkeypatch) -> Path:
    """Where the firmware is; nothing is installed yet."""
    directory = tmp_path / "ovmf"
    directory.mkdir()
    monkeypatch.setattr(firmware, "DIRECTORY", directory)
    return directory


def with_chips(builder: Builder, **sizes: int) -> None:
    """Make a point with flash chips of these sizes, and a disk."""
    told = {"block": [{"qdev": f"/machine/system.{chip}", "node": chip} for chip in sizes]}
    disks = [(disk_entry(chip, size=size), [(0, b"a")]) for chip, size in sizes.items()]
    content = json.dumps(told).encode()
    builder.point(
        P1, *disks, (disk_entry(), [(0, b"a")]), definition=[NewFile("qemu.json", "qemu", "", content)]
    )


def with_file(builder: Builder, content: bytes) -> None:
    """Make a point that has the variables of a domain of libvirt."""
    file = NewFile("variables.fd", "variables", "/var/lib/web.fd", content)
    builder.point(P1, (disk_entry(), [(0, b"a")]), definition=[file])


def found(builder: Builder, options: TrialOptions | None = None) -> Uefi | None:
    return uefi.of_point(builder.directory.point(P1), options or TrialOptions())


@pytest.mark.parametrize(("size", "name"), [(SMALL, "OVMF_CODE.fd"), (LARGE, "OVMF_CODE_4M.fd")])
def test_variables_that_are_a_disk_choose_the_firmware(builder: Builder, ovmf, size, name):
    (ovmf / name).touch()
    with_chips(builder, flash1=size)
    uses = found(builder)
    assert uses is not None
    assert uses.disk is not None
    assert (uses.code, uses.disk.name) == (ovmf / name, "flash1")


def test_of_two_chips_that_were_stored_the_one_with_the_code_is_not_taken(builder: Builder, ovmf):
    (ovmf / "OVMF_CODE_4M.fd").touch()
    with_chips(builder, flash0=3653632, flash1=LARGE)
    uses = found(builder)
    assert uses is not None
    assert uses.disk is not None
    assert uses.disk.name == "flash1"


def test_variables_of_a_domain_are_a_file(builder: Builder, ovmf):
    (ovmf / "OVMF_CODE.fd").touch()
    with_file(builder, VARIABLES)
    assert found(builder) == Uefi(ovmf / "OVMF_CODE.fd", None, VARIABLES)


def test_a_file_of_variables_that_was_changed_is_damage(builder: Builder, ovmf):
    (ovmf / "OVMF_CODE.fd").touch()
    with_file(builder, VARIABLES)
    path = builder.directory.point(P1).path / "definition/variables.fd"
    path.chmod(0o600)
    path.write_bytes(b"x" * SMALL)
    with pytest.raises(DamageFound, match="does not match its digest"):
        found(builder)


@pytest.mark.parametrize("options", [TrialOptions(firmware=BIOS), TrialOptions(kernel=Path("/boot/vmlinuz"))])
def test_the_user_decides_how_a_point_boots(builder: Builder, ovmf, options):
    with_chips(builder, flash1=12345 * 512)
    assert found(builder, options) is None


def test_a_point_without_variables_boots_by_the_bios(builder: Builder):
    builder.point(P1, (disk_entry(), [(0, b"a")]))
    assert found(builder) is None


def attempt(builder: Builder, scratch: Path) -> None:
    asked = RestoreTestRequest(builder.directory, P1, (), TrialOptions(), scratch)
    restore_test.test(asked, Silent(), Cancellation())


@pytest.mark.parametrize(("size", "message"), [(SMALL, "not installed"), (512, "no firmware is known")])
def test_without_firmware_nothing_is_started(builder: Builder, ovmf, tmp_path, monkeypatch, size, message):
    with_chips(builder, flash1=size)
    started = []
    monkeypatch.setattr(restore_test.trial_disks, "served", started.append)
    with pytest.raises(UsageError, match=message):
        attempt(builder, tmp_path)
    assert started == []
    assert not (builder.directory.path / "restore-test.json").exists()


class Started(Exception):
    """The VM's parts were seen; none is started."""


@pytest.mark.parametrize("kept", ["as a disk", "in a file"])
def test_the_vm_gets_the_variables_beside_its_disks(builder: Builder, ovmf, tmp_path, monkeypatch, kept):
    (ovmf / "OVMF_CODE.fd").write_bytes(b"code")
    if kept == "as a disk":
        with_chips(builder, flash1=SMALL)
    else:
        with_file(builder, VARIABLES)
    seen = []

    @contextmanager
    def running(_options, disks, _stop, chips):
        seen.append(([one.export for one in disks], chips))
        raise Started
        yield

    monkeypatch.setattr(machine, "running", running)
    with pytest.raises(Started):
        attempt(builder, tmp_path)
    ((disks, chips),) = seen
    assert (disks, chips.code) == (["vda"], ovmf / "OVMF_CODE.fd")
    assert chips.variables == VARIABLES if kept == "in a file" else chips.variables.export == "flash1"


def said_by_doctor(builder: Builder, options: TrialOptions | None = None) -> list[tuple[str, str, str]]:
    repository = builder.directory.path.parent
    asked = restore_tests.of_newest(repository, builder.directory.name, options or TrialOptions())
    return [(one.verdict, one.said, one.advice) for one in asked]


def test_doctor_tells_of_a_firmware_that_a_restore_test_would_miss(builder: Builder, ovmf, monkeypatch):
    monkeypatch.setenv("QEMU_SYSTEM", "/bin/true")
    assert said_by_doctor(builder) == []  # there is no point yet
    with_chips(builder, flash1=LARGE)
    ((verdict, said, advice),) = said_by_doctor(builder)
    assert (verdict, advice) == ("warning", "apt install ovmf")
    assert said.startswith("would fail: the VM boots by UEFI")
    told = said_by_doctor(builder, TrialOptions(firmware=BIOS))
    assert told == [("ok", "found: /bin/true", "")]
    code = ovmf / "OVMF_CODE_4M.fd"
    code.touch()
    said = f"found: /bin/true, and {code} for the UEFI variables of {P1}"
    assert said_by_doctor(builder) == [("ok", said, "")]


def test_doctor_tells_of_a_qemu_that_a_restore_test_would_miss(builder: Builder, monkeypatch):
    monkeypatch.setenv("QEMU_SYSTEM", "/no/such/qemu")
    ((verdict, said, advice),) = said_by_doctor(builder)
    assert (verdict, said.startswith("not found: /no/such/qemu")) == ("warning", True)
    assert "qemu-system-x86" in advice
