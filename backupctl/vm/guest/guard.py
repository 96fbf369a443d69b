# SPDX-License-Identifier: GPL-2.0-or-later
"""The run's handle on its guard (see `guard_process`)."""

import functools
import json
import logging
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import backupctl
from backupctl import errors
from backupctl.errors import (
    UNTOUCHED,
    AgentError,
    AgentRefused,
    BackupctlError,
    GuardLost,
    Refused,
)
from backupctl.system.address import Address
from backupctl.vm.driver import Thawed
from backupctl.vm.guest.agent import Agent, thaw_if_frozen

_log = logging.getLogger("backupctl.vm.guest")
Agent.log = _log.debug

_START_SECONDS = 20.0
_ANSWER_SECONDS = 10.0
_OVERDUE_SECONDS = 1.0
"""After the end of a freeze's budget: a guard that has not answered then hangs, and the guest with it."""
_PING_TIMEOUTS = 3
"""Of the agent: to connect, to synchronise, for the status."""
_PROBE_SECONDS = 5.0
_SOCKET_BYTES = 107
_PROBE_PATIENCE_SECONDS = 30.0
_PACKAGE = Path(backupctl.__file__).parent.parent
PROGRAM = (
    "import sys; sys.path.append(sys.argv.pop(1)); from backupctl.vm.guest.guard_process import main; main()"
)
"""With the package's directory as its first argument. The interpreter is told to look for no site-packages,
which takes longer than all that the guard does."""


