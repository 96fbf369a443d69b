# SPDX-License-Identifier: GPL-2.0-or-later
"""The throw-away VM of a restore test: what QEMU is given, and that nothing of it outlasts a failure."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from backupctl.cancel import Cancellation
from backupctl.errors import Failed, Interrupted, RestoreTestFailed, UsageError
from backupctl.system import confined
from backupctl.system.address import Address
from backupctl.vm.trial import boot, command, firmware, machine
from backupctl.vm.trial.command import Descriptors, Flash
from backupctl.vm.trial.console import Console
from backupctl.vm.trial.machine import TrialDisk, TrialVm
from backupctl.vm.trial.options import TrialOptions
from fixtures.agent import PlayedAgent
from tests.conftest import ROOT


def given(disks: int = 2, flash: Flash | None = None) -> Descriptors:
    attached = [(f"vd{number}", 20 + number) for number in range(disks)]
    return Descriptors(10, 11, 12, attached, {"-kernel": 30}, flash)


def words(options: TrialOptions, flash: Flash | None = None) -> list[str]:
    return command.arguments(options, given(flash=flash))


@pytest.mark.parametrize("bus", ["virtio", "scsi", "sata"])
def test_qemu_is_given_descriptors_no_network_and_no_name_of_a_file(bus):
    found = words(TrialOptions(disk_bus=bus, kernel="/boot/vmlinuz"))
    text = " ".join(found)
    assert found[found.index("-nic") + 1] == "none"
    assert found[found.index("-sandbox") + 1].startswith("on,")
    assert "-nodefaults" in found
    assert found[found.index("-machine") + 1] == "q35"
    assert "/boot" not in text
    assert {word for word in text.split() if word.startswith("/")} == {"/proc/self/fd/30"}
    assert '"server": {"type": "fd", "str": "21"}' in text


@pytest.mark.parametrize("export", ["pflash1", ""])
def test_flash_chips_are_raw_and_only_the_variables_can_be_written(export):
    """Their content comes from a guest: a format that was probed would be its choice."""
    found = words(TrialOptions(), Flash(40, 41, export))
    nodes = {node["node-name"]: node for node in blockdevs(found)}
    assert found[found.index("-machine") + 1] == "q35,pflash0=flash0,pflash1=flash1"
    assert (nodes["flash0"]["driver"], nodes["flash0"]["read-only"]) == ("raw", True)
    assert nodes["flash0"]["file"]["filename"] == "/proc/self/fd/40"
    variables = nodes["flash1"]
    assert "read-only" not in variables
    if export:
        assert (variables["driver"], variables["export"]) == ("nbd", "pflash1")
        assert variables["server"] == {"type": "fd", "str": "41"}
    else:
        assert (variables["driver"], variables["file"]["driver"]) == ("raw", "file")
        assert variables["file"]["filename"] == "/proc/self/fd/41"
    assert {40, 41} <= set(given(flash=Flash(40, 41, export)).all())


def blockdevs(arguments: list[str]) -> list[dict]:
    return [json.loads(after) for word, after in pairwise(arguments) if word == "-blockdev"]


@pytest.mark.parametrize(("size", "name"), [(131072, "OVMF_CODE.fd"), (540672, "OVMF_CODE_4M.fd")])
def test_the_firmware_goes_by_the_size_of_the_variables(size, name, tmp_path, monkeypatch):
    monkeypatch.setattr(firmware, "DIRECTORY", tmp_path)
    with pytest.raises(UsageError, match=f"not installed here: {tmp_path}/{name} does not exist") as caught:
        firmware.code_for(size)
    assert caught.value.next_command == "apt install ovmf"
    (tmp_path / name).touch()
    assert firmware.code_for(size) == tmp_path / name


def test_a_build_that_the_installed_package_lacks_is_not_asked_of_apt(tmp_path, monkeypatch):
    monkeypatch.setattr(firmware, "DIRECTORY", tmp_path)
    (tmp_path / "OVMF_CODE_4M.fd").touch()
    with pytest.raises(UsageError, match="not installed") as caught:
        firmware.code_for(131072)
    assert caught.value.next_command == ""
    assert "--firmware" in caught.value.hint


@pytest.mark.parametrize("size", [0, 131073, 4 << 20, 64 << 20, 1 << 40])
def test_variables_of_an_unknown_size_start_no_firmware(size):
    with pytest.raises(UsageError, match=f"no firmware is known for variables of {size} bytes"):
        firmware.code_for(size)


def test_of_a_long_console_the_beginning_and_the_end_are_kept():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        console = Console(ours)
        theirs.setblocking(False)
        for number in range(40):
            theirs.sendall(b"%07d\n" % number * 4096)
            console.read()
        theirs.sendall(b"Host LOGIN: ")
        console.read()
    assert console.content.startswith(b"0000000\n")
    assert console.content.endswith(b"login: ".upper()[:0] + b"Host LOGIN: ")
    assert b"\n[...]\n" in console.content
    assert len(console.content) < 1 << 20
    assert console.shows("login:")
    assert console.last_line() == "Host LOGIN:"


class Process:
    """Stands for QEMU's process."""

    returncode = None

    def poll(self):
        return self.returncode


