# SPDX-License-Identifier: GPL-2.0-or-later
"""Transmission, the second half of an NBD session: requests to the chosen export, one after the other."""

import asyncio
import errno
import itertools
import struct
from dataclasses import dataclass
from typing import NoReturn

from backupctl.simulator.faults import Faults, Stream
from backupctl.simulator.nbd import wire
from backupctl.simulator.nbd.option_haggling import Choice
from backupctl.simulator.nbd.wire import ChunkType, Command, Dropped, Gone, Peer, RequestFlag
from backupctl.simulator.nodes import Extent, joined

MAX_EXTENTS = 0x20000
_DONE = 1
_ALLOWED = {
    Command.READ: RequestFlag.DONT_FRAGMENT | RequestFlag.FUA,
    Command.WRITE: RequestFlag.FUA,
    Command.FLUSH: RequestFlag.FUA,
    Command.TRIM: RequestFlag.FUA,
    Command.CACHE: RequestFlag.FUA,
    Command.WRITE_ZEROES: RequestFlag.FUA | RequestFlag.NO_HOLE | RequestFlag.FAST_ZERO,
    Command.BLOCK_STATUS: RequestFlag.REQUEST_ONE | RequestFlag.FUA,
}


@dataclass
class Request:
    """One request."""

    flags: RequestFlag
    command: int
    cookie: int
    offset: int
    length: int


