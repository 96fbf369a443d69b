# SPDX-License-Identifier: GPL-2.0-or-later
"""What a log line shows of a message to or from QEMU or the guest agent: short, and without secrets.

Each room logs to a logger of its own, `backupctl.vm.qmp` and so on, at level DEBUG. Without a command line
around it (`cli/logs.py`) nothing listens, and a line costs one comparison.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_MOST_ITEMS = 100
_MOST_CHARACTERS = 1000
_MOST_TEXT = 200  # of any one text in a message
_MOST_DEPTH = 8
_SMALL_BYTES = 1 << 14

_SECRET_NAME = re.compile(
    r"pass(word|wd|phrase)|secret|cookie|token|psk|credential|private.?key", re.IGNORECASE
)
_SECRET_OBJECT = re.compile(r"secret|tls-creds")
_USER_IN_URL = re.compile(r"(://)[^/@\s]*@")
_JSON_NAME = "json:"


class Shown:
    """A message, made into text when a line is written, and not before.

    size_bytes: what it takes as JSON, or more; None if that is not known.
    """

    def __init__(self, message: object, size_bytes: int | None = None) -> None:
        self._message = message
        self._size_bytes = size_bytes

    @property
    def is_small(self) -> bool:
        """Whether it is certainly small enough to be kept until somebody asks for the line."""
        return self._size_bytes is not None and self._size_bytes <= _SMALL_BYTES

    def __str__(self) -> str:
        try:
            text = json.dumps(_Reduction().value(self._message), ensure_ascii=True)
        except (TypeError, ValueError, RecursionError):
            return f"({type(self._message).__name__})"
        return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."


class _Reduction:
    """One message on its way into a line. A reply may hold a megabyte: only its first items are looked at."""

    def __init__(self) -> None:
        self._left = _MOST_ITEMS

    def value(self, value: object, depth: int = 0) -> Any:
        """Return what may be shown of a value."""
        if isinstance(value, str):
            return _text(value)
        if value is None or isinstance(value, bool | int | float):
            return value
        if depth >= _MOST_DEPTH:
            return "..."
        if isinstance(value, Mapping):
            return self._mapping(value, depth)
        if isinstance(value, list | tuple):
            found: list[Any] = []
            for one in value:
                if not self._room():
                    return [*found, "..."]
                found.append(self.value(one, depth + 1))
            return found
        return f"({type(value).__name__})"

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        shown: dict[str, Any] = {}
        for key, one in value.items():
            if not self._room():
                shown["..."] = "..."
                break
            secret = _is_secret(str(key), value) and not isinstance(one, bool | None)
            shown[str(key)[:_MOST_TEXT]] = HIDDEN if secret else self.value(one, depth + 1)
        return shown

    def _room(self) -> bool:
        self._left -= 1
        return self._left >= 0


def _is_secret(key: str, beside: Mapping[Any, Any]) -> bool:
    """Whether what a key names must not be shown. beside: all of the object that it is in.

    A secret object has its secret in `data`, which elsewhere is a harmless word (QEMU's qapi/crypto.json);
    `qom-set` names the property beside its value (qapi/qom.json).
    """
    if key == "data":
        return bool(_SECRET_OBJECT.match(str(beside.get("qom-type", ""))))
    if key == "value":
        named = str(beside.get("property", ""))
        return named == "data" or bool(_SECRET_NAME.search(named))
    return bool(_SECRET_NAME.search(key))


def _text(text: str) -> str:
    if text.startswith(_JSON_NAME):  # a file name may be a whole block device description, cookies and all
        try:
            described = json.loads(text.removeprefix(_JSON_NAME))
        except (ValueError, RecursionError):
            return f"{_JSON_NAME}{HIDDEN}"
        return f"{_JSON_NAME}{Shown(described)}"
    shown = _USER_IN_URL.sub(rf"\1{HIDDEN}@", text)
    return shown if len(shown) <= _MOST_TEXT else f"{shown[:_MOST_TEXT]}..."