class GuardClient:
    """A guard process; `start` makes one, `close` ends it.

    Where the run ends in good order the guard ends with it. Where it dies, or leaves with the guest
    frozen or sockets held, the guard does what is due and then ends by itself.

    Every answer is waited for with an end; a guard that gives none is killed, and if the guest may be frozen
    it is thawed from here.
    """

    def __init__(
        self,
        process: "subprocess.Popen[bytes]",
        pair: socket.socket,
        thaw: Callable[[], object] | None,
        timeout: float,
    ) -> None:
        self._process = process
        self._pair = pair
        self._thaw_without = thaw
        self._timeout = timeout
        self._due: float | None = None  # while the guest may be frozen: when that has to be over
        self._probed = time.monotonic()
        self._probing = False
        self._stands_by = False

    @classmethod
    def start(cls, monitor: Address, agent: Address | None, agent_timeout_seconds: float, lock: int) -> Self:
        """Start the process; `stand_by` waits until it is there.

        lock: the descriptor of the VM's lock, which the guard holds for as long as it works. Raises
        GuardLost, Refused.
        """
        thaw = functools.partial(thaw_if_frozen, agent, agent_timeout_seconds) if agent else None
        reached = (_from_anywhere(monitor), _from_anywhere(agent) if agent else "")
        return cls.launch(reached, thaw, agent_timeout_seconds, lock)

    @classmethod
    def launch(
        cls, reached: tuple[str, str], thaw: Callable[[], object] | None, timeout_seconds: float, lock: int
    ) -> Self:
        """Start the process. reached: VM and agent, as its main function takes them.

        thaw: thaws the guest if it is frozen, without a guard; None without an agent. Raises GuardLost.
        """
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = [str(its.fileno()), *reached, str(timeout_seconds)]
        try:
            with its:
                process = _spawn(arguments, (its.fileno(), lock))
        except OSError as err:
            ours.close()
            raise GuardLost(f"cannot start the guard process: {err.strerror}") from err
        return cls(process, ours, thaw, timeout_seconds)

    def stand_by(self) -> None:
        """Wait until the guard stands by, unless it does already. Raises GuardLost."""
        if not self._stands_by:
            self._receive(_START_SECONDS)
            self._stands_by = True

    def ping_agent(self) -> None:
        """See whether the guest agent answers, with the guest not frozen. Raises AgentError, Refused."""
        self._ping()

    def freeze(self, budget_seconds: float) -> int:
        """Freeze the guest for at most `budget_seconds`; returns the number of file systems, not 0.

        Raises Refused if somebody else froze it, AgentError, GuardLost.
        """
        self._ping()
        self._due = time.monotonic() + budget_seconds
        try:
            return int(self._ask({"do": "freeze", "budget": budget_seconds}))
        except AgentRefused:  # the run may go on without
            self.may_be_frozen()
            raise

    @property
    def due(self) -> float | None:
        """The moment at which a guard or a run that waits for anything has waited too long; None for none.

        There is one while the guest may be frozen by us.
        """
        return None if self._due is None else self._due + _OVERDUE_SECONDS

    def thaw(self) -> Thawed:
        """Thaw the guest; returns how it was frozen until now.

        Raises FreezeOverrun if the guard had to thaw it before, AgentError, GuardLost.
        """
        answer = self._ask({"do": "thaw"})
        self._due = None
        return Thawed(float(answer["milliseconds"]), str(answer["doubt"]))

    def may_be_frozen(self) -> bool:
        """Whether the guest is, or may be, still frozen by us. Raises GuardLost."""
        frozen = bool(self._ask({"do": "frozen"}))
        if not frozen:
            self._due = None
        return frozen

    def hold(self, connection: socket.socket, export: str) -> None:
        """Have the guard hold a duplicate of an NBD client's socket; before anything is said on it."""
        self._ask({"do": "hold", "export": export}, (connection.fileno(),))

    def ready(self, export: str) -> None:
        """Tell the guard that all clients of an export have ended their handshake."""
        self._ask({"do": "ready", "export": export})

    def release(self) -> None:
        """The exports are gone: the guard may let go of the sockets. One that has died did."""
        with suppress(GuardLost):
            self._ask({"do": "release"})

    def watch(self, job: str, scratch: int, give_up_bytes: int | None, group: str | None) -> None:
        """Have the guard end a job if we die, and us if we let its scratch file fill up.

        scratch: a descriptor of the file. give_up_bytes: used of it when we should have ended the job; None
        if it can't be used up. group: the throttle group by which QEMU holds the guest back before that, None
        if it does not. Raises GuardLost.
        """
        self._ask({"do": "watch", "job": job, "give_up": give_up_bytes, "group": group}, (scratch,))

    def unwatch(self) -> None:
        """The jobs have ended."""
        with suppress(GuardLost):
            self._ask({"do": "unwatch"})

    @property
    def alive(self) -> bool:
        """Whether the guard stands by; one that died looks after nothing any more."""
        return self._process.poll() is None

    def check(self) -> None:
        """Raise GuardLost if the guard has died, or has not answered for long. Never waits."""
        if not self.alive:
            raise GuardLost("the guard process has died")
        self._probe()

    def close(self) -> None:
        """Leave. A guard with nothing left to do ends at once; one that has is not waited for."""
        busy = True
        with suppress(BackupctlError):
            busy = self.may_be_frozen()
        self._pair.close()
        if not busy:
            self._await_end()
        self._process.poll()
        # A guard that goes on is nobody's child to wait for: Python must not warn of it.
        self._process.returncode = self._process.returncode or 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _await_end(self) -> None:
        # Popen.wait with a time limit looks now and then, with ever longer pauses.
        with suppress(OSError):
            handle = os.pidfd_open(self._process.pid)
            waiting = select.poll()
            waiting.register(handle, select.POLLIN)
            waiting.poll(_ANSWER_SECONDS * 1000)
            os.close(handle)

    def _ping(self) -> None:
        self._ask({"do": "ping"}, seconds=_PING_TIMEOUTS * self._timeout)

    def _probe(self) -> None:
        """Ask now and then whether the guard is awake; look for the answer at later calls."""
        if self._probing:
            if select.select([self._pair], [], [], 0)[0]:
                self._receive(0.0)
                self._probing = False
            elif time.monotonic() - self._probed > _PROBE_PATIENCE_SECONDS:
                raise self._lost("does not answer")
        elif time.monotonic() - self._probed > _PROBE_SECONDS:
            self._send({"do": "frozen"}, ())
            self._probed, self._probing = time.monotonic(), True

    def _ask(
        self,
        request: dict[str, object],
        descriptors: tuple[int, ...] = (),
        seconds: float = 0.0,
    ) -> Any:
        """seconds: how much longer its answer may take; while the guest may be frozen it is `due`."""
        deadline = time.monotonic() + _ANSWER_SECONDS + seconds
        if self.due is not None:
            deadline = max(self.due, time.monotonic() + _OVERDUE_SECONDS)
        self._send(request, descriptors)
        if self._probing:  # its answer comes first
            self._receive(deadline - time.monotonic())
            self._probing = False
        answer = self._receive(deadline - time.monotonic())
        if "error" in answer:
            raise _error(answer)
        return answer.get("value")

    def _send(self, request: dict[str, object], descriptors: tuple[int, ...]) -> None:
        self.stand_by()
        _log.debug("guard %d -> %s", self._process.pid, request)
        try:
            self._pair.settimeout(_OVERDUE_SECONDS)
            socket.send_fds(self._pair, [json.dumps(request).encode()], list(descriptors))
        except TimeoutError as err:
            raise self._lost("does not answer") from err
        except OSError as err:
            raise self._lost("has died") from err

    def _receive(self, seconds: float) -> dict[str, Any]:
        try:
            self._pair.settimeout(max(seconds, 0.001))
            content = self._pair.recv(65536)
        except TimeoutError as err:
            raise self._lost("does not answer") from err
        except OSError as err:
            raise self._lost("has died") from err
        if not content:
            raise self._lost("has died")
        answer: dict[str, Any] = json.loads(content)
        for line in answer.pop("log", ()):
            _log.debug("guard %d, agent: %s", self._process.pid, line)
        _log.debug("guard %d <- %.1000s", self._process.pid, answer)
        return answer

    def _lost(self, why: str) -> GuardLost:
        """See to it that a guard which is none any more is dead, and the guest thawed without it.

        It has the agent, whose channel serves one client at a time, until it is dead.
        """
        _log.debug("guard %d %s", self._process.pid, why)
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_ANSWER_SECONDS)
        if self._due is not None and self._thaw_without is not None:
            with suppress(AgentError):  # it is tried again when the run is rolled back
                self._thaw_without()
                self._due = None
        return GuardLost(f"the guard process {why}")


def _from_anywhere(address: Address) -> str:
    """Return an address for the guard, which works in another directory. Raises Refused."""
    absolute = address.absolute()
    if absolute.path and len(os.fsencode(absolute.path)) > _SOCKET_BYTES:
        raise Refused(
            f"the path of the socket {address} is too long when it is absolute, as the guard needs it: "
            f"{_SOCKET_BYTES} bytes at most; a link with a shorter name will do",
            state=UNTOUCHED,
        )
    return str(absolute)


def _spawn(arguments: list[str], descriptors: tuple[int, ...]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-I", "-S", *_bytecode(), "-c", PROGRAM, str(_PACKAGE), *arguments],
        pass_fds=descriptors,
        stdin=subprocess.DEVNULL,
        # Not ours: who waits for the end of our output must not wait for the guard's.
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )


def _bytecode() -> list[str]:
    """Return what the environment said of compiled modules, since the guard does not look at it."""
    found = ["-B"] if sys.dont_write_bytecode else []
    return [*found, "-X", f"pycache_prefix={sys.pycache_prefix}"] if sys.pycache_prefix else found


def _error(answer: dict[str, Any]) -> BackupctlError:
    return errors.received(str(answer["error"]), str(answer["message"]), str(answer["state"]))
