# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's history: what became of each of its points, so that one that is missing is missed.

`VM/history` is only ever appended to, a line of JSON for each event:

::

    begun       the first line
    found       the point was there already when the history was begun, or somebody copied it there
    committed   the point is about to be committed: written before the rename, which is the commit
    undone      it was not committed after all
    changing    a prune is about to replace its manifest: until `changed` it is the old or the new one
    changed     the manifest was replaced
    dropped     a prune has retired the point

Each line has its own checksum and that of the line before it. A writer holds the VM's lock. Each line is
durable before the event that it records happens, or before the traces of that event are removed. A torn last
line is what a crash leaves: the event that it would have recorded has not happened. On a full disk a
`committed` that was the last line is cut off instead, where there is no room for its `undone`.
"""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from msgspec import Meta

from backupctl.errors import RepositoryError
from backupctl.names import PointId, point_id
from backupctl.repository import strict_json
from backupctl.repository.strict_json import Document, Malformed, ShortText
from backupctl.system import durable, safe_open

FORMAT = 1
FILE_NAME = "history"
MAX_BYTES = 1 << 28
"""A million entries or more; a larger file is not read."""
_TAIL_BYTES = 1 << 16

EventKind = Literal["begun", "found", "committed", "undone", "changing", "changed", "dropped"]


@dataclass(frozen=True)
class PointEvent:
    """What happened to a point. manifest: the checksum of the manifest that it then has."""

    kind: EventKind
    point: PointId | None = None
    manifest: str | None = None


Checksum = Annotated[str, Meta(pattern=r"\A[^\x00]{0,32}\Z")]


@dataclass(frozen=True)
class Entry(Document):
    """One line. time: UTC. before: the checksum of the line before, "" in the first."""

    event: EventKind
    point: PointId | None
    manifest: Checksum | None
    time: ShortText
    before: Checksum

    def check(self) -> None:
        """Check what types do not say. Raises InvalidName."""
        if self.point is not None:
            point_id(self.point)

    @cached_property
    def checksum(self) -> str:
        """BLAKE3, 16 bytes, of all its other fields."""
        return strict_json.checksum(self._fields())

    def to_line(self) -> bytes:
        """Return the line."""
        return (json.dumps({**self._fields(), "checksum": self.checksum}) + "\n").encode()

    @classmethod
    def from_line(cls, line: bytes) -> "Entry | None":
        """Read a line without its end; None if it is not an entry, or does not match its checksum."""
        try:
            return strict_json.read(line, cls, FILE_NAME, FORMAT, signed=True)
        except Malformed:
            return None

    def _fields(self) -> dict[str, object]:
        return {"format": FORMAT, **asdict(self)}


@dataclass(frozen=True)
class Known:
    """What the history knows of one point.

    there: it must be there, under its final name. dropped: a prune retired it. manifests: its manifest must
    have one of these checksums. older: those that it had before.
    """

    there: bool = False
    dropped: bool = False
    manifests: tuple[str, ...] = ()
    older: frozenset[str] = frozenset()

    def after(self, entry: Entry) -> "Known":
        """Return what is known after one entry more."""
        added = (entry.manifest,) if entry.manifest else ()
        if entry.event in ("found", "committed"):
            return Known(there=True, manifests=added)
        if not self.there or entry.event in ("undone", "dropped"):
            return Known(dropped=self.dropped or entry.event == "dropped")
        if entry.event == "changing":
            return Known(there=True, manifests=(*self.manifests[-1:], *added), older=self.older)
        older = (self.older | set(self.manifests)) - set(added)
        return Known(there=True, manifests=added, older=older)


@dataclass(frozen=True)
class History:
    """A history as it was read. flaws: messages about what shows that somebody changed it."""

    content: bytes
    points: dict[PointId, Known]
    flaws: tuple[str, ...]


def read(directory: Path) -> History | None:
    """Read the history of a VM's directory; None if there is none. Raises RepositoryError."""
    content = _content(directory)
    return None if content is None else parse(content)


@lru_cache(4)
def parse(content: bytes) -> History:
    """Read a history, however damaged: what cannot be read is a flaw, except a torn last line."""
    points: dict[PointId, Known] = {}
    flaws: list[str] = []
    before, unreadable = "", 0
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        entry = Entry.from_line(line)
        if entry is None:
            unreadable = unreadable or number
            continue
        if unreadable:
            flaws.append(f"line {unreadable} is damaged")
        elif entry.before != before or (not before and entry.event != "begun"):
            flaws.append(f"line {number} does not follow the one before it: lines were changed or removed")
        before, unreadable = entry.checksum, 0
        if entry.point is not None:
            points[entry.point] = points.get(entry.point, Known()).after(entry)
    if not before:
        flaws.append("no line is readable")
    return History(content, points, tuple(flaws))


