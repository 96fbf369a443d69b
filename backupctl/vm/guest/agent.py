# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest agent (qemu-ga), as plain calls. The guard imports this: only what loads quickly.

Each conversation begins with `guest-sync-delimited`: the agent answers with the byte 0xFF before its
reply, so whatever stale answers still lie in the channel end there. After a time-out the same again.
Source: QEMU's qga/qapi-schema.json.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Self

from backupctl.errors import AgentRefused, AgentTimeout, AgentUnavailable
from backupctl.system.address import Address

MAX_REPLY_BYTES = 1 << 20


def no_log(_format: str, *_arguments: object) -> None:
    """Log nothing."""


_DELIMITER = b"\xff"


class Thaw(NamedTuple):
    """How a thaw was answered, after which the guest is thawed.

    thawed: the file systems that it thawed. refusal: the agent's words if it refused, "" if it did not.
    """

    thawed: int
    refusal: str


class Ended(NamedTuple):
    """How a program in the guest ended. status: its exit status; None if a signal killed it."""

    status: int | None


class Agent:
    """A conversation with one guest's agent; `connect` begins it.

    timeout_seconds: the longest that any one command may take. until: the moment, as `time.monotonic` tells
    it, at which every command has ended all the same; None for no such limit.
    """

    log: ClassVar[Callable[..., None]] = staticmethod(no_log)
    """Gets a debug line for each command. The guard process, which starts anew for each run, imports this
    module too: it must not wait for the import of `logging`, so whoever logs puts it here."""

    def __init__(self, connection: socket.socket, timeout_seconds: float) -> None:
        self._socket = connection
        self._timeout = timeout_seconds
        self._received = b""
        self._in_step = False
        self.until: float | None = None

    @classmethod
    def connect(cls, address: Address, timeout_seconds: float) -> Self:
        """Connect; nothing is said yet. Raises AgentUnavailable."""
        cls.log("connect to %s", address)
        try:
            made = address.connect(timeout_seconds)
        except (OSError, UnicodeError) as err:  # UnicodeError: a host's name that can't be one
            why = "time-out" if isinstance(err, TimeoutError) else getattr(err, "strerror", "") or str(err)
            raise AgentUnavailable(f"no guest agent at {address}: {why}") from err
        return cls(made, timeout_seconds)

    def ping(self) -> None:
        """Return if the agent answers. Raises AgentError."""
        self._command("guest-ping")

    def start(self, program: str, arguments: Sequence[str]) -> int:
        """Start a program in the guest; returns its process id there. Raises AgentError."""
        reply = self._command("guest-exec", arguments={"path": program, "arg": list(arguments)})
        process = reply.get("pid") if isinstance(reply, dict) else None
        if not isinstance(process, int) or isinstance(process, bool):
            raise AgentTimeout(f"the agent's answer to guest-exec is invalid: {reply!r:.60}")
        return process

    def exit_status(self, process: int) -> "Ended | None":
        """Return how a program that was started has ended; None if it has not. Raises AgentError."""
        reply = self._command("guest-exec-status", arguments={"pid": process})
        if not isinstance(reply, dict) or not isinstance(reply.get("exited"), bool):
            raise AgentTimeout(f"the agent's answer to guest-exec-status is invalid: {reply!r:.60}")
        status = reply.get("exitcode")
        return Ended(status if isinstance(status, int) else None) if reply["exited"] else None

    def freeze_status(self, seconds: float | None = None) -> str:
        """Return "thawed" or "frozen", within so many seconds. Raises AgentError.

        It is what the agent remembers, not what the file systems are: they may have been thawed past it.
        """
        status = self._command("guest-fsfreeze-status", seconds)
        if status not in ("thawed", "frozen"):
            raise AgentRefused(f"the agent's answer to guest-fsfreeze-status is invalid: {status!r:.60}")
        return str(status)

    def freeze(self, seconds: float) -> int:
        """Freeze the guest's file systems; returns how many. Raises AgentError.

        seconds: how long it may take; a guest with much to write out needs some.
        """
        return self._count("guest-fsfreeze-freeze", seconds)

    def thaw(self) -> int:
        """Thaw the guest's file systems; returns how many. Raises AgentError."""
        return self._count("guest-fsfreeze-thaw")

    def thaw_for_sure(self) -> Thaw:
        """Thaw the guest, and ask whether it is. Raises AgentError if it isn't, or if that is not known.

        See `thaw_for_sure`.
        """
        return thaw_for_sure(self.thaw, self.freeze_status)

    def close(self) -> None:
        """Hang up. Never raises."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _count(self, command: str, seconds: float | None = None) -> int:
        reply = self._command(command, seconds)
        if not isinstance(reply, int) or isinstance(reply, bool) or reply < 0:
            raise AgentTimeout(  # no refusal: whether the command took effect is not known
                f"the agent's answer to {command} is invalid: {reply!r:.60}"
            )
        return reply

    def _command(
        self, command: str, seconds: float | None = None, arguments: dict[str, Any] | None = None
    ) -> Any:
        if not self._in_step:
            self._synchronise()
        try:
            message = {"execute": command, **({"arguments": arguments} if arguments else {})}
            reply = self._exchange(message, self._deadline(seconds))
        except (OSError, EOFError, ValueError) as err:
            self._in_step = False
            raise AgentTimeout(f"the guest agent took {command} and did not answer it: {_why(err)}") from err
        if "error" in reply:
            error = reply["error"]
            text = error.get("desc", "") if isinstance(error, dict) else ""
            raise AgentRefused(f"the guest agent refused {command}: {text or 'no reason given'!s:.300}")
        if "return" not in reply:  # no refusal: it may well have done it
            raise AgentTimeout(f"the agent's answer to {command} is invalid")
        return reply["return"]

    def _synchronise(self) -> None:
        """Begin a conversation: everything the channel still holds from earlier ones is thrown away.

        The second try is preceded by 0xFF, which ends whatever half a line a client that died may have
        left with the agent.
        """
        deadline = self._deadline()
        try:
            try:
                self._sync_once(b"", deadline - self._timeout / 2)
            except TimeoutError:
                self._sync_once(_DELIMITER, deadline)
        except (OSError, EOFError, ValueError) as err:
            raise AgentUnavailable(f"the guest agent does not answer: {_why(err)}") from err
        self._in_step = True

    def _sync_once(self, before: bytes, deadline: float) -> None:
        mark = int.from_bytes(os.urandom(4), "big") >> 1
        message = {"execute": "guest-sync-delimited", "arguments": {"id": mark}}
        self._send(before + _line(message), deadline)
        while True:
            self._skip_to_delimiter(deadline)
            if self._reply(deadline) == {"return": mark}:
                return

    def _exchange(self, message: dict[str, Any], deadline: float) -> dict[str, Any]:
        self.log("-> %s", message["execute"])
        self._send(_line(message), deadline)
        reply = self._reply(deadline)
        self.log("<- %.200s", reply)
        return reply

    def _send(self, content: bytes, deadline: float) -> None:
        self._socket.settimeout(_left(deadline))
        self._socket.sendall(content)

    def _reply(self, deadline: float) -> dict[str, Any]:
        try:
            reply = json.loads(self._take_through(b"\n", deadline))
        except RecursionError as err:
            raise ValueError("nested too deep") from err
        if not isinstance(reply, dict):
            raise ValueError("not an object")  # noqa: TRY004 - the caller asks for one kind
        return reply

    def _skip_to_delimiter(self, deadline: float) -> None:
        # Stale output may be of any length; it is thrown away as it comes.
        while _DELIMITER not in self._received:
            self._received = b""
            self._receive(deadline)
        self._received = self._received.partition(_DELIMITER)[2]

    def _take_through(self, end: bytes, deadline: float) -> bytes:
        while end not in self._received:
            if len(self._received) > MAX_REPLY_BYTES:
                raise ValueError("an endless line")
            self._receive(deadline)
        found, _, self._received = self._received.partition(end)
        return found

    def _receive(self, deadline: float) -> None:
        self._socket.settimeout(_left(deadline))
        content = self._socket.recv(65536)
        if not content:
            raise EOFError
        self._received += content

    def _deadline(self, seconds: float | None = None) -> float:
        deadline = time.monotonic() + (self._timeout if seconds is None else seconds)
        return deadline if self.until is None else min(deadline, self.until)


def thaw_for_sure(thaw: Callable[[], int], freeze_status: Callable[[], str]) -> Thaw:
    """Thaw a guest, and ask whether it is. Raises AgentError if it isn't, or if that is not known.

    A refusal alone says nothing: on Windows VSS lets go by itself after 10 s, and refuses the thaw that comes
    then.
    """
    count, refusal = 0, None
    try:
        count = thaw()
    except AgentRefused as err:
        refusal = err
    if freeze_status() != "thawed":
        raise refusal or AgentTimeout("the guest is still frozen after a thaw")
    return Thaw(count, refusal.message if refusal else "")


def thaw_if_frozen(address: Address, timeout_seconds: float) -> bool:
    """Thaw a guest that is frozen; whether it was. Raises AgentError.

    It takes five time-outs at most: to connect, to synchronise, for a status, the thaw, and the status again.
    """
    with Agent.connect(address, timeout_seconds) as agent:
        if agent.freeze_status() == "thawed":
            return False
        agent.thaw_for_sure()
        return True


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _why(err: Exception) -> str:
    if isinstance(err, TimeoutError):
        return "time-out"
    if isinstance(err, EOFError):
        return "it hung up"
    if isinstance(err, OSError):
        return err.strerror or "the connection failed"
    return "it sends garbage"
