# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's monitor (QMP), as plain calls: every one bounded in time, every failure one of three.

- the command was refused (`CommandFailed`): it had no effect;
- the connection could not be made (`MonitorUnreachable`): nothing was sent;
- no answer came (`OutcomeUnknown`): the command may have had its effect. Ask QEMU, then decide.

What QEMU says on its own, its events, waits in the socket until `pump` or the next command takes it in.
"""

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from backupctl.cancel import Cancellation
from backupctl.errors import CommandFailed, MonitorError, MonitorUnreachable, OutcomeUnknown
from backupctl.system import log, open_files
from backupctl.system.address import Address
from backupctl.vm.qmp import reply
from backupctl.vm.qmp.wire import Message, Wire

_LOOK_SECONDS = 0.2
_MOST_BYTES = 10 << 20
"""Of one message: libvirt takes no more either."""

_log = logging.getLogger("backupctl.vm.qmp")

_MOST_NAME, _MOST_NODES = 255, 10_000
_HEARD = {
    "BLOCK_WRITE_THRESHOLD": "node-name",
    "BLOCK_JOB_CANCELLED": "device",
    "BLOCK_JOB_COMPLETED": "device",
}


class Heard:
    """What QEMU said on its own, as far as anybody here waits for it.

    thresholds: the nodes whose write threshold was passed. ended: the block jobs that came to an end. All
    else is forgotten; kept, a flood of it would pile up without end.
    """

    def __init__(self) -> None:
        self.thresholds: set[str] = set()
        self.ended: set[str] = set()

    def note(self, message: Message) -> None:
        """Keep what counts of an event."""
        event, data = message.get("event"), message.get("data")
        if not isinstance(event, str) or event not in _HEARD or not isinstance(data, dict):
            return
        key = _HEARD[event]
        kept, name = (self.thresholds if key == "node-name" else self.ended), data.get(key)
        if isinstance(name, str) and len(name) <= _MOST_NAME and len(kept) < _MOST_NODES:
            kept.add(name)


class _SenselessError(Exception):
    """An answer that is none to what was asked."""


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


class Monitor:
    """A connection to one QEMU's monitor; `connect` makes one.

    address: where it is. timeout_seconds: the longest that any one command may take. process: who listens
    there (QEMU, or who made the socket for it), None if that is not known.
    """

    def __init__(self, address: Address, connection: socket.socket, timeout_seconds: float) -> None:
        self.address = address
        self._connection = connection
        self._wire = Wire(connection, _MOST_BYTES)
        self._timeout = timeout_seconds
        self._asked = 0
        self._heard = Heard()
        self._broken = ""
        self._until: float | None = None
        self.version = Version(0, 0, 0)
        self.commands: frozenset[str] = frozenset()
        self.process: int | None = None

    @classmethod
    def connect(cls, address: Address, timeout_seconds: float, cancel: Cancellation | None = None) -> Self:
        """Connect, negotiate, and ask for version and commands. Raises MonitorUnreachable, Interrupted.

        cancel: looked at while nobody greets. A monitor that serves somebody else accepts the connection and
        says nothing (conformance script `second_client_waits_for_the_first`), so a missing greeting most
        often means a second client.
        """
        _log.debug("connect to %s", address)
        try:
            connection = address.connect(timeout_seconds)
        except (OSError, UnicodeError) as err:  # UnicodeError: a host's name that can't be one
            raise _unreachable(address, err) from err
        self = cls(address, connection, timeout_seconds)
        try:
            self.process = open_files.peer(connection)
            self._introduce(cancel)
        except (OSError, EOFError, ValueError, OutcomeUnknown) as err:
            self.close()
            raise _unreachable(address, err) from err
        except (_SenselessError, CommandFailed) as err:
            self.close()
            raise MonitorUnreachable(f"what answers at {address} is not QEMU's monitor") from err
        except BaseException:
            self.close()
            raise
        return self

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Send one command and return its reply. Raises CommandFailed, OutcomeUnknown."""
        if self._broken:
            raise OutcomeUnknown(command, self._broken)
        begun = time.monotonic()
        _log.debug("-> %s %s", command, log.Shown(arguments or {}))
        try:
            answer = self._exchange(command, arguments)
            error = _error(answer)
        except TimeoutError as err:
            raise self._lost(command, f"silent for {time.monotonic() - begun:.0f} s") from err
        except (EOFError, ConnectionError) as err:
            raise self._lost(command, "the monitor's connection broke") from err
        except _SenselessError as err:
            raise self._lost(command, "what it answers makes no sense") from err
        except (OSError, ValueError) as err:
            raise self._lost(command, _why(err)) from err
        except BaseException:  # a signal: an answer that comes now is not that to the next question
            self._broken = "interrupted"
            raise
        if error is not None:
            _log.debug("<- refused: %s: %s", *error)
            raise CommandFailed(command, *error)
        _log.debug("<- %s (%.3f s)", log.Shown(answer["return"]), time.monotonic() - begun)
        return answer["return"]

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
            self._connection.settimeout(self._limit())
            socket.send_fds(self._connection, [b" "], [descriptor])  # blank: it belongs to no message
        except OSError as err:
            raise MonitorError(f"QEMU takes no file descriptor over {self.address}: {_why(err)}") from err

    @property
    def passes_descriptors(self) -> bool:
        """Whether files can be handed to this QEMU: a unix socket, and the commands for it.

        qemu-storage-daemon has no add-fd; TCP carries no descriptors.
        """
        return self.address.path is not None and {"add-fd", "getfd"} <= self.commands

    @property
    def alive(self) -> bool:
        """Whether the connection still stands."""
        return not self._broken and self._wire.open

    def pump(self) -> None:
        """Take in what QEMU said on its own. Raises OutcomeUnknown if it has hung up, or makes no sense."""
        try:
            for message in self._wire.at_hand() if not self._broken else ():
                self._note(message)
        except (OSError, EOFError, ValueError, _SenselessError) as err:
            raise self._lost("(between commands)", "the monitor's connection broke") from err
        if self._broken:
            raise OutcomeUnknown("(between commands)", self._broken)

    def thresholds_passed(self) -> frozenset[str]:
        """Return the nodes of which QEMU said, since the last call, that their write threshold is passed."""
        passed = frozenset(self._heard.thresholds)
        self._heard.thresholds.clear()
        return passed

    def jobs_ended(self) -> frozenset[str]:
        """Return the block jobs of which QEMU said, since the last call, that they have ended."""
        ended = frozenset(self._heard.ended)
        self._heard.ended.clear()
        return ended

    def close(self) -> None:
        """Leave the monitor to others. Never raises."""
        self._connection.close()
        self._broken = self._broken or "closed"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _introduce(self, cancel: Cancellation | None) -> None:
        deadline = time.monotonic() + self._timeout
        if not isinstance(self._receive(deadline, cancel).get("QMP"), dict):
            raise _SenselessError
        if _error(self._exchange("qmp_capabilities", None, cancel)) is not None:
            raise _SenselessError
        version, commands = self.execute("query-version"), self.execute("query-commands")
        try:
            self.version = _version(version)
            self.commands = frozenset(reply.text(entry["name"]) for entry in commands)
        except (KeyError, TypeError, ValueError) as err:
            raise _SenselessError from err

    def _exchange(
        self, command: str, arguments: Mapping[str, object] | None, cancel: Cancellation | None = None
    ) -> Message:
        """Return the answer to a command. Raises as `Wire.receive` does, and _SenselessError."""
        deadline = time.monotonic() + self._limit()
        self._asked += 1
        mark = f"backupctl-{self._asked}"
        message: Message = {"execute": command, "id": mark}
        if arguments:
            message["arguments"] = dict(arguments)
        self._wire.send(message, deadline)
        while True:
            answer = self._receive(deadline, cancel)
            if "event" not in answer:
                break
            self._note(answer)
        if answer.get("id") != mark or ("return" in answer) == ("error" in answer):
            raise _SenselessError
        return answer

    def _receive(self, deadline: float, cancel: Cancellation | None) -> Message:
        """cancel: looked at meanwhile."""
        while cancel is not None:
            cancel.check()
            try:
                return self._wire.receive(min(deadline, time.monotonic() + _LOOK_SECONDS))
            except TimeoutError:
                if time.monotonic() >= deadline:
                    raise
        return self._wire.receive(deadline)

    def _note(self, message: Message) -> None:
        if "event" not in message:
            raise _SenselessError  # an answer to nothing that was asked
        self._heard.note(message)

    def _limit(self) -> float:
        """Return the seconds that a command may take."""
        if self._until is None:
            return self._timeout
        return max(0.001, min(self._timeout, self._until - time.monotonic()))

    def _lost(self, command: str, why: str) -> OutcomeUnknown:
        # An answer that comes late must not be taken for the answer to a later question.
        self._broken = why
        _log.debug("<- nothing: %s", why)
        return OutcomeUnknown(command, why)


