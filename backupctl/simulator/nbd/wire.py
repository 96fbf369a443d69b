# SPDX-License-Identifier: GPL-2.0-or-later
"""Constants of the NBD protocol, and a socket that reads and writes whole messages."""

import asyncio
import errno
import socket
import struct
from enum import IntEnum, IntFlag

MAGIC = 0x4E42444D41474943
OPTION_MAGIC = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF
MAX_REQUEST_BYTES = 32 << 20
MAX_NAME_BYTES = 4096
REQUEST = struct.Struct(">IHHQQI")
CHUNK = struct.Struct(">IHHQI")
OPTION = struct.Struct(">QII")
OPTION_REPLY = struct.Struct(">QIII")


class Option(IntEnum):
    """Options, which a client sends before transmission."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Answer(IntEnum):
    """Replies to options."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    UNSUPPORTED = 0x80000001
    POLICY = 0x80000002
    INVALID = 0x80000003
    UNKNOWN = 0x80000006


class Command(IntEnum):
    """Requests."""

    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class RequestFlag(IntFlag):
    """Flags of requests."""

    FUA = 1
    NO_HOLE = 2
    DONT_FRAGMENT = 4
    REQUEST_ONE = 8
    FAST_ZERO = 16


class ExportFlag(IntFlag):
    """Flags of an export."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    FLUSH = 4
    FUA = 8
    TRIM = 32
    WRITE_ZEROES = 64
    DONT_FRAGMENT = 128
    MULTI_CONN = 256
    CACHE = 1024
    FAST_ZERO = 2048


class ChunkType(IntEnum):
    """Kinds of chunks of a structured reply."""

    NONE = 0
    DATA = 1
    HOLE = 2
    STATUS = 5
    ERROR = 0x8001


_ERRORS = {
    errno.EPERM,
    errno.EIO,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.EOVERFLOW,
    errno.ENOTSUP,
    errno.ESHUTDOWN,
}


def error_number(number: int | None) -> int:
    """Return NBD's number for an errno; EINVAL for those that NBD does not define, as in QEMU."""
    if number in (errno.EDQUOT, errno.EFBIG):
        return errno.ENOSPC
    return number if number in _ERRORS else errno.EINVAL


class Gone(Exception):
    """The connection was closed, by the client or by the server."""


class Dropped(Gone):
    """A fault closed the connection."""


class Peer:
    """A connected socket."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._loop = asyncio.get_running_loop()

    async def receive(self, length: int) -> bytearray:
        """Return exactly this many bytes. Raises Gone."""
        content = bytearray(length)
        view = memoryview(content)
        while view:
            try:
                got = await self._loop.sock_recv_into(self._socket, view)
            except OSError as err:
                raise Gone from err
            if not got:
                raise Gone
            view = view[got:]
        return content

    async def send(self, *parts: bytes | memoryview) -> None:
        """Send all of it. Raises Gone."""
        try:
            sent = self._send_some(parts)
            for part in parts:
                if sent < len(part):
                    await self._loop.sock_sendall(self._socket, memoryview(part)[sent:])
                sent = max(sent - len(part), 0)
        except OSError as err:
            raise Gone from err

    def close(self) -> None:
        """Disconnect; a task that waits for the socket gets `Gone`."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the client has already disconnected

    def release(self) -> None:
        """Close the descriptor; no task may wait for the socket any more."""
        self._socket.close()

    def _send_some(self, parts: tuple[bytes | memoryview, ...]) -> int:
        try:
            return self._socket.sendmsg(parts)
        except BlockingIOError:
            return 0
