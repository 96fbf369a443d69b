# SPDX-License-Identifier: GPL-2.0-or-later
"""A disk as a map of characters, each shaded by the share of its clusters that is marked."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCKS = "·░▒▓█"
ASCII = ".-+*#"
"""From nothing marked to (nearly) all of it."""


@dataclass(frozen=True)
class Row:
    """A row of the map. first: its first cluster. shades: 0 (nothing) to 4, of each character."""

    first: int
    shades: tuple[int, ...]


@dataclass(frozen=True)
class Picture:
    """A whole disk. clusters_each: how many clusters a character stands for, a power of two."""

    clusters_each: int
    rows: tuple[Row, ...]


def draw(marked: NDArray[np.bool_], columns: int, most_rows: int) -> Picture:
    """Draw one flag for each cluster. A single marked cluster shows, however large the disk is."""
    each = 1
    while each * columns * most_rows < len(marked):
        each *= 2
    shades = _shades(marked, each)
    rows = (
        Row(start * each, tuple(shades[start : start + columns].tolist()))
        for start in range(0, len(shades), columns)
    )
    return Picture(each, tuple(rows))


def _shades(marked: NDArray[np.bool_], each: int) -> NDArray[np.int64]:
    padded = np.zeros(-(-len(marked) // each) * each, np.bool_)
    padded[: len(marked)] = marked
    found = np.count_nonzero(padded.reshape(-1, each), axis=1)
    there = np.full(len(found), each)
    if len(there):
        there[-1] = len(marked) - (len(there) - 1) * each
    return np.where(found == 0, 0, np.minimum(1 + 4 * found // there, 4))
