# SPDX-License-Identifier: GPL-2.0-or-later
"""The content of a file as runs of neighbouring blocks, for file systems that store it like that."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

_PIECE_BYTES = 1 << 20


class Run(NamedTuple):
    """Neighbouring blocks of a file: its first block, where that is, and how many there are."""

    logical: int
    physical: int
    blocks: int


def content(
    runs: Iterable[Run], size: int, block_bytes: int, read: Callable[[int, int], bytes]
) -> Iterator[bytes | int]:
    """Yield the content of a file of `size` bytes in order: bytes, or the length of a hole.

    runs: ascending. read: reads bytes of the file system at an offset.
    """
    at = 0
    for run in runs:
        begin = min(run.logical * block_bytes, size)
        if begin > at:
            yield begin - at
        end = min((run.logical + run.blocks) * block_bytes, size)
        for offset in range(begin, end, _PIECE_BYTES):
            length = min(_PIECE_BYTES, end - offset)
            yield read(run.physical * block_bytes + offset - run.logical * block_bytes, length)
        at = max(at, end)
    if at < size:
        yield size - at
