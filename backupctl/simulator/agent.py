# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest agent: qemu-ga's protocol on a unix socket (qga/qapi-schema.json of QEMU)."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backupctl.simulator import fault_actions
from backupctl.simulator.channel import Channel, ListeningSocket
from backupctl.simulator.failure import CommandError
from backupctl.simulator.machine import Machine

SENTINEL = b"\xff"
WHILE_FROZEN = (
    "guest-ping",
    "guest-info",
    "guest-sync",
    "guest-sync-delimited",
    "guest-fsfreeze-status",
    "guest-fsfreeze-thaw",
)
MAX_LINE_BYTES = 1 << 20


class Agent:
    """The agent of the machine that runs now (a restart makes a new one)."""

    def __init__(self, path: Path, machine: Callable[[], Machine]) -> None:
        self._machine = machine
        self.listener = ListeningSocket(path, self._serve)
        self._commands: dict[str, Callable[[dict[str, Any]], Any]] = {
            "guest-ping": lambda _: {},
            "guest-sync": _identity,
            "guest-sync-delimited": _identity,
            "guest-info": self._info,
            "guest-fsfreeze-status": lambda _: "frozen" if self._machine().guest.frozen else "thawed",
            "guest-fsfreeze-freeze": lambda _: self._freeze(frozen=True),
            "guest-fsfreeze-freeze-list": lambda _: self._freeze(frozen=True),
            "guest-fsfreeze-thaw": lambda _: self._freeze(frozen=False),
        }

    async def _serve(self, channel: Channel) -> None:
        text = b""
        while True:
            data, _ = await channel.receive()
            text += data
            while b"\n" in text:
                line, _, text = text.partition(b"\n")
                # The byte 0xFF flushes an incomplete message that another client may have left.
                await self._handle(channel, line.rpartition(SENTINEL)[2])
            if len(text) > MAX_LINE_BYTES:
                text = b""

    async def _handle(self, channel: Channel, line: bytes) -> None:
        if not line.strip():
            return
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            channel.post(_refusal("JSON parse error"))
            return
        if not isinstance(message, dict) or not isinstance(message.get("execute"), str):
            channel.post(_refusal("QMP input lacks member 'execute'"))
            return
        fault = self._machine().faults.command("agent", message["execute"])
        if fault is None:
            channel.post(self._do(message))
            return
        end = self._machine().power.end
        await fault_actions.carry_out(fault, lambda: self._do(message), _refusal, _reply, channel.post, end)

    def _do(self, message: dict[str, Any]) -> bytes:
        name, given = message["execute"], message.get("arguments", {})
        try:
            self._check(name)
            _refuse_surplus(name, given)
            value = self._commands[name](given if isinstance(given, dict) else {})
        except CommandError as err:
            return _refusal(str(err), err.kind)
        return (SENTINEL if name == "guest-sync-delimited" else b"") + _reply(value)

    def _check(self, name: str) -> None:
        if name not in self._commands:
            raise CommandError(f"The command {name} has not been found", "CommandNotFound")
        if self._machine().guest.frozen and name not in WHILE_FROZEN:
            text = f"Command {name} has been disabled: the agent is in frozen state"
            raise CommandError(text, "CommandNotFound")

    def _info(self, _given: dict[str, Any]) -> dict[str, Any]:
        names = [{"name": name, "enabled": True, "success-response": True} for name in self._commands]
        return {"version": ".".join(map(str, self._machine().settings.version)), "supported_commands": names}

    def _freeze(self, *, frozen: bool) -> int:
        guest = self._machine().guest
        changed = guest.frozen != frozen
        guest.frozen = frozen
        if changed:
            (guest.freezes if frozen else guest.thaws).append(time.time())
        writable = [spec for spec in self._machine().settings.disks if not spec.read_only]
        return len(writable) if changed else 0


def _refuse_surplus(name: str, given: object) -> None:
    known = {
        "guest-sync": {"id"},
        "guest-sync-delimited": {"id"},
        "guest-fsfreeze-freeze-list": {"mountpoints"},
    }
    for argument in given if isinstance(given, dict) else ():
        if argument not in known.get(name, set()):
            raise CommandError(f"Parameter '{argument}' is unexpected")


def _identity(given: dict[str, Any]) -> int:
    if not isinstance(given.get("id"), int):
        raise CommandError("Parameter 'id' is missing")
    return int(given["id"])


def _refusal(text: str, kind: str = "GenericError") -> bytes:
    return _line({"error": {"class": kind, "desc": text}})


def _reply(value: object) -> bytes:
    return _line({"return": value})


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
