# SPDX-License-Identifier: GPL-2.0-or-later
"""HTML, made of tags and texts. Every text and every value passes through `text`, and nothing goes around it.

`Markup` is made here only. Whatever else is put into a tag is a text, so a name or a message in a manifest
cannot become a tag.
"""

import html
import re
from collections.abc import Iterable
from functools import cache, lru_cache

from backupctl.outcome.clean_text import clean


class Markup(str):
    """HTML that is complete in itself."""

    __slots__ = ()


Content = object
"""Markup, or anything else that is shown as a text."""
_NO_END = ("meta", "link", "img", "td", "th", "tr")
"""Elements without content, and those of a table, which end where the next one begins (fewer bytes)."""
_PLAIN = re.compile(r"[A-Za-z0-9-]+")
"""Values that need no quotes."""
_KNOWN_ATTRIBUTES = 512
"""Most attributes of a page are a few that come again and again."""
_SPECIAL = re.compile(r"[^ !#-%(-;=?-~]")
"""A character that is not printable ASCII, or that HTML gives a meaning."""


def text(content: Content) -> Markup:
    """Return markup as it is, and anything else as a text without control characters."""
    if isinstance(content, Markup):
        return content
    said = str(content)
    return Markup(html.escape(clean(said)) if _SPECIAL.search(said) else said)


def tag(name: str, /, *content: Content, **attributes: object) -> Markup:
    """Return an element. name and the names of attributes: ours, never from outside.

    `class_` is written `class`, and `_` in other names `-`. An attribute with None or False is left out; one
    with True has no value.
    """
    values = "".join([_attribute(key, value) for key, value in attributes.items()]) if attributes else ""
    inner = "".join(map(text, content))
    return Markup(f"<{name}{values}>{inner}" + ("" if name in _NO_END else f"</{name}>"))


def each(name: str, contents: Iterable[Content]) -> Markup:
    """Return an element without attributes for each content, one after the other. name: as of `tag`."""
    begin, end = f"<{name}>", "" if name in _NO_END else f"</{name}>"
    return Markup("".join([f"{begin}{text(content)}{end}" for content in contents]))


def join(parts: Iterable[Content], between: str = "") -> Markup:
    """Return parts, one after the other. between: a text."""
    return Markup(text(between).join(map(text, parts)))


def verbatim(content: str) -> Markup:
    """Return a style sheet or a script of ours, which HTML does not escape. Raises ValueError."""
    if "</" in content or "<!--" in content:
        raise ValueError("a style sheet or script that would end its element")
    return Markup(content)


def document(*content: Content) -> Markup:
    """Return a whole document of these elements."""
    return Markup("<!doctype html>\n" + "\n".join(map(text, content)) + "\n")


@lru_cache(_KNOWN_ATTRIBUTES, typed=True)
def _attribute(key: str, value: object) -> str:
    if value is None or value is False:
        return ""
    name = _name(key)
    if value is True:
        return f" {name}"
    said = text(str(value))
    return f" {name}={said}" if _PLAIN.fullmatch(said) else f' {name}="{said}"'


@cache
def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")
