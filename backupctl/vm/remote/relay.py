# SPDX-License-Identifier: GPL-2.0-or-later
"""On the remote host: what passes the bytes between a socket that ssh forwards and one of QEMU's.

QEMU's side of an NBD connection outlives the forwarded side. On an iothread QEMU 7.2 aborts when an NBD
client leaves before its export has gone, so a line that is cut must not end the client: the guard has a
duplicate of QEMU's side, drains it, and lets go of it after the export.
"""

import socket
import threading
from contextlib import suppress

_BYTES = 1 << 18


class Relay:
    """Two threads between two connected sockets; `close` ends them.

    outlives: whether QEMU's side stays open, and what it sends is thrown away, when the other side has ended.
    """

    def __init__(self, forwarded: socket.socket, qemu: socket.socket, *, outlives: bool) -> None:
        self.forwarded = forwarded
        self.qemu = qemu
        self._outlives = outlives
        self._threads = [
            threading.Thread(target=self._to_qemu, daemon=True),
            threading.Thread(target=self._from_qemu, daemon=True),
        ]
        for one in self._threads:
            one.start()

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
                there = there and self._forward(content)
        with suppress(OSError):
            self.forwarded.shutdown(socket.SHUT_RDWR)

    def _forward(self, content: bytes) -> bool:
        try:
            self.forwarded.sendall(content)
        except OSError:
            return False
        return True
