# SPDX-License-Identifier: GPL-2.0-or-later
"""A picture (PNG) of rows of shares, in one colour that is more opaque the larger a share is."""

import base64
import struct
import zlib
from collections.abc import Sequence

_COLOUR = (47, 120, 200)
"""Of a contrast above 3:1 to a white and to a nearly black page, where it is opaque."""
_OPACITIES = (0, 95, 140, 190, 255)
"""Of the levels: nothing, up to a quarter, a half, three quarters, and more."""
_LEVELS = bytes(0 if not share else 1 + min(3, share // 64) for share in range(256))


def of(rows: Sequence[bytes], columns: int) -> bytes:
    """Return the file. rows: from the top, each of as many bytes as there are columns."""
    pixels = b"".join(b"\0" + row.translate(_LEVELS) for row in rows)
    head = struct.pack(">IIBBBBB", columns, len(rows), 8, 3, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (
            _chunk(b"IHDR", head),
            _chunk(b"PLTE", bytes(_COLOUR) * len(_OPACITIES)),
            _chunk(b"tRNS", bytes(_OPACITIES)),
            _chunk(b"IDAT", zlib.compress(pixels, 9)),
            _chunk(b"IEND", b""),
        )
    )


def data_url(rows: Sequence[bytes], columns: int) -> str:
    """Return the picture as a URL that contains it."""
    return f"data:image/png;base64,{base64.b64encode(of(rows, columns)).decode()}"


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
