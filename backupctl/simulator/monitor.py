# SPDX-License-Identifier: GPL-2.0-or-later
"""The monitor: QMP as QEMU implements it, one client at a time (docs/interop/qmp-spec of QEMU)."""

import codecs
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backupctl.simulator import arguments, fault_actions
from backupctl.simulator.channel import Channel, ListeningSocket
from backupctl.simulator.commands import TABLE
from backupctl.simulator.commands.machine import version
from backupctl.simulator.failure import CommandError
from backupctl.simulator.machine import Machine

MAX_MESSAGE_BYTES = 64 << 20
_HEADS = ("execute", "exec-oob")


class Monitor:
    """One monitor socket.

    machine: returns the machine that runs now. on_left: called when the client has disconnected.
    """

    def __init__(self, path: Path, machine: Callable[[], Machine], on_left: Callable[[], None]) -> None:
        self._machine = machine
        self._on_left = on_left
        self._session: Session | None = None
        self.listener = ListeningSocket(path, self._serve)

    def send_event(self, event: dict[str, Any]) -> None:
        """Send an event to the client, if one has negotiated."""
        if self._session is not None and self._session.negotiated:
            self._session.post(event)

    @property
    def in_use(self) -> bool:
        """Whether a client is connected."""
        return self._session is not None

    async def _serve(self, channel: Channel) -> None:
        self._session = Session(channel, self._machine)
        try:
            await self._session.run()
        finally:
            self._session = None
            self._on_left()


class Session:
    """The session of one client."""

    def __init__(self, channel: Channel, machine: Callable[[], Machine]) -> None:
        self._channel = channel
        self._machine = machine
        self._oob = False
        self.negotiated = False

    def post(self, message: dict[str, Any]) -> None:
        """Send a message."""
        self._channel.post(_line(message))

    async def run(self) -> None:
        """Send the greeting, then serve until the client disconnects. Raises HangUp."""
        self.post({"QMP": {"version": version(self._machine()), "capabilities": ["oob"]}})
        text = ""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while True:
            data, fds = await self._channel.receive()
            for fd in fds:
                self._machine().receive_fd(fd)
            text += decoder.decode(data)
            while True:
                message, text = _next(text)
                if message is _INCOMPLETE:
                    break
                await self._handle(message)
            if len(text) > MAX_MESSAGE_BYTES:
                text = ""

    async def _handle(self, message: Any) -> None:
        try:
            name, given = self._parse(message)
        except CommandError as err:
            self.post(_error(err, message))
            return
        fault = self._machine().faults.command("qmp", name)
        if fault is None:
            self._channel.post(self._do(name, given, message))
            return
        await fault_actions.carry_out(
            fault,
            lambda: self._do(name, given, message),
            lambda text: _line(_error(CommandError(text), message)),
            lambda value: _line(_with_id({"return": value}, message)),
            self._channel.post,
            self._machine().power.end,
        )

    def _parse(self, message: Any) -> tuple[str, dict[str, Any]]:
        if isinstance(message, CommandError):
            raise message
        if not isinstance(message, dict):
            raise CommandError("QMP input must be a JSON object")
        heads = _HEADS if self._oob else _HEADS[:1]
        for member, value in message.items():
            if member in heads and not isinstance(value, str):
                raise CommandError(f"QMP input member '{member}' must be a string")
            if member == "arguments" and not isinstance(value, dict):
                raise CommandError("QMP input member 'arguments' must be an object")
            if member not in (*heads, "arguments", "id"):
                raise CommandError(f"QMP input member '{member}' is unexpected")
        named = [message[head] for head in heads if head in message]
        if len(named) != 1:
            raise CommandError("QMP input lacks member 'execute'")
        return named[0], message.get("arguments", {})

    def _refuse_out_of_band(self, name: str, message: dict[str, Any]) -> None:
        if "exec-oob" in message and name in TABLE:
            raise CommandError(f"The command {name} does not support OOB")

    def _do(self, name: str, given: dict[str, Any], message: dict[str, Any]) -> bytes:
        try:
            self._refuse_out_of_band(name, message)
            return _line(_with_id({"return": self._run(name, given)}, message))
        except CommandError as err:
            return _line(_error(err, message))

    def _run(self, name: str, given: dict[str, Any]) -> Any:
        if not self.negotiated:
            return self._negotiate(name, given)
        chosen = TABLE.get(name)
        if name == "qmp_capabilities":
            raise CommandError(
                "Capabilities negotiation is already complete, command ignored", "CommandNotFound"
            )
        if chosen is None:
            raise CommandError(f"The command {name} has not been found", "CommandNotFound")
        if chosen.form is not None:
            arguments.check(chosen.form, given)
        return chosen.run(self._machine(), given)

    def _negotiate(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        if name != "qmp_capabilities":
            raise CommandError(
                "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
            )
        arguments.check({"enable?": "list"}, given)
        for wanted in given.get("enable", []):
            if wanted != "oob":
                raise CommandError(f"Parameter 'null' does not accept value '{wanted}'")
        self._oob = "oob" in given.get("enable", [])
        self.negotiated = True
        return {}


_INCOMPLETE: Any = object()
_decoder = json.JSONDecoder()
_SURROGATE = re.compile("[\ud800-\udfff]")
# A word, number or escape at the end of the received text: more of it may follow.
_UNFINISHED = re.compile(r"\s*|[^\s{}\[\]:,\"]+")


def _next(text: str) -> tuple[Any, str]:
    """Split off the first message; an invalid one becomes an error, and the rest of its line is dropped."""
    text = text.lstrip()
    if not text:
        return _INCOMPLETE, ""
    try:
        message, end = _decoder.raw_decode(text)
        half = _SURROGATE.search(json.dumps(message, ensure_ascii=False))
    except json.JSONDecodeError as err:
        if err.msg.startswith("Unterminated string") or _UNFINISHED.fullmatch(text, err.pos):
            return _INCOMPLETE, text
        return _broken("expecting value"), text.partition("\n")[2]
    except (RecursionError, ValueError):  # too deep, or a number of too many digits
        return _broken("expecting value"), ""
    if half is not None:
        return _broken(f"\\u{ord(half[0]):x} is not a valid Unicode character"), text[end:]
    return message, text[end:]


def _broken(why: str) -> CommandError:
    return CommandError(f"JSON parse error, {why}")


def _error(err: CommandError, message: Any) -> dict[str, Any]:
    return _with_id({"error": {"class": err.kind, "desc": str(err)}}, message)


def _with_id(reply: dict[str, Any], message: Any) -> dict[str, Any]:
    return {**reply, "id": message["id"]} if isinstance(message, dict) and "id" in message else reply


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\r\n"
