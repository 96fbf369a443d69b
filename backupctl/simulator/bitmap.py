# SPDX-License-Identifier: GPL-2.0-or-later
"""Hierarchical bitmaps with the structure of QEMU's HBitmap (util/hbitmap.c).

Seven levels of 64-bit words; a bit of one level says whether a word of the next one has any bit set.
For 1 TiB at 64 KiB that is 16,777,216 bits in 1, 1, 1, 1, 64, 4096 and 262144 words. Empty parts are
skipped 64 words at a time, and a merge is an `or` of the levels.
"""

from collections.abc import Iterator
from typing import Self

import numpy as np
import numpy.typing as npt

LEVELS = 7
WORD_BITS = 64
_ONES = (1 << WORD_BITS) - 1
_CHUNK_WORDS = 4096

Words = npt.NDArray[np.uint64]


class HierarchicalBitmap:
    """`bits` bits, all clear at first."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.levels: list[Words] = [np.zeros(words, np.uint64) for words in _level_sizes(bits)]

    @property
    def leaves(self) -> Words:
        """The lowest level: bit n of the bitmap is bit n % 64 of word n // 64."""
        return self.levels[-1]

    def set(self, start: int, length: int) -> None:
        """Set bits."""
        first, last = start, start + length - 1
        for words in reversed(self.levels):
            if last < first:
                return
            _fill(words, first, last)
            first, last = first // WORD_BITS, last // WORD_BITS

    def clear(self) -> None:
        """Clear all bits."""
        self.levels = [np.zeros(len(words), np.uint64) for words in self.levels]

    def get(self, bit: int) -> bool:
        """Whether a bit is set."""
        return bool(int(self.leaves[bit // WORD_BITS]) >> (bit % WORD_BITS) & 1)

    def count(self) -> int:
        """Return the number of bits that are set."""
        return int(np.bitwise_count(self.leaves).sum(dtype=np.int64))

    def next_set(self, start: int, end: int | None = None) -> int | None:
        """Return the first set bit in [start, end), None if there is none."""
        end = self.bits if end is None else end
        if start >= end:
            return None
        found = self._next(LEVELS - 1, start)
        return found if found is not None and found < end else None

    def next_clear(self, start: int, end: int | None = None) -> int | None:
        """Return the first clear bit in [start, end), None if there is none."""
        end = self.bits if end is None else end
        for begin, words in self._chunks(start, end):
            bits = np.unpackbits(words.view(np.uint8), bitorder="little")
            skip = max(start - begin, 0)
            clear = int(np.argmin(bits[skip:]))
            if not bits[skip + clear]:
                found = begin + skip + clear
                return found if found < end else None
        return None

    def next_area(self, start: int, end: int | None = None) -> tuple[int, int] | None:
        """Return the first run of set bits in [start, end) as (start, length), None if there is none."""
        end = self.bits if end is None else end
        first = self.next_set(start, end)
        if first is None:
            return None
        after = self.next_clear(first, end)
        return first, (end if after is None else after) - first

    def areas(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield all runs of set bits in [start, end) as (start, length), clipped to it."""
        end = self.bits if end is None else end
        while (area := self.next_area(start, end)) is not None:
            yield area
            start = sum(area)

    def merge(self, other: "HierarchicalBitmap") -> None:
        """Set the bits that are set in `other`. Raises ValueError unless it has as many bits."""
        if other.bits != self.bits:
            raise ValueError("bitmaps of different length")
        for mine, theirs in zip(self.levels, other.levels, strict=True):
            np.bitwise_or(mine, theirs, out=mine)

    def copy(self) -> Self:
        """Return an independent copy."""
        made = type(self)(0)
        made.bits = self.bits
        made.levels = [words.copy() for words in self.levels]
        return made

    def resize(self, bits: int) -> None:
        """Grow it by clear bits, or shrink it."""
        kept = self.copy()
        self.bits = bits
        self.levels = [np.zeros(words, np.uint64) for words in _level_sizes(bits)]
        for start, length in kept.areas(0, min(bits, kept.bits)):
            self.set(start, length)

    def load(self, leaves: Words) -> None:
        """Load a lowest level of the same length, and make the others from it."""
        self.levels[-1] = leaves.astype(np.uint64)
        for level in range(LEVELS - 2, -1, -1):
            full = np.zeros(len(self.levels[level]) * WORD_BITS, np.uint8)
            full[: len(self.levels[level + 1])] = self.levels[level + 1] != 0
            self.levels[level] = np.packbits(full, bitorder="little").view(np.uint64).copy()

    def _next(self, level: int, start: int) -> int | None:
        """Return the first set bit of a level from `start` on, found through the levels above."""
        words = self.levels[level]
        word = start // WORD_BITS
        if word >= len(words):
            return None
        rest = int(words[word]) >> (start % WORD_BITS)
        if rest:
            return start + _lowest(rest)
        if level == 0:
            return None
        above = self._next(level - 1, word + 1)
        return None if above is None else above * WORD_BITS + _lowest(int(words[above]))

    def _chunks(self, start: int, end: int) -> Iterator[tuple[int, Words]]:
        for word in range(start // WORD_BITS, -(-end // WORD_BITS), _CHUNK_WORDS):
            yield word * WORD_BITS, self.leaves[word : word + _CHUNK_WORDS]


def _level_sizes(bits: int) -> list[int]:
    sizes = []
    for _ in range(LEVELS):
        bits = max(-(-bits // WORD_BITS), 1)
        sizes.append(bits)
    return sizes[::-1]


def _masks(first: int, last: int) -> tuple[int, int, int, int]:
    low = _ONES << (first % WORD_BITS) & _ONES
    high = _ONES >> (WORD_BITS - 1 - last % WORD_BITS)
    return first // WORD_BITS, last // WORD_BITS, low, high


def _fill(words: Words, first: int, last: int) -> None:
    begin, end, low, high = _masks(first, last)
    if begin == end:
        words[begin] |= np.uint64(low & high)
        return
    words[begin] |= np.uint64(low)
    words[begin + 1 : end] = _ONES
    words[end] |= np.uint64(high)


def _lowest(word: int) -> int:
    return (word & -word).bit_length() - 1
