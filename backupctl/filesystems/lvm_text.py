# SPDX-License-Identifier: GPL-2.0-or-later
"""The text in which LVM2 describes a volume group: ``name { key = value ... }``.

Values are numbers, strings in quotes, or lists of both in brackets.
"""

import re
from collections.abc import Iterator
from typing import TypeAlias

from backupctl.errors import FilesystemError

Value: TypeAlias = "int | str | list[int | str] | Section"
Section: TypeAlias = "dict[str, Value]"

_TOKEN = re.compile(
    r'\s+|#[^\n]*|(?P<text>"(?:[^"\\]|\\.)*")|(?P<number>-?[0-9]{1,19}(?:\.[0-9]+)?)(?![\w])'
    r"|(?P<name>[A-Za-z0-9_.+-]+)|(?P<mark>[][{}=,])"
)
_MOST_DEPTH = 8
_DAMAGED = "the description of a volume group (LVM) is damaged"


def group(content: bytes) -> tuple[str, Section]:
    """Return the only group of a description, with its name. Raises FilesystemError."""
    tokens = _tokens(content.rstrip(b"\0").decode("utf-8", "replace"))
    found = _section(tokens, 0, outermost=True)
    groups = [(name, value) for name, value in found.items() if isinstance(value, dict)]
    if len(groups) != 1:
        raise FilesystemError(_DAMAGED)
    return groups[0]


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise FilesystemError(_DAMAGED)
        at = match.end()
        if match.lastgroup:
            yield match.lastgroup, match[0]


def _section(tokens: Iterator[tuple[str, str]], depth: int, *, outermost: bool = False) -> Section:
    if depth > _MOST_DEPTH:
        raise FilesystemError(_DAMAGED)
    found: Section = {}
    for kind, name in tokens:
        if (kind, name) == ("mark", "}") and not outermost:
            return found
        mark = next(tokens, ("", ""))
        if kind not in ("name", "number") or name in found:
            raise FilesystemError(_DAMAGED)
        if mark == ("mark", "{"):
            found[name] = _section(tokens, depth + 1)
        elif mark == ("mark", "="):
            found[name] = _value(tokens)
        else:
            raise FilesystemError(_DAMAGED)
    if not outermost:
        raise FilesystemError(_DAMAGED)
    return found


def _value(tokens: Iterator[tuple[str, str]]) -> "int | str | list[int | str]":
    kind, text = next(tokens, ("", ""))
    if (kind, text) != ("mark", "["):
        return _scalar(kind, text)
    found: list[int | str] = []
    for inner, part in tokens:
        if (inner, part) == ("mark", "]"):
            return found
        if (inner, part) != ("mark", ","):
            found.append(_scalar(inner, part))
    raise FilesystemError(_DAMAGED)


def _scalar(kind: str, text: str) -> int | str:
    if kind == "text":
        return re.sub(r"\\(.)", r"\1", text[1:-1])
    if kind == "number":
        return int(text.partition(".")[0])
    raise FilesystemError(_DAMAGED)


def number(section: Section, name: str) -> int:
    """Return a number, not below 0. Raises FilesystemError."""
    found = section.get(name)
    if not isinstance(found, int) or found < 0:
        raise FilesystemError(f"{_DAMAGED}: {name} is not a number")
    return found


def text(section: Section, name: str) -> str:
    """Return a string. Raises FilesystemError."""
    found = section.get(name)
    if not isinstance(found, str):
        raise FilesystemError(f"{_DAMAGED}: {name} is not a string")
    return found


def texts(section: Section, name: str) -> list[int | str]:
    """Return a list; empty if there is none."""
    found = section.get(name)
    return found if isinstance(found, list) else []


def section(parent: Section, name: str) -> Section:
    """Return a section within another one. Raises FilesystemError."""
    found = parent.get(name)
    if not isinstance(found, dict):
        raise FilesystemError(f"{_DAMAGED}: {name} is missing")
    return found


def sections(parent: Section, name: str) -> dict[str, Section]:
    """Return the sections of a section; none if there is no such one."""
    found = parent.get(name, {})
    return (
        {key: one for key, one in found.items() if isinstance(one, dict)} if isinstance(found, dict) else {}
    )


def stripe(segment: Section) -> tuple[str, int]:
    """Return the physical volume of a linear segment, and the first extent on it. Raises FilesystemError."""
    match texts(segment, "stripes"):
        case [str() as name, int() as first] if first >= 0:
            return name, first
    raise FilesystemError(f"{_DAMAGED}: a segment has no place")