def record(directory: Path, *events: PointEvent) -> None:
    """Append to the history of a VM's directory, durably; begin it if there is none. Raises RepositoryError.

    The caller holds the VM's lock.
    """
    with _writing(directory):
        _append(directory, events)


def undo(directory: Path, point: PointId) -> None:
    """Record that a point was not committed, if its commit was recorded already. Raises RepositoryError.

    To be called before the directory is removed: else a crash in between would leave a missing point. This
    needs no room where the commit is what the history recorded last: a roll-back must succeed on a full disk.
    """
    known = Known()
    for line in (_content(directory) or b"").split(b"\n")[:-1]:
        # Only its own lines are read: to read all of them for each point would be quadratic.
        entry = Entry.from_line(line) if point.encode() in line else None
        if entry is not None and entry.point == point:
            known = known.after(entry)
    if known.there:
        with _writing(directory):
            try:
                _append(directory, (PointEvent("undone", point),))
            except OSError as err:
                last = _last(directory)
                full = err.errno in (errno.ENOSPC, errno.EDQUOT)
                if last is None or not last.tells("committed", point) or not full:
                    raise
                durable.append(directory / FILE_NAME, last.begin, b"")


def end(directory: Path) -> int:
    """Return where the last readable line ends, for `points_since`; 0 if there is none.

    Raises RepositoryError.
    """
    last = _last(directory)
    return last.end if last is not None and last.entry is not None else 0


def points_since(directory: Path, before: int) -> frozenset[PointId] | None:
    """Return the points of which lines tell that were appended after `end` returned `before`.

    None: the history is another file now, or was cut. Raises RepositoryError.
    """
    content = _read(directory, before - 1) if before else None
    if content is None or content[:1] != b"\n":
        return None
    entries = (Entry.from_line(line) for line in content.split(b"\n")[1:-1])
    return frozenset(entry.point for entry in entries if entry is not None and entry.point is not None)


class _Line(NamedTuple):
    """The last readable line, and its bytes in the file. entry: None if no line is readable."""

    begin: int
    end: int
    entry: Entry | None

    @property
    def checksum(self) -> str:
        return "" if self.entry is None else self.entry.checksum

    def tells(self, event: EventKind, point: PointId) -> bool:
        return self.entry is not None and (self.entry.event, self.entry.point) == (event, point)


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise RepositoryError(f"cannot write {directory / FILE_NAME}: {err.strerror}") from err


def _append(directory: Path, events: Iterable[PointEvent]) -> None:
    """Append durably; begin a history if there is none. Raises OSError, RepositoryError."""
    path = directory / FILE_NAME
    last = _last(directory)
    if last is None:
        durable.replace(path, _lines("", (PointEvent("begun"), *events)))
        return
    # A line that is cut off here was never durable, so what it records was never begun.
    durable.append(path, last.end, _lines(last.checksum, events))


def _content(directory: Path) -> bytes | None:
    return _read(directory, 0)


def _read(directory: Path, begin: int) -> bytes | None:
    """Read the history from some byte on; None if there is none. Raises RepositoryError."""
    with _opened(directory) as file:
        if file is None:
            return None
        file.seek(begin)
        return file.read(MAX_BYTES)


def _last(directory: Path) -> _Line | None:
    """Return the last readable line; None if there is no history. Raises RepositoryError.

    If no line is readable it ends at the end of the file, so that nothing is cut off: no crash does that, and
    it must stay visible.
    """
    with _opened(directory) as file:
        if file is None:
            return None
        size = os.fstat(file.fileno()).st_size
        length = _TAIL_BYTES  # of most histories only the end is read: a prune records hundreds of events
        while True:
            begin = max(size - length, 0)
            file.seek(begin)
            found = _last_in(file.read(size - begin))
            if found is not None:
                return found._replace(begin=begin + found.begin, end=begin + found.end)
            if not begin or length > MAX_BYTES:
                return _Line(size, size, None)
            length *= 4


def _last_in(content: bytes) -> _Line | None:
    at = content.rfind(b"\n") + 1
    while at:
        begin = content.rfind(b"\n", 0, at - 1) + 1
        entry = Entry.from_line(content[begin : at - 1])
        if entry is not None:
            return _Line(begin, at, entry)
        at = begin
    return None


@contextmanager
def _opened(directory: Path) -> Iterator[BufferedReader | None]:
    """Open the history of a VM's directory; None if there is none. Raises RepositoryError."""
    path = directory / FILE_NAME
    with ExitStack() as held:
        try:
            file = held.enter_context(safe_open.open_file(path))
        except safe_open.NotPlain as err:
            raise RepositoryError(f"cannot read {path}: {err}") from err
        except safe_open.NotThere:
            file = None
        yield file


def _lines(before: str, events: Iterable[PointEvent]) -> bytes:
    time = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    lines = []
    for event in events:
        entry = Entry(event.kind, event.point, event.manifest, time, before)
        lines.append(entry.to_line())
        before = entry.checksum
    return b"".join(lines)
