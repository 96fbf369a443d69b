# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's monitor (QMP), as plain calls: every one bounded in time, every failure one of three.

- the command was refused (`CommandFailed`): it had no effect;
- the connection could not be made (`MonitorUnreachable`): nothing was sent;
- no answer came (`OutcomeUnknown`): the command may have had its effect. Ask QEMU, then decide.

The asynchronous client of qemu.qmp runs only while one of these calls does, in the caller's thread;
what QEMU says in between waits in the socket.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from qemu.qmp import ExecInterruptedError, ExecuteError, QMPClient, QMPError, Runstate
from qemu.qmp.error import ProtocolError
from qemu.qmp.message import Message
from qemu.qmp.protocol import StateError
from qemu.qmp.qmp_client import BadReplyError

from backupctl.cancel import Cancellation
from backupctl.errors import CommandFailed, Interrupted, MonitorError, MonitorUnreachable, OutcomeUnknown
from backupctl.system import log, open_files
from backupctl.system.address import Address
from backupctl.vm.qmp import reply

T = TypeVar("T")
_LOOK_SECONDS = 0.2
_TURNS = 10  # of the event loop: a message passes through several tasks before it is heard

_log = logging.getLogger("backupctl.vm.qmp")
_logger = logging.getLogger("qemu.qmp")
_logger.addHandler(logging.NullHandler())
_logger.propagate = False  # its errors reach the user as ours; a second, raw line would only confuse


_MOST_NAME, _MOST_NODES = 255, 10_000
_HEARD = {
    "BLOCK_WRITE_THRESHOLD": "node-name",
    "BLOCK_JOB_CANCELLED": "device",
    "BLOCK_JOB_COMPLETED": "device",
}


class _Client(QMPClient):
    """The library's client, with one sort of error for all that is no QMP, and little memory for events.

    thresholds: the nodes whose write threshold was passed. ended: the block jobs that came to an end.
    Nothing else that QEMU says on its own is waited for here; kept, a flood of it would pile up without end.
    received_bytes: all that ever came.
    """

    def __init__(self) -> None:
        super().__init__("monitor")
        self.thresholds: set[str] = set()
        self.ended: set[str] = set()
        self.received_bytes = 0

    async def _readline(self) -> bytes:
        line = await super()._readline()
        self.received_bytes += len(line)
        return line

    async def _do_recv(self) -> Message:
        # A line without end, a nesting without end, a number of thousands of digits, what is no UTF-8: the
        # library lets these out as they are, at whatever call comes next.
        try:
            return await super()._do_recv()
        except (ProtocolError, ValueError, RecursionError):
            raise ProtocolError("it sends what is no QMP") from None

    def _cb_outbound(self, msg: Message) -> Message:
        # The library's own makes a text of each message for its log, shown or not: a third of a run's CPU.
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        return msg

    async def _on_message(self, msg: Message) -> None:
        if "event" in msg:
            self._note(msg["event"], msg.get("data"))
            return
        if not isinstance(msg.get("id", ""), str):  # else it would be looked up, hashable or not
            raise ProtocolError("it sends an answer to nothing that was asked")
        await super()._on_message(msg)

    def _note(self, event: object, data: object) -> None:
        if not isinstance(event, str) or event not in _HEARD or not isinstance(data, dict):
            return
        key = _HEARD[event]
        kept, name = (self.thresholds if key == "node-name" else self.ended), data.get(key)
        if isinstance(name, str) and len(name) <= _MOST_NAME and len(kept) < _MOST_NODES:
            kept.add(name)


@dataclass(frozen=True)
class Version:
    """QEMU's version."""

    major: int
    minor: int
    micro: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.micro}"

    def at_least(self, major: int, minor: int) -> bool:
        """Whether this QEMU is that version or newer."""
        return (self.major, self.minor) >= (major, minor)


class Line(Protocol):
    """Another way to a monitor than to connect to its address: through our program on its host."""

    def connect(self, seconds: float) -> tuple[socket.socket, int | None]:
        """Return a connected socket, and the process that listens there. Raises OSError."""

    def send_descriptor(self, descriptor: int) -> None:
        """Send a descriptor of that program; the next command takes it. Raises OSError, MonitorError."""


