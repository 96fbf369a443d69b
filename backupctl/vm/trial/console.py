# SPDX-License-Identifier: GPL-2.0-or-later
"""The serial console of a throw-away VM: what the guest writes there, kept within bounds."""

import socket
from contextlib import suppress

_HEAD_BYTES, _TAIL_BYTES = 128 << 10, 384 << 10
_PIECE_BYTES = 1 << 16
_MOST_PIECES = 64  # a guest that writes without end must not keep us from looking at the clock
_OMITTED = b"\n[...]\n"


class Console:
    """Our end of the console. Never waits. Of much output the beginning and the end are kept."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._connection.setblocking(False)
        self._head = b""
        self._tail = b""
        self._shortened = False

    def read(self) -> None:
        """Take in what there is."""
        with suppress(OSError):
            for _ in range(_MOST_PIECES):
                piece = self._connection.recv(_PIECE_BYTES)
                if not piece:
                    return
                self._add(piece)

    def _add(self, piece: bytes) -> None:
        left = _HEAD_BYTES - len(self._head)
        self._head += piece[:left]
        self._tail += piece[left:] if left < len(piece) else b""
        if len(self._tail) > _TAIL_BYTES:
            self._tail, self._shortened = self._tail[-_TAIL_BYTES:], True

    @property
    def content(self) -> bytes:
        """What the guest wrote."""
        return self._head + (_OMITTED if self._shortened else b"") + self._tail

    def shows(self, text: str) -> bool:
        """Whether a text is in the last lines, whatever the case of its letters."""
        end = (self._head + self._tail)[-_PIECE_BYTES:]
        return text.encode().lower() in end.lower()

    def last_line(self) -> str:
        """Return the last line that holds anything; "" if there is none."""
        lines = self.content[-4096:].decode(errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")[:200]
