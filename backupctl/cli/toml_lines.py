# SPDX-License-Identifier: GPL-2.0-or-later
"""On which line of a TOML file each key stands; `tomllib` does not tell.

A file that was parsed without error is cut into its statements: a table's header, or a key with its value.
Each is parsed alone, so quoted and dotted keys, inline tables and values of several lines need no rules here.
"""

import tomllib
from collections.abc import Iterator
from typing import Any, Literal

Key = tuple[str, ...]
_MOST_LINES = 200
"""A longer statement is passed over: its beginning is parsed again with each line, in quadratic time."""


def key_lines(text: str) -> dict[Key, int]:
    """Return the first line of each key and table, from 1, of a text that is valid TOML."""
    found: dict[Key, int] = {}
    table: Key = ()
    for number, statement in _statements(text):
        content = tomllib.loads(statement)
        header = statement.lstrip().startswith("[")
        keys = list(_keys(content))
        if header:
            table = max(keys, key=len, default=())
        for key in keys:
            found.setdefault(key if header else (*table, *key), number)
    return found


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Yield each statement with the number of its first line."""
    lines = text.replace("\r\n", "\n").split("\n")
    at = 0
    while at < len(lines):
        for end in range(at + 1, min(len(lines), at + _MOST_LINES) + 1):
            statement = "\n".join(lines[at:end])
            state = _state(statement)
            if state == "whole":
                yield at + 1, statement
                at = end
            if state != "begun":
                break
        if state != "whole":
            at += 1


def _state(statement: str) -> Literal["whole", "begun", "none"]:
    """Return whether a text is a statement, or begins one whose value goes on in the next line."""
    try:
        tomllib.loads(statement)
    except (ValueError, RecursionError) as err:
        return "begun" if str(err).endswith("(at end of document)") else "none"
    return "whole"


def _keys(content: dict[str, Any], above: Key = ()) -> Iterator[Key]:
    for name, value in content.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from _keys(value, (*above, name))
