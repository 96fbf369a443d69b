# SPDX-License-Identifier: GPL-2.0-or-later
"""An NBD server that lies: no byte of it is guessed, the run ends in bounds, and nothing is lost."""

import struct
from collections.abc import Callable, Iterable

import pytest

from tests.hostile import nbd
from tests.hostile.conftest import SIZE
from tests.hostile.nbd import LyingServer, Said, chunk, reply, silence, status_chunk

ESCAPES = "\x1b[2J\x1b[31mred\r\n\u202egnp".encode()
CONTEXT = 1


def forever(part: bytes) -> Iterable[bytes]:
    while True:
        yield part


class Greeting(LyingServer):
    """Greets as it was told to."""

    def __init__(self, size: int, say: Callable[[], Said]) -> None:
        super().__init__(size)
        self._say = say

    def greeting(self) -> Said:
        return self._say()


GREETINGS = {
    "silence": silence,
    "nothing": lambda: b"",
    "half a word": lambda: b"NBDMAGIC",
    "another protocol": lambda: b"SSH-2.0-OpenSSH_9.2\r\n" * 10,
    "old style": lambda: b"NBDMAGIC" + struct.pack(">QQI", 0x420281861253, SIZE, 0) + bytes(124),
    "old style without an end": lambda: b"NBDMAGIC" + struct.pack(">QQI", 0x420281861253, 1 << 63, 0),
    "zeroes for ever": lambda: forever(bytes(65536)),
    "escapes": lambda: ESCAPES * 20,
}


@pytest.mark.parametrize("name", GREETINGS)
def test_what_does_not_greet_as_an_nbd_server_is_a_read_error(victim, name):
    done = victim.attack(nbd=Greeting(SIZE, GREETINGS[name]))
    assert (done.code, done.error["kind"]) == (1, "ReadFailed"), done
    victim.recovers()


class Refusing(LyingServer):
    def go(self) -> Said:
        return reply(nbd.GO, 0x80000006, ESCAPES)


class RefusingAtLength(LyingServer):
    def go(self) -> Said:
        return reply(nbd.GO, 0x80000006, b"x" * 1_000_000)


class WithoutSize(LyingServer):
    def go(self) -> Said:
        return reply(nbd.GO, nbd.ACK)


class WithoutContexts(LyingServer):
    def agreed(self, names: list[bytes]) -> Said:
        return reply(nbd.SET_META_CONTEXT, nbd.ACK)


class WithTheDiskOnly(LyingServer):
    """Shows base:allocation, and no bitmap."""

    def agreed(self, names: list[bytes]) -> Said:
        return super().agreed(names[:1])


class WithContextsOfItsOwn(LyingServer):
    def agreed(self, names: list[bytes]) -> Said:
        return super().agreed([ESCAPES + name for name in names])


class WithOneNumberForAll(LyingServer):
    """Gives every context the same number."""

    def agreed(self, names: list[bytes]) -> Said:
        super().agreed(names)
        self.contexts = dict.fromkeys(names, 1)
        told = [reply(nbd.SET_META_CONTEXT, nbd.META_CONTEXT, struct.pack(">I", 1) + name) for name in names]
        return b"".join(told) + reply(nbd.SET_META_CONTEXT, nbd.ACK)


class WithContextsForEver(LyingServer):
    def agreed(self, names: list[bytes]) -> Said:
        one = reply(nbd.SET_META_CONTEXT, nbd.META_CONTEXT, struct.pack(">I", 9) + b"x" * 4000)
        return forever(one)


class AnotherMagic(LyingServer):
    def structured(self) -> Said:
        return bytes(20)


class NotStructured(LyingServer):
    def structured(self) -> Said:
        return reply(nbd.STRUCTURED_REPLY, 0x80000001)


HANDSHAKES = [
    *(Refusing, RefusingAtLength, WithoutSize, WithoutContexts, WithTheDiskOnly, WithContextsOfItsOwn),
    *(WithOneNumberForAll, WithContextsForEver, AnotherMagic, NotStructured),
]


@pytest.mark.parametrize("kind", HANDSHAKES)
def test_a_handshake_that_leads_nowhere_is_a_read_error(victim, kind):
    done = victim.attack(nbd=kind(SIZE))
    assert (done.code, done.error["kind"]) == (1, "ReadFailed"), done
    victim.recovers()


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *(("full", size) for size in (0, SIZE - 512)),
        *(("incremental", size) for size in (0, 1, SIZE - 65536, SIZE - 512, SIZE - 1, SIZE + 1, 1 << 63)),
    ],
)
def test_an_export_of_another_size_than_the_disk_is_a_read_error_and_no_short_image(victim, kind, size):
    done = victim.attack(kind, nbd=LyingServer(size))
    assert (done.code, done.error["kind"]) == (1, "ReadFailed"), done
    victim.recovers()


