# SPDX-License-Identifier: GPL-2.0-or-later
"""Option haggling, the first half of an NBD session, until the client chooses an export.

The NBD specification (doc/proto.md, "Fixed newstyle negotiation") calls it so:

    At this point, we move on to option haggling, during which point the client can send one or (in fixed
    newstyle) more options to the server.
"""

import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from backupctl.simulator.nbd import wire
from backupctl.simulator.nbd.export import BITMAP, Export
from backupctl.simulator.nbd.wire import Answer, Gone, Option, Peer

_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_INFO_EXPORT, _INFO_NAME, _INFO_DESCRIPTION, _INFO_BLOCK_SIZE = range(4)
_PREFERRED_BLOCK = 4096


class Malformed(Exception):
    """An option's data violate the protocol."""


@dataclass
class Choice:
    """What was negotiated. contexts: numbers of the meta contexts by name, set for export `contexts_of`."""

    export: Export | None = None
    structured: bool = False
    contexts: dict[str, int] = field(default_factory=dict)
    contexts_of: str = ""


class OptionHaggling:
    """Option haggling with one client."""

    def __init__(self, peer: Peer, exports: Mapping[str, Export]) -> None:
        self._peer = peer
        self._exports = exports
        self._no_zeroes = False
        self.choice = Choice()
        self._handlers: dict[int, Callable[[int, bytes], Awaitable[None]]] = {
            Option.LIST: self._list,
            Option.INFO: self._info,
            Option.GO: self._info,
            Option.STRUCTURED_REPLY: self._structured,
            Option.LIST_META_CONTEXT: self._contexts,
            Option.SET_META_CONTEXT: self._contexts,
            Option.STARTTLS: self._starttls,
        }

    async def run(self) -> Choice:
        """Haggle until an export is chosen. Raises Gone."""
        await self._peer.send(
            struct.pack(">QQH", wire.MAGIC, wire.OPTION_MAGIC, _FIXED_NEWSTYLE | _NO_ZEROES)
        )
        (flags,) = struct.unpack(">I", await self._peer.receive(4))
        if flags & ~(_FIXED_NEWSTYLE | _NO_ZEROES):
            raise Gone
        self._no_zeroes = bool(flags & _NO_ZEROES)
        fixed = bool(flags & _FIXED_NEWSTYLE)
        while self.choice.export is None:
            magic, option, length = wire.OPTION.unpack(await self._peer.receive(wire.OPTION.size))
            if magic != wire.OPTION_MAGIC or length > wire.MAX_REQUEST_BYTES:
                raise Gone
            if not fixed and option != Option.EXPORT_NAME:
                raise Gone  # the only option of plain newstyle, which has no error replies
            await self._handle(option, bytes(await self._peer.receive(length)))
        return self.choice

    async def _handle(self, option: int, data: bytes) -> None:
        if option == Option.ABORT:
            await self._answer(option, Answer.ACK)
            raise Gone
        if option == Option.EXPORT_NAME:
            await self._export_name(data)
            return
        handler = self._handlers.get(option)
        if handler is None:
            await self._answer(option, Answer.UNSUPPORTED, b"unknown option")
            return
        try:
            await handler(option, data)
        except Malformed as err:
            await self._answer(option, Answer.INVALID, str(err).encode())

    async def _answer(self, option: int, answer: Answer, data: bytes = b"") -> None:
        head = wire.OPTION_REPLY.pack(wire.OPTION_REPLY_MAGIC, option, answer, len(data))
        await self._peer.send(head + data)

    async def _export_name(self, data: bytes) -> None:
        export = self._exports.get(data.decode(errors="replace"))
        if export is None:
            raise Gone
        flags = export.flags(structured=self.choice.structured)
        padding = b"" if self._no_zeroes else bytes(124)
        await self._peer.send(struct.pack(">QH", export.node.size, flags) + padding)
        self._choose(export)

    async def _list(self, option: int, data: bytes) -> None:
        if data:
            raise Malformed("a list takes no data")
        for export in self._exports.values():
            name = export.name.encode()
            shown = struct.pack(">I", len(name)) + name + export.description.encode()
            await self._answer(option, Answer.SERVER, shown)
        await self._answer(option, Answer.ACK)

    async def _structured(self, option: int, data: bytes) -> None:
        if data or self.choice.structured:
            raise Malformed("structured replies take no data and are negotiated once")
        self.choice.structured = True
        await self._answer(option, Answer.ACK)

    async def _starttls(self, option: int, data: bytes) -> None:
        if data:
            raise Malformed("TLS takes no data")
        await self._answer(option, Answer.POLICY, b"TLS is not supported")

    async def _info(self, option: int, data: bytes) -> None:
        name, rest = _name(data)
        (count,) = _unpack(">H", rest)
        if len(rest) != 2 + 2 * count:
            raise Malformed("the count of requests is wrong")
        wanted = struct.unpack(f">{count}H", rest[2:])
        export = self._exports.get(name)
        if export is None:
            await self._answer(option, Answer.UNKNOWN, b"no such export")
            return
        for piece in self._pieces(export, wanted):
            await self._answer(option, Answer.INFO, piece)
        await self._answer(option, Answer.ACK)
        if option == Option.GO:
            self._choose(export)

    def _pieces(self, export: Export, wanted: tuple[int, ...]) -> list[bytes]:
        pieces = []
        if _INFO_NAME in wanted:
            pieces.append(struct.pack(">H", _INFO_NAME) + export.name.encode())
        if _INFO_DESCRIPTION in wanted and export.description:
            pieces.append(struct.pack(">H", _INFO_DESCRIPTION) + export.description.encode())
        pieces.append(struct.pack(">HIII", _INFO_BLOCK_SIZE, 1, _PREFERRED_BLOCK, wire.MAX_REQUEST_BYTES))
        flags = export.flags(structured=self.choice.structured)
        return [*pieces, struct.pack(">HQH", _INFO_EXPORT, export.node.size, flags)]

    async def _contexts(self, option: int, data: bytes) -> None:
        setting = option == Option.SET_META_CONTEXT
        if setting and not self.choice.structured:
            raise Malformed("meta contexts need structured replies")
        name, queries = _queries(data)
        if setting:
            self.choice.contexts = {}
        export = self._exports.get(name)
        if export is None:
            await self._answer(option, Answer.UNKNOWN, b"no such export")
            return
        found = _matching(export, queries, setting=setting)
        for context, number in found.items():
            shown = struct.pack(">I", number if setting else 0) + context.encode()
            await self._answer(option, Answer.META_CONTEXT, shown)
        if setting:
            self.choice.contexts, self.choice.contexts_of = found, name
        await self._answer(option, Answer.ACK)

    def _choose(self, export: Export) -> None:
        if self.choice.contexts_of != export.name:
            self.choice.contexts = {}
        self.choice.export = export


