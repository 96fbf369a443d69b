# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl restore-test` with a real QEMU and a real guest."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backupctl.cancel import Cancellation
from backupctl.errors import AgentError
from backupctl.operations import restore_test, uefi
from backupctl.operations.restore_test import RestoreTestReport, RestoreTestRequest
from backupctl.operations.uefi import Uefi
from backupctl.progress import Silent
from backupctl.repository import tested
from backupctl.repository.repository import Repository
from backupctl.system.address import Address
from backupctl.vm.guest.agent import Agent
from backupctl.vm.trial import boot, firmware
from backupctl.vm.trial.options import TrialOptions
from fixtures import bootable, builds, efi
from fixtures.debian import CannotBeHad
from fixtures.machine import Disk, Machine
from tests.unit.filesystems.sources import make_ext
from tests.unit.points import P1, P2, Builder, disk_entry

MIB = 1 << 20
BOOT_SECONDS = 150
pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def vm(tmp_path) -> Builder:
    """Two points: one that boots, and one whose superblock was overwritten."""
    builder = Builder(Repository.open_or_create(tmp_path / "repository"))
    image = make_ext(tmp_path / "image", "-t", "ext4", size="16M")
    builder.point(P1, (disk_entry(size=16 * MIB), [(0, image)]))
    builder.point(P2, (disk_entry(parent=P1, size=16 * MIB), [(0, bytes(65536))]))
    return builder


@pytest.fixture
def options(tmp_path) -> list[str]:
    (tmp_path / "kernel").mkdir()
    try:
        return bootable.kernel_options(tmp_path / "kernel")
    except CannotBeHad as err:
        pytest.skip(str(err))


def command(vm: Builder, *words: object) -> list[str]:
    repository = ("--repository", vm.repository.path, "--scratch", vm.repository.path.parent)
    words = ("restore-test", "vm1", "--timeout", BOOT_SECONDS, *words, *repository, "--json")
    return [sys.executable, "-m", "backupctl", *map(str, words)]


