# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading JSON that may be damaged, or made by somebody who means harm.

What a document may hold is said by a dataclass. msgspec checks types, bounds and patterns, and refuses NaN,
lone surrogates and deep nesting. It does not look for fields that are doubled or unknown: that is done here.
A document in which anything is wrong raises `Malformed`, and nothing of it is used.
"""

import json
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, TypeVar

import msgspec
from blake3 import blake3
from msgspec import Meta

from backupctl.errors import InvalidName
from backupctl.names import NodeName, RepositoryId
from backupctl.sizes import MAX_SIZE

LEFT_OUT = "left out"
"""Key in a field's metadata: the field is not written while it has its default, as older programs expect."""
MAX_BYTES = 4 * 1024 * 1024
"""A manifest or journal that is larger is not read."""

Size = Annotated[int, Meta(ge=0, le=MAX_SIZE)]
# \Z and not $, which lets a line feed pass at the end.
Hex = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
ShortText = Annotated[str, Meta(pattern=r"\A[^\x00]{0,100}\Z")]
Text = Annotated[str, Meta(pattern=r"\A[^\x00]{0,4096}\Z")]
RepositoryHex = Annotated[RepositoryId, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
NodeText = Annotated[NodeName, Meta(pattern=r"\A[^\x00]{0,100}\Z")]


class Malformed(ValueError):
    """The document is not valid; the text says where."""


class NewerFormat(Malformed):
    """The document's format version is newer than those that this backupctl knows."""


@dataclass(frozen=True)
class Document:
    """A document, without the format version and the checksum that it has in its file."""

    @property
    def format(self) -> int:
        """The format version of its file: the lowest that has all its values."""
        return 1

    def check(self) -> None:
        """Check what types do not say. Raises ValueError, InvalidName."""


D = TypeVar("D", bound=Document)


def read(content: bytes, kind: type[D], where: str, version: int, *, signed: bool = False) -> D:
    """Read a document of that format version or an older one. Raises NewerFormat, Malformed.

    signed: with a checksum, for a kind that has it as a cached property `checksum`.
    """
    try:
        document = parse(content)
        found_version = _version(_take(document, "format"), version)
        checked = None
        if signed:  # before anything else: no field is believed of a document in which a byte was changed
            checked = _checksum(_take(document, "checksum"), {"format": found_version, **document})
        found = msgspec.json.decode(content, type=kind)
        found.check()
        _check_format(found_version, found)
        _check_fields(document, found)
        if checked is not None:
            vars(found)["checksum"] = checked  # so that it is not computed again
    except Malformed as err:
        raise type(err)(f"{where}: {err}") from err
    except (ValueError, RecursionError, InvalidName) as err:
        raise Malformed(f"{where}: {err}") from err
    return found


def parse(content: bytes) -> dict[str, Any]:
    """Parse a JSON object without doubled names, NaN, or an absurd size or depth. Raises Malformed."""
    if len(content) > MAX_BYTES:
        raise Malformed(f"larger than {MAX_BYTES >> 20} MiB")
    try:
        found = json.loads(content.decode(), object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as err:
        raise Malformed(f"invalid JSON: {err}") from err
    if not isinstance(found, dict):
        raise Malformed("not a JSON object")
    return found


def checksum(document: dict[str, Any]) -> str:
    """Return the BLAKE3 checksum (16 bytes, in hex) of a document, whatever the order of its fields."""
    return str(blake3(_canonical(document)).hexdigest(16))


def _take(document: dict[str, Any], name: str) -> object:
    if name not in document:
        raise Malformed(f"{name} is missing")
    return document.pop(name)


def _version(found: object, known: int) -> int:
    if type(found) is not int or found < 1:  # True is an int, too
        raise Malformed(f"invalid format version {found!r:.60}")
    if found > known:
        raise NewerFormat(f"format version {found}; this backupctl knows {known}: a newer one wrote it")
    return found


def _checksum(found: object, document: dict[str, Any]) -> str:
    wanted = checksum(document)
    if found != wanted:
        raise Malformed("the checksum does not match")
    return wanted


def _check_format(version: int, found: Document) -> None:
    if version != found.format:
        raise Malformed(f"format version {version} does not have these values")


def _check_fields(document: dict[str, Any], found: Document) -> None:
    # msgspec ignores an unknown field, and gives a missing one its default.
    if not _same(document, found):
        raise Malformed("a field is unknown or missing")


def _same(given: object, found: object) -> bool:
    """Whether JSON that was parsed says the same as what msgspec made of it, field by field."""
    if isinstance(found, tuple):
        return isinstance(given, list) and len(given) == len(found) and all(map(_same, given, found))
    kind = type(found)
    if not is_dataclass(kind):
        return given == found
    names, optional = _names_of(kind)
    if optional:
        names = names - {one.name for one in optional if _is_left_out(one, found)}
    if not isinstance(given, dict) or given.keys() != names:
        return False
    return all(_same(given[name], getattr(found, name)) for name in names)


@cache
def _names_of(kind: Any) -> tuple[frozenset[str], tuple[Field[Any], ...]]:
    """Return the names of a dataclass's fields, and those fields that may be left out."""
    found = fields(kind)
    return frozenset([one.name for one in found]), tuple([one for one in found if LEFT_OUT in one.metadata])


def _is_left_out(one: Field[Any], found: object) -> bool:
    return LEFT_OUT in one.metadata and bool(getattr(found, one.name) == one.default)


def without_left_out(document: dict[str, Any], found: object) -> dict[str, Any]:
    """Return a document without the fields that are left out while they have their defaults."""
    assert is_dataclass(found)
    absent = {one.name for one in fields(found) if _is_left_out(one, found)}
    return {name: value for name, value in document.items() if name not in absent}


def _canonical(document: dict[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number")
