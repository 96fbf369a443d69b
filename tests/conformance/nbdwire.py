# SPDX-License-Identifier: GPL-2.0-or-later
"""NBD by hand, for what no well-behaved client would send: options and requests as raw bytes.

Numbers and names are those of the protocol's specification (doc/proto.md of the NBD project).
"""

import socket
import struct
from pathlib import Path
from typing import Any, Self

IHAVEOPT = 0x49484156454F5054
REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
OPTIONS = {"EXPORT_NAME": 1, "ABORT": 2, "LIST": 3, "STARTTLS": 5, "INFO": 6, "GO": 7, "STRUCTURED_REPLY": 8}
OPTIONS |= {"LIST_META_CONTEXT": 9, "SET_META_CONTEXT": 10}
COMMANDS = {
    "READ": 0,
    "WRITE": 1,
    "DISC": 2,
    "FLUSH": 3,
    "TRIM": 4,
    "CACHE": 5,
    "WRITE_ZEROES": 6,
    "BLOCK_STATUS": 7,
}
_REPLIES = {1: "ACK", 2: "SERVER", 3: "INFO", 4: "META_CONTEXT"}
_REFUSALS = (
    "UNSUP",
    "POLICY",
    "INVALID",
    "PLATFORM",
    "TLS_REQD",
    "UNKNOWN",
    "SHUTDOWN",
    "BLOCK_SIZE_REQD",
    "TOO_BIG",
)
_REPLIES |= {0x80000001 + number: f"ERR_{name}" for number, name in enumerate(_REFUSALS)}
_CHUNKS = {
    0: "NONE",
    1: "OFFSET_DATA",
    2: "OFFSET_HOLE",
    5: "BLOCK_STATUS",
    0x8001: "ERROR",
    0x8002: "ERROR_OFFSET",
}
_ERRORS = {
    0: "OK",
    1: "EPERM",
    5: "EIO",
    12: "ENOMEM",
    22: "EINVAL",
    28: "ENOSPC",
    75: "EOVERFLOW",
    95: "ENOTSUP",
}
CLOSED = "connection closed"


class Wire:
    """A raw connection to an NBD server on a unix socket."""

    def __init__(self, path: Path, timeout: float = 60.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout)
        self._socket.connect(str(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def handshake(self, flags: int = 3) -> dict[str, Any]:
        """Read the server's greeting, answer with the client's flags."""
        first, second, offered = struct.unpack(">QQH", self._exactly(18))
        self.send(struct.pack(">I", flags))
        return {"magic": f"{first:#x} {second:#x}", "flags": offered}

    def option(
        self, code: int, data: bytes = b"", *, magic: int = IHAVEOPT, length: int | None = None
    ) -> list[Any]:
        """Haggle over one option; return the replies up to the one that ends it."""
        self.send(struct.pack(">QII", magic, code, len(data) if length is None else length) + data)
        replies: list[Any] = []
        while True:
            try:
                replies.append(self._option_reply())
            except EOFError:
                return [*replies, CLOSED]
            if replies[-1][0] not in ("SERVER", "INFO", "META_CONTEXT"):
                return replies

    def _option_reply(self) -> tuple[str, str]:
        magic, _, kind, length = struct.unpack(">QIII", self._exactly(20))
        payload = self._exactly(length)
        assert magic == REPLY_MAGIC, f"not an option reply: {magic:#x}"
        # The text of a refusal is for people and free to change.
        shown = "" if kind & 0x80000000 else payload.hex()
        if _REPLIES.get(kind) == "META_CONTEXT":
            shown = payload[4:].decode()  # the number before the name is the server's to choose
        return _REPLIES.get(kind, hex(kind)), shown

    def go(self, export: str, *, structured: bool = True) -> list[Any]:
        """Enter transmission on an export."""
        if structured:
            assert self.option(OPTIONS["STRUCTURED_REPLY"]) == [("ACK", "")]
        return self.option(OPTIONS["GO"], named(export))

    def export_name(self, export: str, *, padded: bool) -> str:
        """Enter transmission in the oldest way; return what the server tells of the export."""
        self.send(struct.pack(">QII", IHAVEOPT, OPTIONS["EXPORT_NAME"], len(export)) + export.encode())
        return self._exactly(134 if padded else 10).hex()

    def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes = b"",
        magic: int = REQUEST_MAGIC,
    ) -> list[Any]:
        """Send one request; return its chunks, each (kind, error or size)."""
        self.send(struct.pack(">IHHQQI", magic, flags, command, 7, offset, length) + payload)
        chunks: list[Any] = []
        try:
            while not chunks or not chunks[-1][-1]:
                chunks.append(self._chunk(length))
        except (EOFError, ConnectionResetError):
            return [*(chunk[:-1] for chunk in chunks), CLOSED]
        return [chunk[:-1] for chunk in chunks]

    def _chunk(self, read_length: int) -> tuple[str, Any, bool]:
        magic = struct.unpack(">I", self._exactly(4))[0]
        if magic == 0x67446698:
            error, cookie = struct.unpack(">IQ", self._exactly(12))
            return "simple", (_ERRORS.get(error, error), cookie), True
        assert magic == 0x668E33EF, f"not a reply: {magic:#x}"
        flags, kind, cookie, length = struct.unpack(">HHQI", self._exactly(16))
        payload = self._exactly(length)
        shown: Any = length
        if kind & 0x8000:
            number = struct.unpack(">I", payload[:4])[0]
            shown = _ERRORS.get(number, number)
        elif kind == 5:
            shown = payload.hex()
        elif kind == 1:
            assert length <= read_length + 8, "more data than was asked for"
        return _CHUNKS.get(kind, hex(kind)), (shown, cookie), bool(flags & 1)

    def send(self, data: bytes) -> None:
        """Send bytes as they are; a server that has hung up shows in the next reply."""
        try:
            self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return

    def _exactly(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            try:
                received = self._socket.recv(length - len(data))
            except ConnectionResetError:
                received = b""
            if not received:
                raise EOFError
            data += received
        return data


def named(export: str, *wanted: int) -> bytes:
    """Return the data of GO or INFO: the export's name, then the pieces of information asked for."""
    name = export.encode()
    return struct.pack(">I", len(name)) + name + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)


def contexts(export: str, *queries: str) -> bytes:
    """Return the data of LIST_META_CONTEXT or SET_META_CONTEXT."""
    name = export.encode()
    data = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
    return data + b"".join(struct.pack(">I", len(q.encode())) + q.encode() for q in queries)
