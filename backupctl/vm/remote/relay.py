# SPDX-License-Identifier: GPL-2.0-or-later
"""On the remote host: what passes the bytes between a socket that ssh forwards and one of QEMU's.

QEMU's side of an NBD connection outlives the forwarded side. On an iothread QEMU 7.2 aborts when an NBD
client leaves before its export has gone, so a line that is cut must not end the client: the guard has a
duplicate of QEMU's side, drains it, and lets go of it after the export. A client whose handshake has not
ended must leave, though, before the NBD server is stopped (see `vm.guest.handshake`). The guard cannot see
which it is, since the relay has read what the server said, so the relay itself follows the handshake.
"""

import socket
import struct
import threading
from contextlib import suppress

_BYTES = 1 << 18
_GREETING_BYTES = 18
_REPLY = struct.Struct(">QIII")
_REPLY_MAGIC, _OPT_GO, _REP_ACK = 0x3E889045565A9, 7, 1
"""Of NBD's protocol (doc/proto.md): what the server says before transmission begins."""


class HandshakeReader:
    """Reads what an NBD server says until its reply to NBD_OPT_GO. ended: whether that has come."""

    def __init__(self) -> None:
        self.ended = False
        self._kept = bytearray()
        self._skip = _GREETING_BYTES
        self._last = False

    def read(self, content: bytes) -> None:
        """Take in the next bytes."""
        self._kept += b"" if self.ended else content
        while not self.ended:
            passed = min(self._skip, len(self._kept))
            del self._kept[:passed]
            self._skip -= passed
            if self._last and not self._skip:
                self.ended = True
            if self._skip or len(self._kept) < _REPLY.size:
                return
            magic, option, kind, length = _REPLY.unpack_from(self._kept)
            self._last = magic == _REPLY_MAGIC and option == _OPT_GO and kind == _REP_ACK
            self._skip = _REPLY.size + length


class Relay:
    """Two threads between two connected sockets; `close` ends them.

    outlives: whether QEMU's side stays open, and what it sends is thrown away, when the other side has ended.
    """

    def __init__(self, forwarded: socket.socket, qemu: socket.socket, *, outlives: bool) -> None:
        self.forwarded = forwarded
        self.qemu = qemu
        self._outlives = outlives
        self._handshake = HandshakeReader()
        self._threads = [
            threading.Thread(target=self._to_qemu, daemon=True),
            threading.Thread(target=self._from_qemu, daemon=True),
        ]
        for one in self._threads:
            one.start()

    @property
    def in_handshake(self) -> bool:
        """Whether an NBD server has not ended the handshake yet."""
        return not self._handshake.ended

    def hear_no_more(self) -> None:
        """Pass on nothing more of what the forwarded side says. Never raises."""
        with suppress(OSError):
            self.forwarded.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Close both sides. Never raises."""
        for one in (self.qemu, self.forwarded):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(1.0)
        self.qemu.close()
        self.forwarded.close()

    def _to_qemu(self) -> None:
        with suppress(OSError):
            while content := self.forwarded.recv(_BYTES):
                self.qemu.sendall(content)
        if not self._outlives:
            with suppress(OSError):
                self.qemu.shutdown(socket.SHUT_RDWR)

    def _from_qemu(self) -> None:
        there = True
        with suppress(OSError):
            while content := self.qemu.recv(_BYTES):
                if self._outlives:
                    self._handshake.read(content)
                there = there and self._forward(content)
        with suppress(OSError):
            self.forwarded.shutdown(socket.SHUT_RDWR)

    def _forward(self, content: bytes) -> bool:
        try:
            self.forwarded.sendall(content)
        except OSError:
            return False
        return True