class Monitor:
    """A connection to one QEMU's monitor; `connect` makes one.

    address: where it is. timeout_seconds: the longest that any one command may take. process: who listens
    there (QEMU, or who made the socket for it), None if that is not known, or if it is on another host.
    line: how a monitor on another host is reached.
    """

    def __init__(self, address: Address, timeout_seconds: float, line: Line | None = None) -> None:
        self.address = address
        self._line = line
        self._timeout = timeout_seconds
        self._loop = asyncio.new_event_loop()
        # Its own handler prints a traceback of each task that ends badly when nobody waits for it any more.
        self._loop.set_exception_handler(_note)
        self._client = _Client()
        self._broken = ""
        self._until: float | None = None
        self.version = Version(0, 0, 0)
        self.commands: frozenset[str] = frozenset()
        self.process: int | None = None
        self.remote_process: int | None = None

    @classmethod
    def connect(
        cls,
        address: Address,
        timeout_seconds: float,
        cancel: Cancellation | None = None,
        line: Line | None = None,
    ) -> Self:
        """Connect, negotiate, and ask for version and commands. Raises MonitorUnreachable, Interrupted.

        cancel: looked at while nobody greets. A monitor that serves somebody else accepts the connection and
        says nothing (conformance script `second_client_waits_for_the_first`), so a missing greeting most
        often means a second client.
        """
        self = cls(address, timeout_seconds, line)
        _log.debug("connect to %s", address)
        try:
            connection = self._connected()
            self._run(self._client.connect(connection), cancel=cancel)
            self.version = _version(self.execute("query-version"))
            self.commands = frozenset(reply.text(entry["name"]) for entry in self.execute("query-commands"))
        except TimeoutError as err:
            self.close()
            raise MonitorUnreachable(
                f"the monitor at {address} does not answer: another client may hold it, or QEMU hangs",
                hint="a monitor serves one client: end the other, or give QEMU one for backups alone",
            ) from err
        except (QMPError, OSError, EOFError, OutcomeUnknown) as err:
            self.close()
            unreachable = MonitorUnreachable(
                f"no QEMU monitor at {address}: {_root(err):.300}", hint=_how_to_reach(address, err)
            )
            unreachable.nobody_listens = isinstance(err, FileNotFoundError | ConnectionRefusedError)
            raise unreachable from err
        except (KeyError, TypeError, ValueError, CommandFailed) as err:
            self.close()
            raise MonitorUnreachable(f"what answers at {address} is not QEMU's monitor") from err
        except (KeyboardInterrupt, Interrupted):
            self.close()
            raise
        return self

    def _connected(self) -> socket.socket:
        if self._line is not None:
            connection, self.remote_process = self._line.connect(self._timeout)
            return connection
        connection = self.address.connect(self._timeout)
        self.process = open_files.peer(connection)
        return connection

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Send one command and return its reply. Raises CommandFailed, OutcomeUnknown."""
        if self._broken:
            raise OutcomeUnknown(command, self._broken)
        begun, had = time.monotonic(), self._client.received_bytes
        _log.debug("-> %s %s", command, log.Shown(arguments or {}, 0))  # it is ours
        try:
            answer = self._run(self._client.execute(command, dict(arguments) if arguments else None))
            told = log.Shown(answer, self._client.received_bytes - had)
            _log.debug("<- %s (%.3f s)", told, time.monotonic() - begun)
            return answer
        except ExecuteError as err:
            error = err.error.error
            _log.debug("<- refused: %s: %s", error.class_[:100], error.desc[:1000])
            raise CommandFailed(command, error.class_[:100], error.desc[:1000]) from err
        except TimeoutError as err:
            raise self._lost(command, f"silent for {time.monotonic() - begun:.0f} s") from err
        except (ExecInterruptedError, StateError) as err:
            raise self._lost(command, "the monitor's connection broke") from err
        except BadReplyError as err:
            raise self._lost(command, "what it answers is invalid") from err
        except (QMPError, OSError, EOFError) as err:
            raise self._lost(command, f"{_root(err):.300}") from err

    def transaction(self, actions: list[dict[str, object]]) -> None:
        """Do all of `actions` at once, or none of them. Raises as `execute` does."""
        if actions:
            self.execute("transaction", {"actions": actions})

    @contextmanager
    def within(self, until: float | None) -> Iterator[None]:
        """Let no command of the block take longer than until then, in the seconds of `time.monotonic`."""
        self._until = until
        try:
            yield
        finally:
            self._until = None

    def send_fd(self, descriptor: int) -> None:
        """Send a file descriptor along; the next `add-fd` or `getfd` takes it. Raises MonitorError."""
        _log.debug("-> (file descriptor)")
        try:
            if self._line is not None:
                self._line.send_descriptor(descriptor)
            else:
                self._client.send_fd_scm(descriptor)
        except (QMPError, OSError, AssertionError) as err:
            raise MonitorError(f"QEMU takes no file descriptor over {self.address}: {err}") from err

    @property
    def passes_descriptors(self) -> bool:
        """Whether files can be handed to this QEMU: a unix socket, and the commands for it.

        qemu-storage-daemon has no add-fd; TCP carries no descriptors.
        """
        return self.address.path is not None and {"add-fd", "getfd"} <= self.commands

    @property
    def alive(self) -> bool:
        """Whether the connection still stood when it was last used."""
        return not self._broken and self._client.runstate == Runstate.RUNNING

    def pump(self) -> None:
        """Take in what QEMU said on its own. Raises OutcomeUnknown if it has hung up."""
        self._loop.run_until_complete(_turns())
        if not self.alive:
            raise self._lost("(between commands)", "the monitor's connection broke")

    def thresholds_passed(self) -> frozenset[str]:
        """Return the nodes of which QEMU said, since the last call, that their write threshold is passed."""
        passed = frozenset(self._client.thresholds)
        self._client.thresholds.clear()
        return passed

    def jobs_ended(self) -> frozenset[str]:
        """Return the block jobs of which QEMU said, since the last call, that they have ended."""
        ended = frozenset(self._client.ended)
        self._client.ended.clear()
        return ended

    def close(self) -> None:
        """Leave the monitor to others. Never raises: what is said by now is said."""
        if not self._loop.is_closed():
            with suppress(QMPError, OSError, EOFError, TimeoutError):
                self._run(self._client.disconnect(), seconds=2.0)
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()
        self._broken = self._broken or "closed"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(
        self, work: Coroutine[Any, Any, T], seconds: float | None = None, cancel: Cancellation | None = None
    ) -> T:
        limit = self._timeout if seconds is None else seconds
        if self._until is not None:
            limit = max(0.0, min(limit, self._until - time.monotonic()))
        bounded = self._loop.create_task(work)
        end = self._loop.call_later(limit, bounded.cancel)  # `asyncio.wait_for` would make a task of its own
        try:
            while cancel is not None and not bounded.done():
                self._loop.run_until_complete(asyncio.wait({bounded}, timeout=_LOOK_SECONDS))
                cancel.check()
            return self._loop.run_until_complete(bounded)
        except asyncio.CancelledError:
            raise TimeoutError from None
        except (KeyboardInterrupt, Interrupted):  # what is thrown away half done complains, with a traceback
            bounded.cancel()
            with suppress(asyncio.CancelledError, QMPError, OSError, EOFError):
                self._loop.run_until_complete(bounded)
            raise
        finally:
            end.cancel()

    def _lost(self, command: str, why: str) -> OutcomeUnknown:
        # An answer that comes late must not be taken for the answer to a later question.
        self._broken = why
        _log.debug("<- nothing: %s", why)
        return OutcomeUnknown(command, why)


def _note(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    _log.debug("%s: %.300r", context.get("message"), context.get("exception"))


async def _turns() -> None:
    for _ in range(_TURNS):
        await asyncio.sleep(0)


def _how_to_reach(address: Address, err: Exception) -> str:
    """Say what to do about a monitor that is not there."""
    if address.path and not address.remote and not os.path.lexists(address.path):
        return f"start the VM with -qmp unix:{address.path},server=on,wait=off, or name the socket it has"
    if isinstance(err, PermissionError) and address.remote:
        return (
            "ssh logs in a user who may not connect to it: log in as root, or as the user that QEMU runs as"
        )
    if isinstance(err, PermissionError):
        return "run backupctl as root, or as the user that QEMU runs as"
    return "is the VM running? Nothing that speaks QMP listens there"


def _version(answer: Any) -> Version:
    major, minor, micro = (reply.number(answer["qemu"][part], 9999) for part in ("major", "minor", "micro"))
    return Version(major, minor, micro)


def _root(err: BaseException) -> str:
    while err.__cause__ is not None:
        err = err.__cause__
    return (isinstance(err, OSError) and err.strerror) or str(err)