class Status(LyingServer):
    """Answers to block status with these extents, in every context."""

    told: list[tuple[int, int]]

    def extents(self, offset: int, length: int, flags: int) -> list[tuple[int, int]]:
        return self.told


def telling(*told: tuple[int, int]) -> type[Status]:
    return type("Status", (Status,), {"told": list(told)})


class Crumbs(LyingServer):
    """One byte for each question."""

    def extents(self, offset: int, length: int, flags: int) -> list[tuple[int, int]]:
        return [(1, flags)]


class Millions(LyingServer):
    """Tells each byte on its own."""

    def status(self, cookie: int, offset: int, length: int) -> Said:
        for number in self.contexts.values():
            told = struct.pack(">I", number) + struct.pack(">II", 1, 1) * length
            yield chunk(cookie, nbd.STATUS, told, done=number == len(self.contexts))


class OneContext(LyingServer):
    """Tells of the disk, never of the bitmap."""

    def status(self, cookie: int, offset: int, length: int) -> Said:
        return status_chunk(cookie, CONTEXT, [(length, 0)])


class StrangeContext(LyingServer):
    def status(self, cookie: int, offset: int, length: int) -> Said:
        return status_chunk(cookie, 4711, [(length, 0)])


class NoStatus(LyingServer):
    def status(self, cookie: int, offset: int, length: int) -> Said:
        return chunk(cookie, 0, b"")


class HalfAnExtent(LyingServer):
    def status(self, cookie: int, offset: int, length: int) -> Said:
        return chunk(cookie, nbd.STATUS, struct.pack(">IIH", CONTEXT, length, 0))


class StatusWithoutEnd(LyingServer):
    def status(self, cookie: int, offset: int, length: int) -> Said:
        return chunk(cookie, nbd.STATUS, struct.pack(">I", CONTEXT), length=0xFFFFFFFC)


class StatusAgainAndAgain(LyingServer):
    """Never says that the answer is complete."""

    def status(self, cookie: int, offset: int, length: int) -> Said:
        return forever(status_chunk(cookie, CONTEXT, [(length, 0)], done=False))


class SilentStatus(LyingServer):
    def status(self, cookie: int, offset: int, length: int) -> Said:
        return silence()


class ErrorOfEscapes(LyingServer):
    def status(self, cookie: int, offset: int, length: int) -> Said:
        return chunk(cookie, nbd.ERROR, struct.pack(">IH", 5, len(ESCAPES)) + ESCAPES)


class ErrorThatIsNone(LyingServer):
    def status(self, cookie: int, offset: int, length: int) -> Said:
        return chunk(cookie, nbd.ERROR, struct.pack(">IH", 0, 0))


STATUSES = {
    "an extent of no length": telling((0, 1), (SIZE, 1)),
    "only extents of no length": telling((0, 0)),
    "extents beyond what was asked": telling((SIZE, 1), (SIZE, 1)),
    "lengths that overflow": telling((0xFFFFFFFF, 1), (0xFFFFFFFF, 1)),
    "no extent": telling(),
    "crumbs": Crumbs,
    "one context": OneContext,
    "a strange context": StrangeContext,
    "no status": NoStatus,
    "half an extent": HalfAnExtent,
    "without end": StatusWithoutEnd,
    "again and again": StatusAgainAndAgain,
    "silence": SilentStatus,
    "an error of escapes": ErrorOfEscapes,
    "an error that is none": ErrorThatIsNone,
}


@pytest.mark.parametrize("name", STATUSES)
def test_block_status_that_can_not_be_is_a_read_error(victim, name):
    done = victim.attack(nbd=STATUSES[name](SIZE))
    assert (done.code, done.error["kind"]) == (1, "ReadFailed"), done
    victim.recovers()


class MostExtents(LyingServer):
    """As many extents as libnbd takes, of a length that Python has no ready number for."""

    def status(self, cookie: int, offset: int, length: int) -> Said:
        for number in self.contexts.values():
            told = struct.pack(">I", number) + struct.pack(">II", 4711, 1) * 8_000_000
            yield chunk(cookie, nbd.STATUS, told, done=number == len(self.contexts))


def test_millions_of_extents_are_not_kept(victim):
    done = victim.attack(nbd=Millions(SIZE), seconds=20.0)
    assert done.error["message"] == f"the NBD server sent {SIZE:,} extents in one reply", done
    victim.recovers()


