# SPDX-License-Identifier: GPL-2.0-or-later
"""What a well-behaved client (libnbd) sees of an export: flags, extents, bytes, all in comparable form."""

from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import nbd
import numpy as np

BLOCK = 4096
HAZY = -1
_ASK_BYTES = 1 << 20


def look(socket: Path, export: str, contexts: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return size, flags, contexts, extents per context and the bytes (as runs) of an export.

    An error of libnbd becomes {"refused": errno}.
    """
    handle = nbd.NBD()
    for context in ("base:allocation", *contexts):
        handle.add_meta_context(context)
    handle.set_export_name(export)
    try:
        handle.connect_unix(str(socket))
    except nbd.Error as error:
        return {"refused": error.errno}
    try:
        return _flags(handle) | _extents(handle) | {"bytes": runs(read(handle))}
    finally:
        handle.shutdown()


def _flags(handle: nbd.NBD) -> dict[str, Any]:
    names = (
        "is_read_only",
        "can_multi_conn",
        "can_flush",
        "can_trim",
        "can_zero",
        "can_fua",
        "can_cache",
        "can_df",
    )
    sizes = {"minimum": nbd.SIZE_MINIMUM, "preferred": nbd.SIZE_PREFERRED, "maximum": nbd.SIZE_MAXIMUM}
    return {
        "size": handle.get_size(),
        "flags": {name: bool(getattr(handle, name)()) for name in names},
        "block": {name: handle.get_block_size(number) for name, number in sizes.items()},
        "structured": bool(handle.get_structured_replies_negotiated()),
    }


def _extents(handle: nbd.NBD) -> dict[str, Any]:
    found: dict[str, list[list[int]]] = {}
    offset, size = 0, handle.get_size()
    while offset < size:
        asked = min(_ASK_BYTES, size - offset)
        answers: dict[str, list[list[int]]] = {}
        handle.block_status(asked, offset, lambda *answer, answers=answers: _keep(answers, *answer))
        # Each context may answer for less or more than was asked; go on where the shortest one ended.
        offset = min(offset + asked, *(extents[-1][0] + extents[-1][1] for extents in answers.values()))
        for context, extents in answers.items():
            for start, length, flags in _clipped(extents, offset):
                _append(found.setdefault(context, []), start, length, flags)
    return {"extents": found}


def _keep(
    answers: dict[str, list[list[int]]], context: str, start: int, entries: list[int], _error: int
) -> int:
    extents = answers.setdefault(context, [])
    for length, flags in zip(entries[::2], entries[1::2], strict=True):
        _append(extents, start, length, flags)
        start += length
    return 0


def _append(extents: list[list[int]], start: int, length: int, flags: int) -> None:
    if extents and extents[-1][2] == flags and extents[-1][0] + extents[-1][1] == start:
        extents[-1][1] += length
    else:
        extents.append([start, length, flags])


def _clipped(extents: list[list[int]], end: int) -> list[list[int]]:
    return [[start, min(length, end - start), flags] for start, length, flags in extents if start < end]


def hazed(extents: list[list[int]], blocks: AbstractSet[int]) -> list[list[int]]:
    """Return extents with HAZY in place of the flags of some blocks, each of BLOCK bytes."""
    found: list[list[int]] = []
    for start, length, flags in extents:
        at, end = start, start + length
        while at < end:
            block = at // BLOCK
            stop = min(end, (block + 1) * BLOCK)
            _append(found, at, stop - at, HAZY if block in blocks else flags)
            at = stop
    return found


def read(handle: nbd.NBD) -> bytes:
    """Return the whole content of an export."""
    size = handle.get_size()
    return b"".join(bytes(handle.pread(min(_ASK_BYTES, size - at), at)) for at in range(0, size, _ASK_BYTES))


def runs(data: bytes) -> list[list[int]]:
    """Return content as [offset, length, byte] runs; the tests write patterns, so there are few."""
    if not data:
        return []
    content = np.frombuffer(data, dtype=np.uint8)
    starts = [0, *(np.flatnonzero(np.diff(content)) + 1).tolist()]
    ends = [*starts[1:], len(data)]
    return [[start, end - start, data[start]] for start, end in zip(starts, ends, strict=True)]
