# SPDX-License-Identifier: GPL-2.0-or-later
"""A monitor client that hides nothing: it sees raw replies, events in order, and sends descriptors."""

import json
import socket
import time
from pathlib import Path
from typing import Any, Self

TIMEOUT_SECONDS = 60.0


class MonitorClosed(Exception):
    """The other side closed the monitor."""


class Monitor:
    """A connection to a QMP unix socket. events: every event so far, oldest first."""

    def __init__(self, path: Path, timeout: float = TIMEOUT_SECONDS) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout)
        self._timeout = timeout
        self._pending = b""
        self.events: list[dict[str, Any]] = []
        self._socket.connect(str(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave; QEMU keeps all that was made through this monitor."""
        self._socket.close()

    def receive(self, seconds: float | None = None) -> dict[str, Any]:
        """Return the next message. Raises MonitorClosed, TimeoutError."""
        end = time.monotonic() + (self._timeout if seconds is None else seconds)
        while b"\n" not in self._pending:
            self._socket.settimeout(max(end - time.monotonic(), 0.001))
            try:
                received = self._socket.recv(1 << 20)
            except ConnectionResetError:
                received = b""
            if not received:
                raise MonitorClosed
            self._pending += received
        line, _, self._pending = self._pending.partition(b"\n")
        return json.loads(line)

    def reply(self) -> dict[str, Any]:
        """Return the next message that is no event. Raises MonitorClosed, TimeoutError."""
        while "event" in (message := self.receive()):
            self.events.append(message)
        return message

    def send(self, data: bytes, fd: int | None = None) -> None:
        """Send bytes as they are, with a descriptor if one is given."""
        self._socket.settimeout(self._timeout)
        if fd is None:
            self._socket.sendall(data)
        else:
            socket.send_fds(self._socket, [data], [fd])

    def execute(
        self, command: str, arguments: dict[str, Any] | None = None, fd: int | None = None
    ) -> dict[str, Any]:
        """Send a command, and a descriptor with it, and return the whole reply."""
        message = {"execute": command} | ({"arguments": arguments} if arguments else {})
        self.send(json.dumps(message).encode() + b"\n", fd)
        return self.reply()

    def await_event(self, name: str, **data: Any) -> dict[str, Any]:
        """Return the newest event of that name and data, waiting for it if it has not come yet."""
        while not (found := [e for e in self.events if matches(e, name, data)]):
            message = self.receive()
            if "event" not in message:
                raise AssertionError(f"a reply that nobody asked for: {message}")
            self.events.append(message)
        return found[-1]


def matches(event: dict[str, Any], name: str, data: dict[str, Any]) -> bool:
    """Whether an event has that name and, among its data, those members."""
    return event["event"] == name and data.items() <= event.get("data", {}).items()