class Conversation:
    """Requests and replies of one client."""

    def __init__(self, peer: Peer, choice: Choice, faults: Faults) -> None:
        assert choice.export is not None
        self._peer = peer
        self._export = choice.export
        self._structured = choice.structured
        self._contexts = choice.contexts
        self._faults = faults
        self._buffer = bytearray()

    async def run(self) -> None:
        """Serve until the client disconnects. Raises Gone."""
        while True:
            magic, flags, command, cookie, offset, length = wire.REQUEST.unpack(
                await self._peer.receive(wire.REQUEST.size)
            )
            if magic == wire.REQUEST_MAGIC and command == Command.DISCONNECT:
                return
            request = Request(RequestFlag(flags), command, cookie, offset, length)
            if magic != wire.REQUEST_MAGIC:
                await self._break(request, "wrong magic number")
            payload = await self._payload(request)
            try:
                self._check(request)
                await self._do(request, payload)
            except OSError as err:
                await self._fail(request, err)

    async def _payload(self, request: Request) -> bytearray:
        if request.command != Command.WRITE:
            return bytearray()
        if request.length > wire.MAX_REQUEST_BYTES:
            await self._break(request, "too large")  # nobody wants to skip that much
        return await self._peer.receive(request.length)

    async def _break(self, request: Request, why: str) -> NoReturn:
        """Answer and disconnect: it is unknown where the next request begins. Raises Gone."""
        await self._fail(request, OSError(errno.EINVAL, why))
        raise Gone

    def _check(self, request: Request) -> None:
        allowed = _ALLOWED.get(Command(request.command)) if request.command in list(Command) else None
        if allowed is None or int(request.flags) & ~int(allowed):
            raise OSError(errno.EINVAL, "unknown command or flag")
        changes = request.command in (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)
        if changes and not self._export.writable:
            raise OSError(errno.EINVAL, "the export is read-only")
        if request.offset + request.length > self._export.node.size:
            raise OSError(errno.EINVAL, "beyond the end")
        if request.command == Command.READ and request.length > wire.MAX_REQUEST_BYTES:
            raise OSError(errno.EINVAL, "too large")

    async def _do(self, request: Request, payload: bytearray) -> None:
        node = self._export.node
        match request.command:
            case Command.READ:
                await self._read(request)
                return
            case Command.BLOCK_STATUS:
                await self._status(request)
                return
            case Command.WRITE:
                node.write(request.offset, payload)
            case Command.WRITE_ZEROES:
                if request.flags & RequestFlag.FAST_ZERO and not node.zeroes_fast(
                    request.offset, request.length
                ):
                    raise OSError(errno.ENOTSUP, "not faster than a write")
                node.zero(request.offset, request.length)
            case Command.TRIM:
                node.discard(request.offset, request.length)
        await self._simple(request, 0)

    async def _read(self, request: Request) -> None:
        self._faults.check_nbd("read", request.offset, request.length)
        if self._structured and not request.flags & RequestFlag.DONT_FRAGMENT and request.length:
            await self._read_in_pieces(request)
            return
        content = self._content(request.offset, request.length)
        if not self._structured:
            await self._send_data(struct.pack(">IIQ", wire.SIMPLE_MAGIC, 0, request.cookie), content)
        elif not request.length:
            await self._chunk(request, ChunkType.NONE, b"", last=True)
        else:
            head = self._chunk_head(request, ChunkType.DATA, 8 + request.length, last=True)
            await self._send_data(head + struct.pack(">Q", request.offset), content)

    async def _read_in_pieces(self, request: Request) -> None:
        """Send data as data and holes as holes."""
        offset, end = request.offset, request.offset + request.length
        # All is read before the first piece is sent: a reply must not mix old and new content.
        pieces = list(joined(self._export.node.extents(offset, request.length)))
        content = self._content(offset, request.length, pieces)
        for length, flags in pieces:
            last = offset + length == end
            if flags & Extent.ZERO:
                await self._chunk(request, ChunkType.HOLE, struct.pack(">QI", offset, length), last=last)
            else:
                head = self._chunk_head(request, ChunkType.DATA, 8 + length, last=last)
                begin = offset - request.offset
                await self._send_data(head + struct.pack(">Q", offset), content[begin : begin + length])
            offset += length

    def _content(
        self, offset: int, length: int, pieces: list[tuple[int, Extent]] | None = None
    ) -> memoryview:
        """Read into this connection's buffer. Raises OSError."""
        if len(self._buffer) < length:
            self._buffer = bytearray(length)
        view = memoryview(self._buffer)[:length]
        at = 0
        for part, flags in pieces or joined(self._export.node.extents(offset, length)):
            piece = view[at : at + part]
            if flags & Extent.ZERO:
                piece[:] = bytes(part)
            else:
                self._export.node.read_into(offset + at, piece)
            at += part
        return view

    async def _send_data(self, head: bytes, content: memoryview) -> None:
        """Send a header and data, unless a fault says otherwise."""
        fault = self._faults.stream(len(content))
        match fault:
            case None:
                await self._peer.send(head, content)
            case Stream.STALL:
                await asyncio.Event().wait()
            case Stream.GARBAGE:
                await self._peer.send(b"\xa5" * (len(head) + len(content)))
            case Stream.SHORT:
                await self._peer.send(head, content[: len(content) // 2])
                raise Dropped
            case Stream.DROP:
                raise Dropped

    async def _status(self, request: Request) -> None:
        if not self._contexts or not request.length:
            raise OSError(errno.EINVAL, "no context, or nothing asked")
        self._faults.check_nbd("status", request.offset, request.length)
        most = 1 if request.flags & RequestFlag.REQUEST_ONE else MAX_EXTENTS
        numbers = list(self._contexts.values())
        payloads = []
        for number in numbers:
            extents = itertools.islice(self._export.extents(number, request.offset, request.length), most)
            payloads.append(
                struct.pack(">I", number) + b"".join(struct.pack(">II", *each) for each in extents)
            )
        for payload in payloads:
            await self._chunk(request, ChunkType.STATUS, payload, last=payload is payloads[-1])

    async def _simple(self, request: Request, error: int) -> None:
        await self._peer.send(struct.pack(">IIQ", wire.SIMPLE_MAGIC, error, request.cookie))

    async def _fail(self, request: Request, err: OSError) -> None:
        number = wire.error_number(err.errno)
        if not self._structured:
            await self._simple(request, number)
            return
        text = str(err.strerror or "").encode()
        await self._chunk(request, ChunkType.ERROR, struct.pack(">IH", number, len(text)) + text, last=True)

    async def _chunk(self, request: Request, kind: ChunkType, payload: bytes, *, last: bool) -> None:
        await self._peer.send(self._chunk_head(request, kind, len(payload), last=last) + payload)

    def _chunk_head(self, request: Request, kind: ChunkType, length: int, *, last: bool) -> bytes:
        return wire.CHUNK.pack(wire.CHUNK_MAGIC, _DONE if last else 0, kind, request.cookie, length)
