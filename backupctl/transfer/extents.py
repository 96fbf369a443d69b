# SPDX-License-Identifier: GPL-2.0-or-later
"""From NBD block status to extents to copy.

A reply may be shaped in any of these ways; each is legal, in each context on its own:

::

    asked      |---------------|
    exact      |====|==========|
    short      |====|===|               less than asked: ask again from there
    long       |====|===========|==|    the last extent reaches beyond: clip it

Only what ALL contexts cover is known. So: clip to what was asked, intersect the contexts, and ask again
for the rest. A reply without progress, an extent of length 0, and an extent after one that already reaches
beyond what was asked violate the protocol.

Extents may begin and end anywhere, also within a cluster. Here they are bytes; `cluster_map` (what is to be
copied) and `read_layer` (what a layer stores) turn them into clusters. Both keep one rule: a cluster is zero
only if all of it is. Zero in part is data.

Dirty and zero are two questions: a dirty extent that reads as zeroes must be stored as zeroes, or the
old data would come back at restore.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

DIRTY = 1  # qemu:dirty-bitmap:X, NBD_STATE_DIRTY
ZERO = 2  # base:allocation, NBD_STATE_ZERO

MAX_QUESTION_BYTES = 1 << 30
"""Lengths are 32 bits on the wire (libnbd 1.14 has no block_status_64)."""


MAX_SHORT_REPLIES = 10_000
"""This many replies in a row may each describe less than a cluster; a server that sends more never ends."""
_SHORT_BYTES = 65536


class BadReply(ValueError):
    """The block status reply violates the protocol."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of a disk, in bytes. zero: it reads as zeroes."""

    offset: int
    length: int
    zero: bool

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class Status:
    """A range with the flags of each of the contexts that were asked for, in their order."""

    offset: int
    length: int
    flags: tuple[int, ...]


Ask = Callable[[int, int], dict[str, list[int]]]
"""`Connection.block_status`."""


def query_extents(ask: Ask, size: int, contexts: tuple[str, ...], start: int = 0) -> Iterator[Status]:
    """Yield the block status from `start` to `size`, asking as often as needed. Raises BadReply."""
    offset = start
    short = 0
    while offset < size:
        begun = offset
        asked = min(size - offset, MAX_QUESTION_BYTES)
        reply = ask(offset, asked)
        missing = [context for context in contexts if context not in reply]
        if missing:
            raise BadReply(f"no block status for the context {missing[0]}")
        for status in intersect(offset, asked, [reply[context] for context in contexts]):
            yield status
            offset = status.offset + status.length
        short = short + 1 if offset - begun < min(asked, _SHORT_BYTES) else 0
        if short > MAX_SHORT_REPLIES:
            raise BadReply("too many short replies in a row")


def intersect(offset: int, asked: int, replies: list[list[int]]) -> list[Status]:
    """Return what all replies to one question cover, with the flags of each.

    replies: length, flags, length, flags, ... of each context. Raises BadReply.
    """
    runs = [iter(clip(asked, reply)) for reply in replies]
    heads = [next(run) for run in runs]
    found: list[Status] = []
    # One step for each edge: a fragmented disk gives some hundred thousand of them in one reply.
    while True:
        length = min(left for left, _ in heads)
        found.append(Status(offset, length, tuple(flags for _, flags in heads)))
        offset += length
        for number, (left, flags) in enumerate(heads):
            head = (left - length, flags) if left > length else next(runs[number], None)
            if head is None:
                return found
            heads[number] = head


def clip(asked: int, reply: list[int]) -> list[tuple[int, int]]:
    """Return one context's (length, flags), cut at what was asked. Raises BadReply."""
    if not reply or len(reply) % 2:
        raise BadReply("an empty block status reply")
    found = []
    left = asked
    for length, flags in zip(reply[::2], reply[1::2], strict=True):
        if length <= 0:
            raise BadReply("an extent of length 0")
        if left <= 0:
            raise BadReply("an extent beyond the range that was asked for")
        found.append((min(length, left), flags))
        left -= length
    return found


def split(extent: Extent, most: int) -> Iterator[Extent]:
    """Cut an extent at the multiples of `most` bytes, so that all but the ends are whole clusters."""
    offset = extent.offset
    while offset < extent.end:
        length = min(extent.end, offset - offset % most + most) - offset
        yield Extent(offset, length, extent.zero)
        offset += length