def _matching(export: Export, queries: list[str], *, setting: bool) -> dict[str, int]:
    if not setting and not queries:
        return dict(export.contexts)
    found = {context: number for context, number in export.contexts.items() if context in queries}
    if not setting:  # a list may ask for whole namespaces
        for family in ("base:", "qemu:", BITMAP):
            if family in queries:
                found |= {c: n for c, n in export.contexts.items() if c.startswith(family)}
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def _queries(data: bytes) -> tuple[str, list[str]]:
    name, rest = _name(data)
    (count,) = _unpack(">I", rest)
    rest = rest[4:]
    queries = []
    for _ in range(count):
        query, rest = _text(rest)
        queries.append(query)
    if rest:
        raise Malformed("more data than queries")
    return name, queries


def _name(data: bytes) -> tuple[str, bytes]:
    name, rest = _text(data)
    if len(data) - len(rest) - 4 > wire.MAX_NAME_BYTES:
        raise Malformed("a name is too long")
    return name, rest


def _text(data: bytes) -> tuple[str, bytes]:
    (length,) = _unpack(">I", data)
    if length > len(data) - 4:
        raise Malformed("a name is longer than its option")
    return data[4 : 4 + length].decode(errors="replace"), data[4 + length :]


def _unpack(form: str, data: bytes) -> tuple[int, ...]:
    try:
        return struct.unpack_from(form, data)
    except struct.error as err:
        raise Malformed("an option is cut short") from err
