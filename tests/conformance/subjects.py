# SPDX-License-Identifier: GPL-2.0-or-later
"""What the scripts are played on: a real QEMU of each version, and the simulator posing as each.

All have the same two disks of 4 MiB, the writable qcow2 `vda` (node `drive-vda`) and the raw `vdb`
(node `drive-vdb`), and whatever else a script asks for by `extras`: "cd" (an empty CD drive `cd0`),
"readonly" (a read-only disk `vdc`), "port" (a free port `rp0` to plug a disk
into), "scsi" (a free SCSI bus `scsi0.0`, for disks named sd…), "running" (CPUs that run firmware; the CPUs of
a real QEMU are stopped otherwise, to spare ours).
"""

import importlib.util
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import pytest

from backupctl.drills.fork_server import CallSpec
from fixtures import builds, fork_server
from fixtures.fork_server import ENVIRONMENT
from fixtures.simulated import VERSIONS
from tests.conformance.qmp import Monitor

if TYPE_CHECKING:
    from backupctl.drills.fork_server import ForkedProcess

SIZE = 4 << 20
REAL = builds.VERSIONS
SIMULATED = {f"simulator-{short}": whole for short, whole in VERSIONS.items()}
PAIRS = [*pairwise(REAL), *((f"simulator-{version}", version) for version in REAL)]
ENDS = [(REAL[0], REAL[-1]), *((f"simulator-{version}", version) for version in (REAL[0], REAL[-1]))]
"""The pairs of the oldest and the newest: what holds on both holds between them."""
_START_SECONDS = 60.0


class Subject(Protocol):
    """A running VM. qmp: its monitor's socket. directory: where scripts may put files."""

    directory: Path
    qmp: Path

    def restart(self, *, kill: bool) -> None:
        """Kill it, or wait until it has ended by itself; then start it again with the same disks."""

    def write(self, disk: str, pattern: int, offset: int, length: int) -> None:
        """Write a pattern byte as the guest would."""

    def zero(self, disk: str, offset: int, length: int) -> None:
        """Write zeroes as the guest would."""

    def discard(self, disk: str, offset: int, length: int) -> None:
        """Discard as the guest would."""


class Missing(Exception):
    """A subject can't be had here; the text says why."""


@contextmanager
def started(name: str, directory: Path, extras: frozenset[str] = frozenset()) -> Iterator[Subject]:
    """Start a subject and end it when the block is left. Raises Missing."""
    command = (_simulator_command if name in SIMULATED else _qemu_command)(name, directory, extras)
    with closing(Process(command, directory)) as process:
        subject = Simulator(process) if name in SIMULATED else RealQemu(process)
        with subject:
            yield subject


class Process:
    """What runs behind a subject's sockets in `directory`."""

    def __init__(self, command: list[str], directory: Path) -> None:
        self.directory = directory
        self._command = command
        self._running = self._start()

    def _start(self) -> "subprocess.Popen[bytes] | ForkedProcess":
        for name in ("qmp", "hmp", "control", "agent", "nbd"):
            (self.directory / name).unlink(missing_ok=True)
        with (self.directory / "log").open("ab") as log:
            if self._command[0] == "simulate":
                program = CallSpec(self._command, ENVIRONMENT, str(self.directory))
                process = fork_server.shared().start(program, log, log)
            else:
                process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            _wait_for(self.directory / "qmp", process, self.directory / "log")
        except BaseException:
            process.kill()
            process.wait(60)
            raise
        return process

    def restart(self, *, kill: bool) -> None:
        """End it, or wait for its end, and start it again."""
        if kill:
            self._running.kill()
        self._running.wait(_START_SECONDS)
        self._running = self._start()

    def close(self) -> None:
        """End it."""
        self._running.kill()
        self._running.wait(60)


