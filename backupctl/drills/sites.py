# SPDX-License-Identifier: GPL-2.0-or-later
"""The two kinds of site: the bundled simulator, and a throw-away real QEMU without a guest."""

import json
import os
import random
import shutil
import socket
import subprocess  # noqa: TC003 - dataclasses look at it
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backupctl.drills.fork_server import ForkServer
from backupctl.drills.simulated_vm import SimulatedVm
from backupctl.drills.site import Site
from backupctl.errors import Failed
from backupctl.system import qemu_tools
from backupctl.system.address import Address
from backupctl.vm.qmp.monitor import Monitor

DISKS = {"vda": 16 << 20, "vdb": 8 << 20}
_VERSION = "10.0.2"
_START_SECONDS = 30.0
_COMMAND_SECONDS = 30.0


@contextmanager
def simulator(directory: Path, fork_server: ForkServer) -> Iterator[Site]:
    """Yield a site with a simulated VM, guest and agent."""
    disks = [f"{name}={size},node=node-{name}" for name, size in DISKS.items()]
    options = ("--seed", "7", "--keep-moments", "--version", _VERSION, "--qmp", str(directory / "look"))
    with ExitStack() as held:
        vm = held.enter_context(SimulatedVm("drilled", directory, disks, options, fork_server))
        site = SimulatorSite(
            directory,
            fork_server,
            str(vm.access.qmp),
            str(vm.access.agent),
            ("--freeze", "require"),
            machine=vm,
        )
        held.callback(site.close)
        vm.order("workload", **{"per-second": 50})  # the guest keeps writing
        yield site


@contextmanager
def real(directory: Path, fork_server: ForkServer) -> Iterator[Site]:
    """Yield a site with a real QEMU, to whose disks only the drill writes. Raises Failed without QEMU."""
    program = os.environ.get("QEMU", "qemu-system-x86_64")
    if shutil.which(program.split()[0]) is None:
        raise Failed(
            f"{program} not found",
            hint="or set QEMU to the path of another one",
            next_command="apt install qemu-system-x86",
        )
    for name, size in DISKS.items():
        made = qemu_tools.img(["create", "-q", "-f", "qcow2", str(directory / f"{name}.qcow2"), str(size)])
        if made.returncode:
            raise Failed(f"cannot create a disk for the drill's VM: {made.stderr.strip():.300}")
    site = QemuSite(
        directory, fork_server, f"unix:{directory / 'qmp'}", None, ("--freeze", "never"), program=program
    )
    try:
        site.restart()
        yield site
    finally:
        site.close()


class _Observer:
    """A second monitor connection, independent of backupctl, made when it is first needed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._monitor: Monitor | None = None

    def execute(self, command: str, **arguments: Any) -> Any:
        if self._monitor is None or not self._monitor.alive:
            self.close()
            self._monitor = Monitor.connect(Address(path=str(self._path)), _COMMAND_SECONDS)
        return self._monitor.execute(command, arguments or None)

    def close(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None


@dataclass
class SimulatorSite(Site):
    """A site on the simulator. machine: its process and its control socket."""

    machine: SimulatedVm = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._observer = _Observer(self.directory / "look")

    def write(self, changes: int) -> None:
        """Let the seeded guest write."""
        self.machine.order("step", count=changes)

    def moment(self) -> dict[str, Path]:
        """Return the simulator's own copy, made in the transaction."""
        return {disk: Path(path) for disk, path in self.machine.order("moment")["disks"].items()}

    def query(self, command: str, **arguments: Any) -> Any:
        """Run a command on the site's own monitor connection."""
        return self._observer.execute(command, **arguments)

    def restart(self) -> None:
        """Wait until it runs again: the simulator restarts by itself."""
        deadline = time.monotonic() + _START_SECONDS
        while not _listens(self.directory / "look"):
            if time.monotonic() > deadline:
                raise Failed("the simulator did not restart")
            time.sleep(0.02)

    def end(self, how: str) -> None:
        """End QEMU; the simulator then starts the next one."""
        self._observer.close()
        with suppress(Failed):  # it may end before it answers
            self.machine.order("end", how={"kill": "crash", "quit": "restart"}[how])

    def guest_failure(self) -> str:
        """Return whether writes of the guest failed, or it is still frozen; "" for neither."""
        status = self.machine.order("status")
        if status["failed-writes"]:
            return f"{status['failed-writes']} writes failed"
        return "it is still frozen" if status["frozen"] else ""

    def frozen(self) -> bool:
        """Ask the guest."""
        return bool(self.machine.order("status")["frozen"])

    def order(self, do: str, **arguments: Any) -> Any:
        """Send an order to the control socket (docs/simulator.md)."""
        return self.machine.order(do, **arguments)

    def close(self) -> None:
        """Close the monitor connection."""
        self._observer.close()


