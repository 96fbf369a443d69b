# SPDX-License-Identifier: GPL-2.0-or-later
"""Takes secrets out of what leaves this machine: values that are known, and whatever looks like one.

A URL is a secret as a whole but for its host: webhooks carry their token in the path. Rather too much is
taken out than too little, for nobody can take back what was sent.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from backupctl.system.log import HIDDEN

_SHORTEST = 4
"""A known secret that is shorter is part of many words: hiding it would hide half the text."""
_NAME = (
    r"pass(?:word|wd|phrase)?|secret|cookie|token|psk|credentials?|authorization|(?:private|api|access).?key"
)
_SECRET_NAME = re.compile(_NAME, re.IGNORECASE)
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"-----BEGIN [A-Z ]*KEY-----.*?(?:-----END [A-Z ]*KEY-----|\Z)", re.DOTALL), HIDDEN),
    (re.compile(r"\b(https?://)(?:[^\s/\"'@]*@)?([^\s/\"'?#@\\]+)[^\s\"'\\]*"), rf"\1\2/{HIDDEN}"),
    (re.compile(r"(://)[^\s/\"'@]*@"), rf"\1{HIDDEN}@"),
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]+", re.IGNORECASE), rf"\1 {HIDDEN}"),
    (
        re.compile(
            rf"([\w-]*(?:{_NAME})[\w-]*\\?[\"']?\s*[=:]\s*)"
            r"(?:\\?\"(?:[^\"\\]|\\.)*\\?\"|'[^']*'|[^\s,;\"'}\]]+)",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(rf"(--?[\w-]*(?:{_NAME})[\w-]*\s+)\S+", re.IGNORECASE), rf"\1{HIDDEN}"),
)


class Redaction:
    """secrets: values that must not appear anywhere, in no part of any text."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        known = {form for one in secrets if len(one) >= _SHORTEST for form in (one, json.dumps(one)[1:-1])}
        self._secrets = sorted(known, key=len, reverse=True)  # one may be a part of another

    def text(self, text: str) -> str:
        """Return a text without secrets."""
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        for pattern, shown in _PATTERNS:
            text = pattern.sub(shown, text)
        return text

    def value(self, value: Any) -> Any:
        """Return a document without secrets: what a key of a secret's name has is hidden as a whole."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {
                self.text(str(key)): HIDDEN if _hides(str(key), one) else self.value(one)
                for key, one in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.value(one) for one in value]
        return value


def _hides(key: str, value: object) -> bool:
    return bool(_SECRET_NAME.search(key)) and value is not None and not isinstance(value, bool)
