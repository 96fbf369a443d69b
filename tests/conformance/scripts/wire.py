# SPDX-License-Identifier: GPL-2.0-or-later
"""Malformed and unusual NBD: what the server answers to raw bytes."""

import struct

from tests.conformance.nbdwire import COMMANDS, OPTIONS, contexts, named
from tests.conformance.session import Session, script


def served(s: Session, node: str = "drive-vda") -> None:
    """Leave an export `disk` of a disk that has some data."""
    s.subject.write("vda", 1, 0, 65536)
    s.serve()
    s.export(node, name="disk")


@script()
def the_greeting_of_the_server(s: Session) -> None:
    served(s)
    with s.wire() as wire:
        s.note("greeting", wire.handshake())
        s.note("abort", wire.option(OPTIONS["ABORT"]))


@script()
def client_flags_that_nobody_knows(s: Session) -> None:
    served(s)
    with s.wire() as wire:
        wire.handshake(flags=0xF0)
        s.note("list", wire.option(OPTIONS["LIST"]))


@script()
def a_client_of_before_fixed_newstyle_may_only_name_its_export(s: Session) -> None:
    served(s)
    for option in ("LIST", "ABORT", "GO"):
        with s.wire() as wire:
            wire.handshake(flags=0)
            s.note(option, wire.option(OPTIONS[option]))
    with s.wire() as wire:
        wire.handshake(flags=0)
        s.note("export name", wire.export_name("disk", padded=True))
        s.note("read", wire.request(COMMANDS["READ"], 0, 512))


@script()
def list_tells_the_exports(s: Session) -> None:
    served(s)
    with s.wire() as wire:
        wire.handshake()
        s.note("list", wire.option(OPTIONS["LIST"]))
        s.note("list with data", wire.option(OPTIONS["LIST"], b"x"))


@script()
def info_and_go(s: Session) -> None:
    served(s)
    with s.wire() as wire:
        wire.handshake()
        s.note("info", wire.option(OPTIONS["INFO"], named("disk")))
        s.note("info with all", wire.option(OPTIONS["INFO"], named("disk", 1, 2, 3, 77)))
        s.note("info absent", wire.option(OPTIONS["INFO"], named("absent")))
        s.note("info name too long", wire.option(OPTIONS["INFO"], named("n" * 4097)))
        s.note("info short", wire.option(OPTIONS["INFO"], b"\0\0"))
        s.note("info name too long for its option", wire.option(OPTIONS["INFO"], struct.pack(">IH", 99, 0)))
        s.note("go absent", wire.option(OPTIONS["GO"], named("absent")))
        s.note("go", wire.option(OPTIONS["GO"], named("disk")))


@script()
def options_that_nobody_knows(s: Session) -> None:
    served(s)
    with s.wire() as wire:
        wire.handshake()
        s.note("unknown", wire.option(99))
        s.note("unknown with data", wire.option(99, b"payload"))
        s.note("starttls", wire.option(OPTIONS["STARTTLS"]))
        s.note("structured with data", wire.option(OPTIONS["STRUCTURED_REPLY"], b"x"))
        s.note("structured", wire.option(OPTIONS["STRUCTURED_REPLY"]))
        s.note("structured again", wire.option(OPTIONS["STRUCTURED_REPLY"]))


@script()
def an_option_with_a_wrong_magic_number(s: Session) -> None:
    served(s)
    with s.wire() as wire:
        wire.handshake()
        s.note("wrong magic", wire.option(OPTIONS["LIST"], magic=0x1122334455667788))


@script()
def an_option_too_large(s: Session) -> None:
    served(s)
    with s.wire() as wire:
        wire.handshake()
        s.note("too large", wire.option(OPTIONS["GO"], length=0x7FFFFFFF))


@script()
def export_name_of_an_unknown_export(s: Session) -> None:
    served(s)
    with s.wire() as wire:
        wire.handshake()
        s.note("export name", wire.option(OPTIONS["EXPORT_NAME"], b"absent"))


@script()
def meta_contexts_need_structured_replies(s: Session) -> None:
    served(s)
    with s.wire() as wire:
        wire.handshake()
        s.note("set", wire.option(OPTIONS["SET_META_CONTEXT"], contexts("disk", "base:allocation")))
        s.note("list", wire.option(OPTIONS["LIST_META_CONTEXT"], contexts("disk")))