class RealQemu:
    """A qemu-system-x86_64 with stopped CPUs; what the guest does goes through a second monitor."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.directory = process.directory
        self.qmp = self.directory / "qmp"
        self._guest = self._take_pen()

    def _take_pen(self) -> Monitor:
        guest = Monitor(self.directory / "hmp")
        guest.receive()
        guest.execute("qmp_capabilities")
        return guest

    def restart(self, *, kill: bool) -> None:
        self._guest.close()
        self._process.restart(kill=kill)
        self._guest = self._take_pen()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._guest.close()

    def write(self, disk: str, pattern: int, offset: int, length: int) -> None:
        self._io(disk, f"write -P {pattern} {offset} {length}")

    def zero(self, disk: str, offset: int, length: int) -> None:
        self._io(disk, f"write -z {offset} {length}")

    def discard(self, disk: str, offset: int, length: int) -> None:
        self._io(disk, f"discard {offset} {length}")

    def _io(self, disk: str, command: str) -> None:
        log = self.directory / "log"
        before = log.stat().st_size
        backend = disk if disk.startswith("sd") else f"/machine/peripheral/{disk}/virtio-backend"
        line = f'qemu-io -d {backend} "{command}"'
        reply = self._guest.execute("human-monitor-command", {"command-line": line})
        # qemu-io tells its outcome on QEMU's standard output, not in the reply.
        said = log.read_text()[before:] + str(reply)
        assert not re.search("failed|error", said, re.IGNORECASE), said


class Simulator:
    """`backupctl simulate`; what the guest does goes through its control socket, one JSON line each.

    Its second monitor has a client, too: QEMU asks whether any client is left.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self.directory = process.directory
        self.qmp = self.directory / "qmp"
        self._connect()

    def _connect(self) -> None:
        self._control = Monitor(self.directory / "control")
        self._second = Monitor(self.directory / "hmp")

    def restart(self, *, kill: bool) -> None:
        self.__exit__()
        self._process.restart(kill=kill)
        self._connect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._control.close()
        self._second.close()

    def write(self, disk: str, pattern: int, offset: int, length: int) -> None:
        self._order("write", disk=disk, offset=offset, length=length, pattern=pattern)

    def zero(self, disk: str, offset: int, length: int) -> None:
        self._order("zero", disk=disk, offset=offset, length=length)

    def discard(self, disk: str, offset: int, length: int) -> None:
        self._order("discard", disk=disk, offset=offset, length=length)

    def _order(self, what: str, **arguments: Any) -> None:
        self._control.send(json.dumps({"do": what} | arguments).encode() + b"\n")
        reply = self._control.receive()
        assert "error" not in reply, reply


def available(name: str) -> None:
    """Return if a subject can be had. Raises Missing."""
    if name in SIMULATED:
        if importlib.util.find_spec("backupctl.cli.simulate") is None:
            raise Missing("backupctl has no command `simulate` yet")
        return
    try:
        builds.build(name)
    except builds.CannotBeHad as error:
        raise Missing(f"QEMU {name}: {error}") from error


def missing(name: str) -> str:
    """Say why a subject can't be had here; "" if it can. Raises Missing where that one must be."""
    try:
        available(name)
    except Missing as error:
        if name in builds.required():
            raise
        return str(error)
    return ""


def required(name: str) -> None:
    """Skip the test that calls this if a subject can't be had here, or fail it where that one must be."""
    if why := missing(name):
        pytest.skip(why)


def tool(name: str) -> str:
    """Return the path of the installed QEMU's tool of that name."""
    return os.environ.get(name.upper().replace("-", "_"), name)


def image(path: Path, form: str = "qcow2", size: int = SIZE) -> Path:
    """Make an empty image."""
    command = [tool("qemu-img"), "create", "-q", "-f", form, str(path), str(size)]
    subprocess.run(command, check=True, timeout=30)
    return path


def _qemu_command(version: str, directory: Path, extras: frozenset[str]) -> list[str]:
    command = [
        *builds.build(version).system,
        "-machine",
        "q35",
        "-nodefaults",
        "-display",
        "none",
        "-m",
        "32",
    ]
    if "running" not in extras:
        command += ["-S"]
    for monitor in ("hmp", "qmp"):
        command += ["-qmp", f"unix:{directory / monitor},server=on,wait=off"]
    command += _disk("vda", "qcow2", directory) + _disk("vdb", "raw", directory)
    if "readonly" in extras:
        command += _disk("vdc", "qcow2", directory, readonly=True)
    if "cd" in extras:
        command += ["-device", "ide-cd,id=cd0,bus=ide.0"]
    if "scsi" in extras:
        command += ["-device", "virtio-scsi-pci,id=scsi0"]
    if "port" in extras:
        command += ["-device", "pcie-root-port,id=rp0,chassis=1,slot=1"]
    return command


def _disk(name: str, form: str, directory: Path, *, readonly: bool = False) -> list[str]:
    path = image(directory / f"{name}.{form}", form)
    node = {"driver": form, "node-name": f"drive-{name}", "discard": "unmap", "read-only": readonly}
    node["file"] = {"driver": "file", "filename": str(path), "discard": "unmap"}
    return ["-blockdev", json.dumps(node), "-device", f"virtio-blk-pci,id={name},drive=drive-{name}"]


def _simulator_command(name: str, directory: Path, extras: frozenset[str]) -> list[str]:
    command = ["simulate", "--version", SIMULATED[name]]
    command += ["--state", str(directory), "--disk", "vda=4M", "--disk", "vdb=4M,format=raw"]
    if "running" not in extras:
        command += ["--paused"]
    if "readonly" in extras:
        command += ["--disk", "vdc=4M,readonly=on"]
    if "cd" in extras:
        command += ["--cdrom", "cd0"]
    command += ["--qmp", str(directory / "hmp")]
    for socket in ("qmp", "agent", "control"):
        command += [f"--{socket}", str(directory / socket)]
    return command


def _wait_for(path: Path, process: "subprocess.Popen[bytes] | ForkedProcess", log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while not path.exists():
        if process.poll() is not None or time.monotonic() > end:
            raise AssertionError(f"{path} is not there: {log.read_text()[-2000:]}")
        time.sleep(0.005)
