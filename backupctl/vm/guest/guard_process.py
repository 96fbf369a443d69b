# SPDX-License-Identifier: GPL-2.0-or-later
"""The guard: a separate process that looks after the guest when the run dies, by whatever cause.

It holds three things for the run:

- the conversation with the guest agent. It freezes and thaws when the run says so, and thaws by itself
  when the freeze budget ends or the run is gone;
- a duplicate of every NBD client socket. When the run is gone it has QEMU drop the exports, and lets go
  of the sockets only then: on Debian's QEMU 7.2 a client that goes away first kills a VM whose disk has
  an iothread;
- an eye on the scratch files, see `guard_watch`.

The run talks to it over a socket pair, one JSON object a message, one answer to each; the end of that
socket is the end of the run. It imports only what loads quickly (`guard.PROGRAM`), and outlives the run by
minutes at the most, unless QEMU still has an export that nobody may leave.
"""

import json
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

from backupctl.errors import BackupctlError
from backupctl.system.address import Address
from backupctl.vm.guest import guard_monitor, guard_survival, handshake
from backupctl.vm.guest.agent import Agent
from backupctl.vm.guest.freeze_control import RETRY_SECONDS, FreezeControl
from backupctl.vm.guest.guard_watch import LOOK_SECONDS, Watch, Watched

MAX_MESSAGE_BYTES = 65536
IGNORED_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
)
"""What a terminal, a person or a service manager may send to all processes of a run."""
_MOST_LINES, _MOST_LINE = 32, 250
"""Of a log, in an answer: well below MAX_MESSAGE_BYTES, also where each character needs six bytes there."""


TakeDown = Callable[[guard_monitor.Leftovers, Callable[[], object]], None]
"""Takes what a dead run left out of the VM, and returns when it is gone; drains its clients meanwhile. Raises
ConnectionRefusedError or FileNotFoundError where there is no VM, or anything else to be called again."""


class HeldSockets:
    """The NBD client sockets of the run, and the exports they are connected to."""

    def __init__(self) -> None:
        self._held: list[tuple[socket.socket, str]] = []
        self._ready: set[str] = set()
        self._spoken_to: set[socket.socket] = set()  # something was read from it that no client had read

    @property
    def exports(self) -> tuple[str, ...]:
        """The exports that must go before the sockets do."""
        return tuple(sorted({export for _, export in self._held}))

    def hold(self, descriptor: int, export: str) -> None:
        """Keep a socket open."""
        self._held.append((socket.socket(fileno=descriptor), export))

    def ready(self, export: str) -> None:
        """Note that all clients of an export have ended their handshake."""
        self._ready.add(export)

    def hang_up(self) -> None:
        """Disconnect the clients that are in their handshake, as far as that can be known."""
        unknown = [held for held, export in self._held if export not in self._ready]
        handshake.leave([held for held in unknown if held in self._spoken_to], surely=True)
        handshake.leave([held for held in unknown if held not in self._spoken_to], surely=False)

    def release(self) -> None:
        """Close all; the exports are gone."""
        while self._held:
            self._held.pop()[0].close()

    def drain(self) -> bool:
        """Throw away what QEMU says; whether it has hung up on all. It keeps an export that has to speak."""
        hung_up = 0
        for held, _ in self._held:
            try:
                while held.recv(1 << 20, socket.MSG_DONTWAIT):
                    self._spoken_to.add(held)
                hung_up += 1
            except BlockingIOError:
                pass
            except OSError:
                hung_up += 1
        return hung_up == len(self._held)