@script()
def meta_contexts(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vda", name="b0", disabled=True)
    s.serve()
    s.export("drive-vda", name="disk", bitmaps=["b0"])
    with s.wire() as wire:
        wire.handshake()
        wire.option(OPTIONS["STRUCTURED_REPLY"])
        for queries in (
            (),
            ("base:",),
            ("qemu:",),
            ("qemu:dirty-bitmap:",),
            ("nonsense:x",),
            ("base:allocation", "qemu:dirty-bitmap:b0"),
        ):
            s.note(f"list {queries}", wire.option(OPTIONS["LIST_META_CONTEXT"], contexts("disk", *queries)))
            s.note(f"set {queries}", wire.option(OPTIONS["SET_META_CONTEXT"], contexts("disk", *queries)))
        s.note(
            "of an absent export",
            wire.option(OPTIONS["SET_META_CONTEXT"], contexts("absent", "base:allocation")),
        )
        s.note(
            "cut short", wire.option(OPTIONS["SET_META_CONTEXT"], contexts("disk", "base:allocation")[:-3])
        )


@script()
def reads_at_and_beyond_the_end(s: Session) -> None:
    served(s)
    with s.wire() as wire:
        wire.handshake()
        wire.go("disk")
        for offset, length in (
            (0, 512),
            (0, 0),
            (4194304 - 512, 512),
            (4194304 - 256, 512),
            (4194304, 512),
            (1 << 62, 512),
        ):
            s.note(f"read {offset} {length}", wire.request(COMMANDS["READ"], offset, length, flags=4))


@script()
def requests_that_are_too_large(s: Session) -> None:
    served(s)
    with s.wire() as wire:
        wire.handshake()
        wire.go("disk")
        s.note("read 64 MiB", wire.request(COMMANDS["READ"], 0, 64 << 20))
        s.note("read goes on", wire.request(COMMANDS["READ"], 0, 512, flags=4))
        s.note("write 64 MiB", wire.request(COMMANDS["WRITE"], 0, 64 << 20))
        s.note("no further", wire.request(COMMANDS["READ"], 0, 512, flags=4))


@script()
def writing_to_a_read_only_export(s: Session) -> None:
    served(s)
    with s.wire() as wire:
        wire.handshake()
        wire.go("disk")
        s.note("write", wire.request(COMMANDS["WRITE"], 0, 512, payload=bytes(512)))
        s.note("zero", wire.request(COMMANDS["WRITE_ZEROES"], 0, 512))
        s.note("trim", wire.request(COMMANDS["TRIM"], 0, 512))
        s.note("flush", wire.request(COMMANDS["FLUSH"]))
        s.note("read goes on", wire.request(COMMANDS["READ"], 0, 512, flags=4))


@script()
def requests_that_nobody_knows(s: Session) -> None:
    served(s)
    with s.wire() as wire:
        wire.handshake()
        wire.go("disk")
        s.note("unknown command", wire.request(77))
        s.note("unknown flag", wire.request(COMMANDS["READ"], 0, 512, flags=0x4000))
        s.note("block status without a context", wire.request(COMMANDS["BLOCK_STATUS"], 0, 512))
        s.note("read goes on", wire.request(COMMANDS["READ"], 0, 512, flags=4))


@script()
def a_request_with_a_wrong_magic_number(s: Session) -> None:
    served(s)
    with s.wire() as wire:
        wire.handshake()
        wire.go("disk")
        s.note("wrong magic", wire.request(COMMANDS["READ"], 0, 512, magic=0xDEADBEEF))
        s.note("no further", wire.request(COMMANDS["READ"], 0, 512, flags=4))


@script()
def block_status_by_hand(s: Session) -> None:
    served(s)
    with s.wire() as wire:
        wire.handshake()
        wire.option(OPTIONS["STRUCTURED_REPLY"])
        wire.option(OPTIONS["SET_META_CONTEXT"], contexts("disk", "base:allocation"))
        wire.go("disk", structured=False)
        for flags, offset, length in (
            (0, 0, 4194304),
            (8, 0, 4194304),
            (0, 32768, 65536),
            (0, 0, 0),
            (0, 4194304, 512),
        ):
            # The context's number is the server's to choose: only one is asked for, so drop it.
            replies = wire.request(COMMANDS["BLOCK_STATUS"], offset, length, flags=flags)
            s.note(f"status {flags} {offset} {length}", [_without_context_id(reply) for reply in replies])


def _without_context_id(reply: object) -> object:
    if isinstance(reply, tuple) and reply[0] == "BLOCK_STATUS":
        return reply[0], reply[1][0][8:]
    return reply


@script()
def simple_replies_for_a_plain_client(s: Session) -> None:
    s.scratch(backing=None)
    s.serve()
    s.export("tmp0", name="disk", writable=True)
    with s.wire() as wire:
        wire.handshake()
        s.note("go", wire.go("disk", structured=False))
        s.note("write", wire.request(COMMANDS["WRITE"], 0, 512, payload=b"x" * 512))
        for offset, length in ((0, 512), (0, 65536), (65536, 512), (1000, 200000)):
            s.note("zero fast", wire.request(COMMANDS["WRITE_ZEROES"], offset, length, flags=16))
            wire.request(COMMANDS["WRITE"], 0, 512, payload=b"x" * 512)
        s.note("write beyond the end", wire.request(COMMANDS["WRITE"], 4194304, 512, payload=b"x" * 512))
        s.note("zero", wire.request(COMMANDS["WRITE_ZEROES"], 0, 65536))
        s.note("trim", wire.request(COMMANDS["TRIM"], 65536, 65536))
        s.note("flush", wire.request(COMMANDS["FLUSH"]))
        s.note("read beyond the end", wire.request(COMMANDS["READ"], 4194304, 512))
