# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading what QEMU answers: a value of another type, or out of all bounds, is an error and never a guess.

What answers on a monitor's socket need not be QEMU, and what it says ends up in names, sizes and commands.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from backupctl.errors import MonitorError

MAX_NUMBER = (1 << 63) - 1


@contextmanager
def understood(what: str) -> Iterator[None]:
    """Raise MonitorError if the block finds that a reply is not made as it should be."""
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as err:
        raise MonitorError(f"QEMU's {what} is invalid: {err!r:.200}") from err


def number(value: object, most: int = MAX_NUMBER) -> int:
    """Return a whole number from 0 to `most`. Raises TypeError, ValueError."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r:.60} is no whole number")
    if not 0 <= value <= most:
        raise ValueError("a number is out of bounds")
    return value


def text(value: object, most: int = 255) -> str:
    """Return a text of one line, without control characters. Raises TypeError, ValueError."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} is no text")
    if len(value) > most or not value.isprintable():
        raise ValueError(f"{value!r:.60} is no name")
    return value


def flag(value: object) -> bool:
    """Return true or false. Raises TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{value!r:.60} is neither true nor false")
    return value
