# SPDX-License-Identifier: GPL-2.0-or-later
"""A simulated VM as a child process, with its sockets and its control socket."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Self

from backupctl.drills.fork_server import CallSpec, ForkedProcess, ForkServer, own_environment
from backupctl.errors import Failed
from backupctl.names import vm_name
from backupctl.options import QmpAccess, VmConfig
from backupctl.system import qemu_tools
from backupctl.system.address import Address

_START_SECONDS = 20.0
_ORDER_SECONDS = 30.0
_END_SECONDS = 5.0


class SimulatedVm:
    """`backupctl simulate` in a directory; a context manager that starts and ends it.

    disks: as `--disk` takes them. options: more arguments. fork_server: starts it; None to start a program of
    its own. It ends with this process.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        disks: Sequence[str],
        options: Sequence[str] = (),
        fork_server: ForkServer | None = None,
    ) -> None:
        self.directory = directory
        self.access = QmpAccess(_address(directory, "qmp"), _address(directory, "agent"))
        self.vm = VmConfig(vm_name(name), self.access)
        self._arguments = ["simulate", "--state", str(directory / "state")]
        for word in ("qmp", "agent", "control"):
            self._arguments += [f"--{word}", str(directory / word)]
        for disk in disks:
            self._arguments += ["--disk", disk]
        self._arguments += options
        self._fork_server = fork_server
        self._held = ExitStack()

    def __enter__(self) -> Self:
        """Start it. Raises Failed."""
        with ExitStack() as held:
            complaints = held.enter_context(tempfile.TemporaryFile())
            self._await_sockets(self._start(complaints, held), complaints)
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def order(self, do: str, **arguments: Any) -> Any:
        """Send an order to the control socket (docs/simulator.md). Raises Failed."""
        try:
            with socket.socket(socket.AF_UNIX) as control:
                control.settimeout(_ORDER_SECONDS)
                control.connect(str(self.directory / "control"))
                control.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")
                with control.makefile("rb") as stream:
                    reply = json.loads(stream.readline())
        except (OSError, ValueError) as err:
            raise Failed(f"the simulator did not answer {do!r}: {err}") from err
        if "error" in reply:
            raise Failed(f"the simulator refused {do!r}: {reply['error']}")
        return reply["return"]

    def _start(self, complaints: IO[bytes], held: ExitStack) -> "subprocess.Popen[bytes] | ForkedProcess":
        if self._fork_server is not None:
            program = CallSpec(self._arguments, dict(os.environ), str(self.directory))
            call = self._fork_server.start(program, complaints, complaints)
            return held.enter_context(call)
        process = qemu_tools.start(
            # -P: not a module of the current directory.
            [sys.executable, "-P", "-m", "backupctl", *self._arguments],
            complaints=complaints,
            environment=own_environment(),
        )
        held.callback(_end, process)
        return process

    def _await_sockets(
        self, process: "subprocess.Popen[bytes] | ForkedProcess", complaints: IO[bytes]
    ) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not (
            self.directory / "qmp"
        ).exists():  # the last socket to appear; it listens as soon as it has its name
            if process.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"the simulator did not start: {qemu_tools.last_message(complaints)}")
            time.sleep(0.01)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _address(directory: Path, socket_name: str) -> Address:
    return Address(path=str(directory / socket_name))
