# SPDX-License-Identifier: GPL-2.0-or-later
"""The simulator as a process: its sockets, and the machines that are started behind them."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backupctl.simulator.agent import Agent
from backupctl.simulator.control import Control
from backupctl.simulator.disks import DiskSpec, check_names
from backupctl.simulator.faults import Faults
from backupctl.simulator.machine import Machine, Power, Settings
from backupctl.simulator.monitor import Monitor

ABORT_TEXT = (
    "blockdev-nbd.c:62: nbd_blockdev_client_closed: Assertion `qemu_in_main_thread() && nbd_server' failed."
)


@dataclass(frozen=True)
class Sockets:
    """Where the simulator listens. monitors: one or more."""

    monitors: tuple[Path, ...]
    agent: Path | None = None
    control: Path | None = None


@dataclass(frozen=True)
class SimulatorOptions:
    """The options of `backupctl simulate`; disks and faults as text, in the simulator's own notation."""

    directory: Path
    disks: tuple[str, ...]
    cdroms: tuple[str, ...]
    monitors: tuple[Path, ...]
    agent: Path | None
    control: Path | None
    version: tuple[int, int, int]
    seed: int
    writes_per_second: float
    faults: tuple[str, ...] = ()
    paused: bool = False
    keep_moments: bool = False


async def serve(options: SimulatorOptions, ready: Callable[[], None]) -> None:
    """Run a simulator to its end. Raises BadFault (a ValueError) for invalid options, OSError."""
    faults = Faults()
    for text in options.faults:
        faults.add(text)
    disks = tuple(DiskSpec.parse(text) for text in options.disks)
    check_names(disks, options.cdroms)
    settings = Settings(
        options.directory,
        disks,
        options.version,
        options.seed,
        options.cdroms,
        options.paused,
        options.keep_moments,
    )
    sockets = Sockets(options.monitors, options.agent, options.control)
    await Process(settings, sockets, faults, options.writes_per_second).run(ready)


class Process:
    """A running simulator. writes_per_second: of the guest, from each start of the machine."""

    def __init__(
        self, settings: Settings, sockets: Sockets, faults: Faults, writes_per_second: float = 0
    ) -> None:
        self._settings = settings
        self._faults = faults
        self._writes_per_second = writes_per_second
        self._monitors = [Monitor(path, lambda: self.machine, self._client_left) for path in sockets.monitors]
        self._others: list[Agent | Control] = []
        if sockets.agent:
            self._others.append(Agent(sockets.agent, lambda: self.machine))
        if sockets.control:
            self._others.append(Control(sockets.control, lambda: self.machine))
        self._ended = asyncio.Event()
        self._failure: BaseException | None = None
        self.machine = self._boot()

    async def run(self, ready: Callable[[], None]) -> None:
        """Serve until the simulator is to end. ready: called when all sockets listen. Raises OSError."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._broken)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._quit, "host-signal")
        # The monitors last: a client that waits for one of them to appear finds the other sockets listening.
        for server in (*self._others, *self._monitors):
            server.listener.open()
        ready()
        await self._ended.wait()
        for server in (*self._monitors, *self._others):
            await server.listener.close()
        if self._failure is not None:
            raise self._failure

    def _broken(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """End with an error on a bug of the simulator: going on would give tests wrong answers."""
        loop.default_exception_handler(context)
        self._failure = context.get("exception") or RuntimeError(context["message"])
        self._ended.set()

    def _boot(self) -> Machine:
        made = Machine(self._settings, self._faults, self._send_event, Power(self._end))
        if self._writes_per_second:
            made.guest.start(self._writes_per_second)
        return made

    def _client_left(self) -> None:
        if not any(monitor.in_use for monitor in self._monitors):
            self.machine.clients_left()

    def _send_event(self, event: dict[str, Any]) -> None:
        for monitor in self._monitors:
            monitor.send_event(event)

    def _end(self, how: str) -> None:
        """End the machine; a restart happens only after the current command."""
        if how in ("kill", "segv"):
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSEGV)
        if how == "abort":
            sys.stderr.write(ABORT_TEXT + "\n")
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGABRT)
        if how == "quit":
            self._quit("host-qmp-quit")
        else:
            asyncio.get_running_loop().call_soon(lambda: self._restart(clean=how == "restart"))

    def _quit(self, reason: str) -> None:
        if not self._ended.is_set():
            self.machine.emit_event("SHUTDOWN", {"guest": False, "reason": reason})
            self.machine.end(clean=True)
            self._ended.set()

    def _restart(self, *, clean: bool) -> None:
        for server in (*self._monitors, *self._others):
            if not isinstance(server, Control):
                server.listener.drop_clients()
        self.machine.end(clean=clean)
        self.machine = self._boot()