@dataclass
class QemuSite(Site):
    """A site on a real QEMU without a guest: only the drill writes, so the content is always known."""

    program: str = field(kw_only=True)
    process: "subprocess.Popen[bytes] | None" = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._observer = _Observer(self.directory / "look")
        self._random = random.Random(7)  # noqa: S311 - reproducible, not secret
        self._model = {name: bytearray(size) for name, size in DISKS.items()}
        self._held = ExitStack()

    def write(self, changes: int) -> None:
        """Write data and zeroes at random, and flush: unflushed writes would be lost in a crash of QEMU."""
        for _ in range(changes):
            name = self._random.choice(sorted(self._model))
            model = self._model[name]
            length = self._random.choice((512, 4096, 65536, 100_352))
            at = self._random.randrange(0, len(model) - length, 512)
            value = self._random.choice((0, *range(1, 256)))
            self._io(
                name, f"write -q -z {at} {length}" if not value else f"write -q -P {value} {at} {length}"
            )
            model[at : at + length] = bytes([value]) * length
        for name in self._model:
            self._io(name, "flush")

    def moment(self) -> dict[str, Path]:
        """Write the model to files."""
        found = {}
        for name, content in self._model.items():
            found[name] = self.directory / f"{name}.model"
            found[name].write_bytes(content)
        return found

    def query(self, command: str, **arguments: Any) -> Any:
        """Run a command on the site's own monitor connection."""
        return self._observer.execute(command, **arguments)

    def resize(self, disk: str, size: int) -> None:
        """Resize a disk; new space reads as zeroes."""
        self.query("block_resize", **{"node-name": f"node-{disk}", "size": size})
        kept = self._model[disk][:size]
        self._model[disk] = kept + bytes(size - len(kept))

    def restart(self) -> None:
        """Start QEMU."""
        self._held.close()
        complaints = self._held.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - entered
        self.process = qemu_tools.start([*self.program.split(), *self._arguments()], complaints=complaints)
        self._held.callback(self._kill, self.process)
        deadline = time.monotonic() + _START_SECONDS
        while not _listens(self.directory / "look"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"QEMU did not start: {qemu_tools.last_message(complaints)}")
            time.sleep(0.02)

    def end(self, how: str) -> None:
        """End QEMU."""
        assert self.process is not None
        if how == "quit":
            self.query("quit")
        else:
            self.process.kill()
        self._observer.close()
        self.process.wait(_COMMAND_SECONDS)
        for name in ("qmp", "look"):
            (self.directory / name).unlink(missing_ok=True)

    def close(self) -> None:
        """End QEMU if it runs."""
        self._observer.close()
        self._held.close()

    def _arguments(self) -> list[str]:
        found = ["-machine", "q35", "-nodefaults", "-display", "none", "-S"]
        for name in ("qmp", "look"):
            found += ["-qmp", f"unix:{self.directory / name},server=on,wait=off"]
        found += ["-device", "pcie-root-port,id=rp1,chassis=1"]  # for the disk that a drill plugs in
        for name in DISKS:
            file = {"driver": "file", "filename": str(self.directory / f"{name}.qcow2")}
            node = {"driver": "qcow2", "node-name": f"node-{name}", "file": file}
            found += ["-blockdev", json.dumps(node)]
            found += ["-device", f"virtio-blk-pci,id={name},drive=node-{name}"]
        return found

    def _io(self, disk: str, command: str) -> None:
        line = f'qemu-io -d /machine/peripheral/{disk}/virtio-backend "{command}"'
        reply = self.query("human-monitor-command", **{"command-line": line})
        if reply:
            raise Failed(f"the drill's own write failed: {reply.strip():.200}")

    def add_disk(self, name: str, size: int) -> None:
        """Plug a disk in."""
        self._model[name] = bytearray(size)
        super().add_disk(name, size)

    @staticmethod
    def _kill(process: "subprocess.Popen[bytes]") -> None:
        process.kill()
        process.wait()


def _listens(path: Path) -> bool:
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
    except OSError:
        return False
    return True