class GuardServer:
    """Serves the run's requests until it says goodbye or is gone.

    said: what the conversation with the agent has added since the last answer, for the run's log.
    """

    def __init__(
        self,
        run: socket.socket,
        take_down: TakeDown,
        freeze: FreezeControl,
        watch: Watch,
        said: deque[str],
    ) -> None:
        self._run = run
        self._take_down = take_down
        self._freeze = freeze
        self._held = HeldSockets()
        self._watch = watch
        self._said = said

    def serve(self) -> None:
        """Answer requests; in between, thaw when that is due, and look at the scratch files."""
        waiting = select.poll()
        waiting.register(self._run, select.POLLIN)
        while True:
            self._freeze.thaw_when_due()
            self._watch.look()
            seconds = self._pause_seconds()
            if waiting.poll(None if seconds is None else seconds * 1000) and not self._serve_one():
                return

    def _pause_seconds(self) -> float | None:
        due = self._freeze.deadline
        until_due = None if due is None else due - time.monotonic()
        if until_due is not None and until_due <= 0:
            until_due = RETRY_SECONDS  # a thread works on it
        if not self._watch.active:
            return until_due
        return LOOK_SECONDS if until_due is None else min(until_due, LOOK_SECONDS)

    def take_over(self) -> None:
        """Do what the run would have done: thaw; take exports and jobs down. Neither waits for the other."""
        self._freeze.thaw_for_good()
        while not self._taken_down():
            time.sleep(RETRY_SECONDS)
        self._held.release()
        self._watch.forget()
        self._freeze.join()

    def _taken_down(self) -> bool:
        """Try to take exports and jobs down. While QEMU lives no socket is let go of before its export."""
        left = guard_monitor.Leftovers(
            self._held.exports, self._watch.jobs, self._watch.groups, self._held.hang_up
        )
        hung_up = self._held.drain()
        if hung_up and not left.jobs:
            return True
        try:
            self._take_down(left, self._held.drain)
        except (ConnectionRefusedError, FileNotFoundError):
            return hung_up  # no QEMU, no job
        except (OSError, ValueError, EOFError, KeyError, TypeError, RecursionError, BackupctlError):
            return False
        return True

    def _serve_one(self) -> bool:
        try:
            content, descriptors, _, _ = socket.recv_fds(self._run, MAX_MESSAGE_BYTES, 1)
        except OSError:
            return False
        if not content:
            return False
        request = json.loads(content)
        try:
            answer: dict[str, Any] = {"value": self._do(request, descriptors)}
        except BackupctlError as err:
            answer = {"error": err.code, "message": err.message, "state": err.state}
        if self._said:
            answer["log"] = [self._said.popleft() for _ in range(len(self._said))]
        with suppress(OSError):  # a run that died meanwhile is noticed at the next reading
            self._run.send(json.dumps(answer).encode())
        return True

    def _do(self, request: dict[str, Any], descriptors: list[int]) -> object:
        match request["do"]:
            case "ping":
                self._freeze.ping()
            case "freeze":
                return self._freeze.freeze(float(request["budget"]))
            case "thaw":
                milliseconds = self._freeze.thaw()
                return {"milliseconds": milliseconds, "doubt": self._freeze.doubt}
            case "hold":
                self._held.hold(descriptors[0], str(request["export"]))
            case "ready":
                self._held.ready(str(request["export"]))
            case "release":
                self._held.release()
            case "watch":
                job, give_up, group = request["job"], request["give_up"], request["group"]
                self._watch.add(Watched(job, descriptors[0], give_up, group))
            case "unwatch":
                self._watch.forget()
            case "frozen":
                return self._freeze.deadline is not None
        return None


def _hands(monitor: str, agent: str, timeout_seconds: float) -> tuple[FreezeControl, TakeDown]:
    """Return how to reach guest and VM. monitor: an address, or what `libvirt.guard_hands` makes."""
    if monitor.startswith("{"):
        # Only for such a VM: it takes a while.
        from backupctl.vm.libvirt import connection, guard_hands  # noqa: PLC0415

        connection.Connection.log = staticmethod(Agent.log)
        hands = guard_hands.Hands.parse(monitor)
        return FreezeControl(partial(hands.agent, timeout_seconds), timeout_seconds), hands.take_down
    freeze = FreezeControl(Address.parse(agent) if agent else None, timeout_seconds)
    return freeze, partial(guard_monitor.take_down, Address.parse(monitor))


def _recorded() -> deque[str]:
    """Have what is said to the agent kept for the run, which has the log: its newest lines, cut off."""
    said = deque[str](maxlen=_MOST_LINES)

    def record(text: str, *values: object) -> None:
        said.append((text % values)[:_MOST_LINE])

    Agent.log = staticmethod(record)
    return said


def main() -> NoReturn:
    """Serve the run on the descriptor that is given as the first argument."""
    os.umask(0o077)
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    guard_survival.outlive()
    descriptor, monitor, agent, timeout = sys.argv[1:]
    said = _recorded()
    with socket.socket(fileno=int(descriptor)) as run:
        run.send(b"{}")
        watch = Watch(os.getppid())
        freeze, take_down = _hands(monitor, agent, float(timeout))
        guard = GuardServer(run, take_down, freeze, watch, said)
        guard.serve()
    guard.take_over()
    # At once: the run waits for our end, and the interpreter would take all apart before it.
    os._exit(0)
