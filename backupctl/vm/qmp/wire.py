# SPDX-License-Identifier: GPL-2.0-or-later
"""QMP as it goes over its socket: one JSON object a line. The guard imports this: only what loads quickly."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

_PIECE_BYTES = 1 << 18

Message = dict[str, Any]


class Wire:
    """One end of a conversation. most_bytes: of the longest line that is taken in.

    Each wait ends at its deadline, in the seconds of `time.monotonic`, whatever trickles in. What has come of
    a line by then is kept for the next call.
    """

    def __init__(self, connection: socket.socket, most_bytes: int) -> None:
        self._connection = connection
        self._most = most_bytes
        self._received = bytearray()
        self._looked = 0

    def send(self, message: Message, deadline: float) -> None:
        """Send a message. Raises OSError, TimeoutError."""
        self._connection.settimeout(_left(deadline))
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, deadline: float) -> Message:
        """Return the next message. Raises TimeoutError, EOFError, OSError; ValueError if it is none."""
        while (message := self._take()) is None:
            self._connection.settimeout(_left(deadline))
            self._add(self._connection.recv(_PIECE_BYTES))
        return message

    def at_hand(self) -> Iterator[Message]:
        """Yield what has arrived, but of a flood a little only. Never waits. Raises as `receive` does."""
        # With a time-out Python waits before each call, whatever its flags.
        self._connection.setblocking(False)
        with suppress(BlockingIOError):
            self._add(self._connection.recv(_PIECE_BYTES))
        while (message := self._take()) is not None:
            yield message

    @property
    def open(self) -> bool:
        """Whether the other side has not hung up."""
        self._connection.setblocking(False)
        try:
            return self._connection.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _take(self) -> Message | None:
        end = self._received.find(b"\n", self._looked)
        self._looked = len(self._received) if end < 0 else 0
        if max(end, self._looked) > self._most:
            raise ValueError("a line without end")
        if end < 0:
            return None
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return _parsed(line)

    def _add(self, content: bytes) -> None:
        if not content:
            raise EOFError
        self._received += content


def _parsed(line: bytes) -> Message:
    try:
        message = json.loads(line)
    except RecursionError as err:
        raise ValueError("nested too deep") from err
    if not isinstance(message, dict):
        raise ValueError("not an object")  # noqa: TRY004 - callers ask for one kind
    return message


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
