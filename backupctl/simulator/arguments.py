# SPDX-License-Identifier: GPL-2.0-or-later
"""What arguments a command takes: checked before it runs, and returned by `query-qmp-schema`.

A form is a mapping from an argument's name to its kind: "str", "int", "uint32", "bool", "dict", "list",
"any", or the values of an enumeration as a tuple. A "?" after the name marks an optional argument.
"""

from collections.abc import Mapping
from typing import Any

from backupctl.simulator.failure import CommandError

Kind = str | tuple[str, ...]
Form = Mapping[str, Kind]
_TYPES: dict[str, tuple[type, str]] = {
    "str": (str, "string"),
    "int": (int, "integer"),
    "uint32": (int, "integer"),
    "bool": (bool, "boolean"),
    "dict": (dict, "object"),
    "list": (list, "array"),
}


def check(form: Form, given: Mapping[str, Any], where: str = "") -> None:
    """Raise CommandError, with QEMU's own text, unless the arguments have the form.

    where: the prefix of a member's name in messages, e.g. ``actions[0].``.
    """
    known = {name.removesuffix("?") for name in form}
    for name, kind in form.items():
        bare = name.removesuffix("?")
        if bare in given:
            _check_one(where + bare, kind, given[bare])
        elif bare == name:
            raise CommandError(f"Parameter '{where}{bare}' is missing")
    for name in given:
        if name not in known:
            raise CommandError(f"Parameter '{where}{name}' is unexpected")


def check_choice(name: str, form: Form, value: Any) -> None:
    """Raise CommandError unless a value is a name (a string), or an object of the form."""
    if isinstance(value, dict):
        check(form, value, f"{name}.")
    elif not isinstance(value, str):
        raise CommandError(f"Invalid parameter type for '{name}', expected: string or object")


def _check_one(name: str, kind: Kind, value: Any) -> None:
    if isinstance(kind, tuple):
        if not isinstance(value, str):
            raise CommandError(f"Invalid parameter type for '{name}', expected: string")
        if value not in kind:
            raise CommandError(f"Parameter '{name.rpartition('.')[2]}' does not accept value '{value}'")
        return
    if kind == "any":
        return
    wanted, shown = _TYPES[kind]
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise CommandError(f"Invalid parameter type for '{name}', expected: {shown}")
    if kind == "uint32" and isinstance(value, int) and not 0 <= value < 1 << 32:
        raise CommandError(f"Parameter '{name}' expects uint32_t")