def call(vm: Builder, *words: object) -> tuple[int, dict]:
    done = subprocess.run(command(vm, *words), capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_a_point_that_boots_passes_and_is_not_changed(vm, options, tmp_path):
    before = {path: path.read_bytes() for path in vm.repository.path.rglob("*.qcow2")}
    evidence = ("--screenshot", tmp_path / "screen.png", "--console", tmp_path / "console")
    code, found = call(vm, P1, "--command", "test -e /data/booted", *options, *evidence)
    assert (code, found["passed"], found["error"]) == (0, True, None)
    assert (tmp_path / "screen.png").read_bytes().startswith((b"\x89PNG", b"P6"))
    assert b"guest login:" in (tmp_path / "console").read_bytes()
    assert {path: path.read_bytes() for path in vm.repository.path.rglob("*.qcow2")} == before
    record = tested.read(vm.directory.path)
    assert record is not None
    assert (record.point, record.passed, record.last_passed) == (P1, True, record.time)


def test_a_point_whose_disk_is_broken_fails_and_says_what_was_missing(vm, options):
    code, found = call(vm, P2, "--command", "test -e /data/booted", *options, "--timeout", 60)
    assert (code, found["passed"]) == (1, False)
    assert found["error"]["message"].startswith(f"vm1 {P2} did not boot: the command did not succeed")
    assert found["error"]["message"].endswith("(exit status 1): test -e /data/booted")
    console = Path(found["console"])
    assert b"mounting /dev/vda on /data failed" in console.read_bytes()
    console.unlink()
    record = tested.read(vm.directory.path)
    assert record is not None
    assert (record.point, record.passed, record.last_passed) == (P2, False, None)


def test_a_guest_that_powers_itself_off_has_not_booted(vm, options):
    options[options.index("--append") + 1] += " backupctl.off"
    code, found = call(vm, P1, "--until", "agent", *options)
    assert code == 1
    assert found["error"]["message"] == (f"vm1 {P1} did not boot: the VM ended: the guest powered itself off")
    Path(found["console"]).unlink()


def test_qemu_has_few_rights_and_ends_with_a_killed_backupctl(vm, options, tmp_path):
    options[options.index("--append") + 1] += " nothing=to-wait-for"
    with subprocess.Popen(
        command(vm, P1, "--until", "login", *options, "--machine", "pc"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as child:
        try:
            qemu = awaited(lambda: find_qemu(child.pid))
            awaited(lambda: status(qemu)["Seccomp"] == "2")
            found = status(qemu)
            assert found["NoNewPrivs"] == "1"
            if os.geteuid() == 0:
                assert "0" not in found["Uid"].split()
                assert found["CapEff"] == "0" * 16
            opened = [os.readlink(path) for path in Path(f"/proc/{qemu}/fd").iterdir()]
            files = [name for name in opened if name.startswith("/") and not name.startswith("/dev/")]
            assert [name for name in files if "(deleted)" not in name] == []
            assert not any(str(vm.repository.path) in name for name in files)
            everything = [qemu, *children(child.pid)]
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait(60)
    awaited(lambda: not any(alive(one) for one in everything))
    assert sorted(os.listdir(tmp_path)) == ["image", "kernel", "repository"]


@pytest.fixture
def of_uefi(tmp_path, monkeypatch) -> Repository:
    """A point of a guest that runs, and that only its UEFI variables start."""
    (tmp_path / "boot").mkdir()
    try:
        ovmf, disk, build = efi.firmware(), efi.make_disk(tmp_path / "boot"), builds.build("installed")
    except CannotBeHad as err:
        pytest.skip(str(err))
    monkeypatch.setattr(firmware, "DIRECTORY", ovmf)
    image, variables, repository = (tmp_path / name for name in ("vda.qcow2", "variables", "repository"))
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", disk, image], check=True, timeout=60)
    variables.write_bytes(efi.variables((ovmf / "OVMF_VARS_4M.fd").read_bytes()))
    machine = Machine(build, [Disk("vda", image)])
    machine.extra += efi.arguments(ovmf / "OVMF_CODE_4M.fd", variables, machine.agent_path)
    with machine:
        awaited(lambda: answers(machine.agent_path), BOOT_SECONDS)
        words = ["full", "web", "--qmp", f"unix:{machine.qmp_path}", "--agent", f"unix:{machine.agent_path}"]
        words += ["--repository", str(repository), "--scratch", str(tmp_path)]
        command = [sys.executable, "-m", "backupctl", *words]
        subprocess.run(command, check=True, capture_output=True, timeout=100)
    return Repository.open(repository)


def booted(repository: Repository, scratch: Path, until: str = "agent") -> RestoreTestReport:
    options = TrialOptions(until, "test -d /sys/firmware/efi", BOOT_SECONDS, memory_mib=256)
    asked = RestoreTestRequest(repository.vm("web"), "latest", (), options, scratch)
    return restore_test.test(asked, Silent(), Cancellation())


def test_a_point_boots_by_its_uefi_variables_and_by_no_others(of_uefi, tmp_path, monkeypatch):
    (point,) = of_uefi.vm("web").scan_points().points
    assert [disk.name for disk in point.disks] == ["pflash1", "vda"]
    before = {path: path.read_bytes() for path in of_uefi.path.rglob("*.qcow2")}
    report = booted(of_uefi, tmp_path, "command")
    assert report.passed, (report.error, report.console[-2000:])
    assert b'starting Boot0000 "Linux" from HD(1,GPT,' in report.console
    assert {path: path.read_bytes() for path in of_uefi.path.rglob("*.qcow2")} == before

    ovmf = firmware.DIRECTORY
    fresh = Uefi(ovmf / "OVMF_CODE_4M.fd", None, (ovmf / "OVMF_VARS_4M.fd").read_bytes())
    monkeypatch.setattr(uefi, "of_point", lambda *_: fresh)
    monkeypatch.setattr(boot, "LOGIN", "EFI Internal Shell")  # what is left where no entry can be started
    report = booted(of_uefi, tmp_path, "login")
    assert report.passed, (report.error, report.console[-2000:])
    assert b"Linux" not in report.console


def answers(agent: Path) -> bool:
    try:
        with Agent.connect(Address(path=str(agent)), 2) as asked:
            asked.ping()
    except AgentError:
        return False
    return True


def awaited(look, seconds: float = 60):
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def children(pid: int) -> list[int]:
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def find_qemu(pid: int) -> int:
    for one in children(pid):
        words = Path(f"/proc/{one}/cmdline").read_bytes().split(b"\0")
        if b"backupctl-restore-test" in words and b"-sandbox" in words and b"backupctl" not in words[0]:
            return one
    return 0


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def alive(pid: int) -> bool:
    try:
        return status(pid)["State"][0] != "Z"
    except (OSError, KeyError):
        return False
