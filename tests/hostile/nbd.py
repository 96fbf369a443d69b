# SPDX-License-Identifier: GPL-2.0-or-later
"""An NBD server that lies: small, honest but for the parts that a test replaces.

It serves `size` bytes of 0x55, all of them dirty data. Numbers are those of doc/proto.md of the NBD project.
"""

import select
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

BYTE = b"\x55"
ACK, INFO, META_CONTEXT = 1, 3, 4
GO, STRUCTURED_REPLY, SET_META_CONTEXT = 7, 8, 10
READ, DISCONNECT, BLOCK_STATUS = 0, 2, 7
DONE, OFFSET_DATA, STATUS, ERROR = 1, 1, 5, 0x8001

Said = bytes | Iterable[bytes]


class LyingServer:
    """Serves every client of the sockets that it `take`s; a subclass overrides what is to be a lie."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.contexts: dict[bytes, int] = {}
        self._directory = tempfile.TemporaryDirectory(prefix="bc-nbd-")
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def take(self, descriptor: int) -> int:
        """Serve on a listening socket; return another one, on which nobody will call."""
        listener = socket.socket(fileno=descriptor)
        self._sockets.append(listener)
        self._run(self._accept, listener)
        other = socket.socket(socket.AF_UNIX)
        other.bind(str(Path(self._directory.name, str(len(self._sockets)))))
        other.listen(4)
        return other.detach()

    def close(self) -> None:
        """Hang up on everybody."""
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for sock in self._sockets:
            sock.close()
        self._directory.cleanup()

    # What may be lied about.

    def greeting(self) -> Said:
        return b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 3)

    def structured(self) -> Said:
        return reply(STRUCTURED_REPLY, ACK)

    def agreed(self, names: list[bytes]) -> Said:
        """Answer to the wish for meta contexts."""
        self.contexts = {name: number for number, name in enumerate(names, 1)}
        told = [
            reply(SET_META_CONTEXT, META_CONTEXT, struct.pack(">I", number) + name)
            for name, number in self.contexts.items()
        ]
        return b"".join(told) + reply(SET_META_CONTEXT, ACK)

    def go(self) -> Said:
        return reply(GO, INFO, struct.pack(">HQH", 0, self.size, 3)) + reply(GO, ACK)

    def status(self, cookie: int, offset: int, length: int) -> Said:
        """Answer to a question for block status, in all contexts."""
        told = b""
        for name, number in self.contexts.items():
            last = name == list(self.contexts)[-1]
            flags = 0 if name == b"base:allocation" else 1
            told += status_chunk(cookie, number, self.extents(offset, length, flags), done=last)
        return told

    def extents(self, offset: int, length: int, flags: int) -> list[tuple[int, int]]:
        return [(length, flags)]

    def read(self, cookie: int, offset: int, length: int) -> Said:
        return chunk(cookie, OFFSET_DATA, struct.pack(">Q", offset) + BYTE * length)

    # What is the same for all.

    def _run(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                self._sockets.append(client)
                self._run(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError, EOFError):
            say(client, self.greeting())
            exactly(client, 4)
            while self._option(client):
                pass
            while self._request(client):
                pass
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)

    def _option(self, client: socket.socket) -> bool:
        _, option, length = struct.unpack(">QII", exactly(client, 16))
        content = exactly(client, length)
        if option == STRUCTURED_REPLY:
            say(client, self.structured())
        elif option == SET_META_CONTEXT:
            say(client, self.agreed(_queries(content)))
        elif option == GO:
            say(client, self.go())
            return False
        else:
            say(client, reply(option, 0x80000001))
        return True

    def _request(self, client: socket.socket) -> bool:
        _, _, command, cookie, offset, length = struct.unpack(">IHHQQI", exactly(client, 28))
        if command == READ:
            say(client, self.read(cookie, offset, length))
        elif command == BLOCK_STATUS:
            say(client, self.status(cookie, offset, length))
        return command != DISCONNECT


def reply(option: int, kind: int, content: bytes = b"") -> bytes:
    """Return a reply to an option."""
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(content)) + content


def chunk(cookie: int, kind: int, content: bytes, *, done: bool = True, length: int | None = None) -> bytes:
    """Return a chunk of a structured reply; its length may be a lie."""
    said = len(content) if length is None else length
    return struct.pack(">IHHQI", 0x668E33EF, DONE if done else 0, kind, cookie, said) + content


def status_chunk(cookie: int, context: int, extents: list[tuple[int, int]], *, done: bool = True) -> bytes:
    """Return the block status of one context."""
    content = struct.pack(">I", context) + b"".join(struct.pack(">II", *one) for one in extents)
    return chunk(cookie, STATUS, content, done=done)


def silence(seconds: float = 30.0) -> Iterable[bytes]:
    """Say nothing for a while."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.05)
        yield b""


def say(client: socket.socket, said: Said) -> None:
    for part in [said] if isinstance(said, bytes) else said:
        if not part and hung_up(client):
            raise EOFError
        client.sendall(part)


def hung_up(client: socket.socket) -> bool:
    """Whether the client, or `close`, has ended the conversation."""
    waiting = select.poll()
    waiting.register(client, 0)
    return bool(waiting.poll(0))


def exactly(client: socket.socket, length: int) -> bytes:
    content = b""
    while len(content) < length:
        part = client.recv(length - len(content))
        if not part:
            raise EOFError
        content += part
    return content


def _queries(content: bytes) -> list[bytes]:
    at = 4 + struct.unpack_from(">I", content)[0]
    (count,) = struct.unpack_from(">I", content, at)
    at += 4
    found = []
    for _ in range(count):
        (length,) = struct.unpack_from(">I", content, at)
        found.append(content[at + 4 : at + 4 + length])
        at += 4 + length
    return found