def test_a_host_whose_kvm_is_at_fault_emulates_the_cpu():
    assert "kvm" in words(TrialOptions())
    found = words(TrialOptions(accelerator="tcg"))
    assert "kvm" not in found
    assert found[found.index("-accel") + 1] == "tcg"


@contextmanager
def vm_with(agent_path, console_text: bytes = b""):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(console_text)
        yield TrialVm(Process(), None, Address(path=str(agent_path)), Console(ours), None, -1, "tcg")


def test_the_wait_for_a_prompt_ends_in_time_and_names_the_last_line(tmp_path):
    begun = time.monotonic()
    with (
        vm_with(tmp_path / "ga", b"starting\nKernel panic\n") as vm,
        pytest.raises(RestoreTestFailed, match=r"no 'login:' .*Kernel panic"),
    ):
        boot.wait(vm, TrialOptions(until="login", timeout_seconds=0.5), Cancellation())
    assert time.monotonic() - begun < 30


def test_an_agent_that_never_answers_ends_in_time(tmp_path):
    with PlayedAgent(tmp_path / "ga") as agent, vm_with(tmp_path / "ga") as vm:
        agent.behaviour = {"*": "silent"}
        with pytest.raises(RestoreTestFailed, match="the guest agent did not answer within"):
            boot.wait(vm, TrialOptions(timeout_seconds=2), Cancellation())


def test_an_agent_that_answers_is_enough(tmp_path):
    with PlayedAgent(tmp_path / "ga"), vm_with(tmp_path / "ga") as vm:
        boot.wait(vm, TrialOptions(timeout_seconds=60), Cancellation())


def test_an_agent_without_guest_exec_is_said_to_be_one(tmp_path):
    with (
        PlayedAgent(tmp_path / "ga"),
        vm_with(tmp_path / "ga") as vm,
        pytest.raises(RestoreTestFailed, match="the guest agent refused guest-exec"),
    ):
        boot.wait(vm, TrialOptions(until="command", command="true", timeout_seconds=60), Cancellation())


def test_a_stop_ends_the_wait(tmp_path):
    stop = Cancellation()
    stop.request("SIGTERM")
    with vm_with(tmp_path / "ga") as vm, pytest.raises(Interrupted):
        boot.wait(vm, TrialOptions(), stop)


def test_a_qemu_that_does_not_start_is_an_error_with_its_message(tmp_path, monkeypatch):
    program = tmp_path / "qemu"
    program.write_text("#!/bin/sh\necho 'no such machine' >&2\nexit 1\n")
    program.chmod(0o755)
    for each in (tmp_path, *list(tmp_path.parents)[:3]):
        each.chmod(each.stat().st_mode | 0o055) if each.stat().st_uid == os.geteuid() else None
    monkeypatch.setenv("QEMU_SYSTEM", str(program))
    ours, theirs = socket.socketpair()
    with (
        ours,
        pytest.raises(Failed, match="QEMU did not start: no such machine"),
        machine.running(TrialOptions(), [TrialDisk("vda", theirs)], Cancellation()),
    ):
        pass
    monkeypatch.setenv("QEMU_SYSTEM", str(tmp_path / "none"))
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        pytest.raises(Failed, match="cannot start"),
        machine.running(TrialOptions(), [TrialDisk("vda", theirs)], Cancellation()),
    ):
        pass


def test_a_kernel_that_cannot_be_read_is_wrong_use(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with (
            pytest.raises(UsageError, match="cannot read"),
            machine.running(TrialOptions(kernel=path), [], Cancellation()),
        ):
            pass


SHOW = "import sys; print(open('/proc/self/status').read()); print(open('/proc/net/dev').read())"


def test_a_confined_child_has_no_rights_of_root(tmp_path):
    rights = confined.rights_for_kvm()
    done = subprocess.run(
        [os.path.realpath(sys.executable), "-I", "-S", "-c", SHOW],  # .venv may be in a home closed to others
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        cwd="/",
        preexec_fn=confined.prepared(rights),
    )
    if done.returncode:
        pytest.skip(f"the interpreter is not accessible to others: {done.stderr[-200:]}")
    found = dict(line.split(":\t", 1) for line in done.stdout.splitlines() if ":\t" in line)
    assert found["NoNewPrivs"] == "1"
    if os.geteuid() == 0:
        assert found["Uid"].split() == [str(rights.user)] * 4
        assert found["Gid"].split() == [str(rights.group)] * 4
        assert {"0"} & set(found["Groups"].split()) == set()
        assert found["CapEff"] == found["CapPrm"] == "0" * 16


PARENT = """
import os, signal, subprocess, sys
sys.path.insert(0, sys.argv[1])
from backupctl.system import confined
prepare = confined.prepared(confined.rights_for_kvm())
made = subprocess.Popen(["sleep", "60"], cwd="/", stdout=subprocess.DEVNULL, preexec_fn=prepare)
print(made.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_confined_child_ends_with_its_parent():
    words = [sys.executable, "-c", PARENT, str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    status = Path(f"/proc/{int(done.stdout)}/status")
    deadline = time.monotonic() + 60
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
