# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's command line, without the secrets that may be on it.

A user of the host can read it while QEMU runs, but a repository is kept for longer, and elsewhere.
Source: QEMU's manual page (`-object secret`, `-drive`, `-spice`), and systemd.system-credentials(7).
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"
_SECRET = r"pass(?:word|wd|phrase)|secret|cookie|token|psk|credential|private.?key"  # noqa: S105 - a pattern
_SECRET_NAME = re.compile(_SECRET, re.IGNORECASE)
_IDS_OF_SECRETS = ("-secret", "passwordid")
_IN_LIST = re.compile(r"(^|,)([^=,]*)=((?:[^,]|,,)*)")
_IN_TEXT = re.compile(rf"((?:^|[\s:;&?])(?:[\w.-]*(?:{_SECRET})[\w.-]*|key)=)[^\s:;&,]+", re.IGNORECASE)
_CREDENTIAL = re.compile(r"(io\.systemd\.credential[\w.]*:[^=]*=).*", re.DOTALL)
_USER_IN_URL = re.compile(r"(://)[^/@\s]*@")
_JSON_NAME = "json:"
_MOST_DEPTH = 32


def without_secrets(arguments: Sequence[str]) -> tuple[str, ...]:
    """Return a command line with `***` in the place of each secret."""
    return tuple(clean(one) for one in arguments)


def clean(text: str) -> str:
    """Return one argument, or the name of a file as QEMU shows it, without secrets."""
    if text.startswith("{"):
        return _clean_json(text)
    if text.startswith(_JSON_NAME):
        return _JSON_NAME + _clean_json(text.removeprefix(_JSON_NAME))
    is_secret = text.startswith("secret") or "qom-type=secret" in text

    def hide(found: re.Match[str]) -> str:
        before, name, value = found.groups()
        if (name == "data" and is_secret) or _names_secret(name):
            value = HIDDEN
        return f"{before}{name}={value}"

    text = _IN_LIST.sub(hide, text)
    text = _IN_TEXT.sub(_hide_unless_id, text)
    text = _CREDENTIAL.sub(rf"\g<1>{HIDDEN}", text)
    return _USER_IN_URL.sub(rf"\1{HIDDEN}@", text)


def _hide_unless_id(found: re.Match[str]) -> str:
    return found[0] if found[1].rstrip("=").endswith(_IDS_OF_SECRETS) else f"{found[1]}{HIDDEN}"


def _names_secret(name: str) -> bool:
    """Whether a property holds a secret; `password-secret` has the id of one."""
    return bool(_SECRET_NAME.search(name)) and not name.endswith(_IDS_OF_SECRETS)


def _clean_json(text: str) -> str:
    try:
        return json.dumps(_clean_value(json.loads(text), 0))
    except (ValueError, RecursionError):
        return HIDDEN


def _clean_value(value: Any, depth: int) -> Any:
    if depth > _MOST_DEPTH:
        return HIDDEN
    if isinstance(value, str):
        return clean(value) if value.startswith(_JSON_NAME) else _USER_IN_URL.sub(rf"\1{HIDDEN}@", value)
    if isinstance(value, list):
        return [_clean_value(one, depth + 1) for one in value]
    if isinstance(value, Mapping):
        secret = str(value.get("qom-type", "")).startswith("secret")
        return {
            key: HIDDEN
            if (_names_secret(str(key)) and not isinstance(one, bool)) or (secret and key == "data")
            else _clean_value(one, depth + 1)
            for key, one in value.items()
        }
    return value