def test_of_the_most_extents_no_more_is_kept_than_libnbd_hands_over_at_once(victim, monkeypatch):
    monkeypatch.setattr(victim, "most_resident", 600 << 20)  # libnbd's list of one context: 450 MiB
    done = victim.attack(nbd=MostExtents(SIZE), seconds=20.0)
    # Newer ones than Debian 12's libnbd refuse extents beyond what was asked for.
    assert done.error["message"].endswith(("sent 8,000,000 extents in one reply", "Protocol error")), done
    victim.recovers()


class HalfRead(LyingServer):
    """Sends half of what was asked for, and says that this was all."""

    def read(self, cookie: int, offset: int, length: int) -> Said:
        return super().read(cookie, offset, length // 2)


class NoRead(LyingServer):
    """Says that it is done, and sends nothing."""

    def read(self, cookie: int, offset: int, length: int) -> Said:
        return chunk(cookie, 0, b"")


class TooMuch(LyingServer):
    def read(self, cookie: int, offset: int, length: int) -> Said:
        return super().read(cookie, offset, length + 65536)


class Elsewhere(LyingServer):
    """Sends data of another place of the disk."""

    def read(self, cookie: int, offset: int, length: int) -> Said:
        return super().read(cookie, offset + SIZE, length)


class BeforeIt(LyingServer):
    def read(self, cookie: int, offset: int, length: int) -> Said:
        return chunk(cookie, nbd.OFFSET_DATA, struct.pack(">q", -length) + nbd.BYTE * length)


class NotAsked(LyingServer):
    """Answers a question that nobody asked."""

    def read(self, cookie: int, offset: int, length: int) -> Said:
        return super().read(cookie + 4711, offset, length)


class AgainAndAgain(LyingServer):
    def read(self, cookie: int, offset: int, length: int) -> Said:
        one = chunk(cookie, nbd.OFFSET_DATA, struct.pack(">Q", offset) + nbd.BYTE * 512, done=False)
        return forever(one)


class DropByDrop(LyingServer):
    """A byte now and then: the answer would take days."""

    def read(self, cookie: int, offset: int, length: int) -> Said:
        yield chunk(cookie, nbd.OFFSET_DATA, struct.pack(">Q", offset), length=8 + length)
        for nothing in silence():
            yield nothing + nbd.BYTE


class SilentRead(LyingServer):
    def read(self, cookie: int, offset: int, length: int) -> Said:
        return silence()


class Garbage(LyingServer):
    def read(self, cookie: int, offset: int, length: int) -> Said:
        return ESCAPES * 1000


class UnknownChunk(LyingServer):
    def read(self, cookie: int, offset: int, length: int) -> Said:
        return chunk(cookie, 0x7FFF, b"x" * 512)


class SimpleReply(LyingServer):
    """A simple reply, where structured ones were agreed on."""

    def read(self, cookie: int, offset: int, length: int) -> Said:
        return struct.pack(">IIQ", 0x67446698, 0, cookie) + nbd.BYTE * length


class HoleBeyond(LyingServer):
    def read(self, cookie: int, offset: int, length: int) -> Said:
        return chunk(cookie, 2, struct.pack(">QI", offset, 0xFFFFFFFF))


class ReadError(LyingServer):
    def read(self, cookie: int, offset: int, length: int) -> Said:
        return chunk(cookie, 0x8002, struct.pack(">IHQ", 5, 0, offset))


class HangUp(LyingServer):
    def read(self, cookie: int, offset: int, length: int) -> Said:
        raise EOFError


READS = [
    *(HalfRead, NoRead, TooMuch, Elsewhere, BeforeIt, NotAsked, AgainAndAgain, DropByDrop, SilentRead),
    *(Garbage, UnknownChunk, SimpleReply, HoleBeyond, ReadError, HangUp),
]


@pytest.mark.parametrize("kind", READS)
def test_data_that_can_not_be_is_a_read_error_and_never_zeroes(victim, kind):
    done = victim.attack(nbd=kind(SIZE))
    assert (done.code, done.error["kind"]) == (1, "ReadFailed"), done
    victim.recovers()


def test_the_server_without_its_lies_is_read_to_the_end(victim, tmp_path):
    """Else the cases above would prove nothing."""
    done = victim.attack("full", nbd=LyingServer(SIZE), seconds=None)
    assert done.code == 0, done
    assert victim.run("restore", "web", "--to", str(tmp_path / "vda.raw"), vm=False).code == 0
    assert (tmp_path / "vda.raw").read_bytes() == nbd.BYTE * SIZE
    victim.good("full")
