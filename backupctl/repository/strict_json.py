# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading JSON that may be damaged or made by somebody who means harm.

Every value is taken by name and type; what is missing, extra, doubled, of another type or out of bounds
raises `Malformed`, and nothing of the document is used.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

from backupctl.errors import BackupctlError

T = TypeVar("T")

MAX_BYTES = 4 * 1024 * 1024
"""No manifest or journal is larger; one that is isn't read."""
MAX_SIZE = 1 << 60
"""No disk is larger (bytes)."""


class Malformed(ValueError):
    """The document is not what it should be; the text says where."""


class Fields:
    """The fields of one JSON object; each must be taken, and none may be left."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise Malformed(f"{where} is not an object")
        self._left: dict[str, Any] = dict(value)
        self._where = where

    def text(self, name: str, check: Callable[[str], T]) -> T:
        """Take a string and check it."""
        return self._checked(name, self._take(name, str), check)

    def choice(self, name: str, *allowed: str) -> str:
        """Take a string that is one of a few."""
        value: str = self._take(name, str)
        if value not in allowed:
            raise Malformed(f"{self._where}: {name} is {value!r:.60}")
        return value

    def optional(self, name: str, check: Callable[[str], T]) -> T | None:
        """Take a string or null."""
        value = self._take(name, str, type(None))
        return None if value is None else self._checked(name, value, check)

    def number(self, name: str, most: int = MAX_SIZE) -> int:
        """Take a whole number from 0 to `most`."""
        value: int = self._take(name, int)
        if not 0 <= value <= most:
            raise Malformed(f"{self._where}: {name} is out of bounds")
        return value

    def number_or_none(self, name: str, most: int = MAX_SIZE) -> int | None:
        """Take a whole number or null."""
        if self._left.get(name, 0) is None:
            self._take(name, type(None))
            return None
        return self.number(name, most)

    def flag(self, name: str) -> bool:
        """Take true or false."""
        return bool(self._take(name, bool))

    def items(self, name: str) -> list[Any]:
        """Take a list."""
        return list(self._take(name, list))

    def value(self, name: str) -> Any:
        """Take a value of any type, to be read by its own `Fields`."""
        return self._take(name, object)

    def done(self) -> None:
        """Raise Malformed if a field was not taken."""
        if self._left:
            raise Malformed(f"{self._where}: unknown field {next(iter(self._left))!r:.60}")

    def _take(self, name: str, *types: type) -> Any:
        if name not in self._left:
            raise Malformed(f"{self._where}: {name} is missing")
        value = self._left.pop(name)
        # bool is an int to Python, but `true` is no size.
        if not isinstance(value, types) or (isinstance(value, bool) and types == (int,)):
            raise Malformed(f"{self._where}: {name} has the wrong type")
        return value

    def _checked(self, name: str, value: str, check: Callable[[str], T]) -> T:
        try:
            return check(value)
        except (ValueError, BackupctlError) as err:
            raise Malformed(f"{self._where}: {name}: {err}") from err


def parse(content: bytes, where: str) -> Any:
    """Parse JSON, refusing doubled names, NaN and documents of absurd size or depth. Raises Malformed."""
    if len(content) > MAX_BYTES:
        raise Malformed(f"{where} is larger than {MAX_BYTES >> 20} MiB")
    try:
        return json.loads(content.decode(), object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as err:
        raise Malformed(f"{where} is not JSON: {err}") from err


def plain_text(most: int = 4096) -> Callable[[str], str]:
    """Return a check for a text of at most `most` characters."""

    def check(text: str) -> str:
        if len(text) > most or "\0" in text:
            raise ValueError("text is too long")
        return text

    return check


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")