def _how_to_reach(address: Address, err: Exception) -> str:
    """Say what to do about a monitor that is not there."""
    if address.path and not os.path.lexists(address.path):
        return f"start the VM with -qmp unix:{address.path},server=on,wait=off, or name the socket it has"
    if isinstance(err, PermissionError):
        return "run backupctl as root, or as the user that QEMU runs as"
    return "is the VM running? Nothing that speaks QMP listens there"


def _version(answer: Any) -> Version:
    major, minor, micro = (reply.number(answer["qemu"][part], 9999) for part in ("major", "minor", "micro"))
    return Version(major, minor, micro)


def _error(answer: Message) -> tuple[str, str] | None:
    """Return the class and the text of an answer that is an error. Raises _SenselessError."""
    if "error" not in answer:
        return None
    error = answer["error"]
    if not isinstance(error, dict):
        raise _SenselessError
    kind, text = error.get("class"), error.get("desc")
    if not isinstance(kind, str) or not isinstance(text, str):
        raise _SenselessError
    return kind[:100], text[:1000]


def _unreachable(address: Address, err: Exception) -> MonitorUnreachable:
    if isinstance(err, TimeoutError):
        return MonitorUnreachable(
            f"the monitor at {address} does not answer: another client may hold it, or QEMU hangs",
            hint="a monitor serves one client: end the other, or give QEMU one for backups alone",
        )
    return MonitorUnreachable(
        f"no QEMU monitor at {address}: {_why(err):.300}", hint=_how_to_reach(address, err)
    )


def _why(err: Exception) -> str:
    if isinstance(err, OutcomeUnknown):
        return err.message
    if isinstance(err, EOFError):
        return "it hung up"
    if isinstance(err, OSError):
        return err.strerror or str(err)
    if isinstance(err, UnicodeError) and not isinstance(err, UnicodeDecodeError):
        return str(err)
    return "it sends what is no QMP"
