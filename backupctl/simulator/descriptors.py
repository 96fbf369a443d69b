# SPDX-License-Identifier: GPL-2.0-or-later
"""Descriptors passed over the monitor's socket: sets (`add-fd`) and named single ones (`getfd`)."""

import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from backupctl.simulator.failure import CommandError

PREFIX = "/dev/fdset/"


@dataclass
class Member:
    """One descriptor of a set. removed: marked by `remove-fd`. A node's duplicate outlives it."""

    fd: int
    opaque: str | None
    removed: bool = False


@dataclass
class Set:
    """A descriptor set. users: how many nodes hold a duplicate of one of its members."""

    members: list[Member] = field(default_factory=list)
    users: int = 0


class Descriptors:
    """All descriptors that the monitor's clients passed."""

    def __init__(self) -> None:
        self._sets: dict[int, Set] = {}
        self._named: dict[str, int] = {}

    def add(self, fd: int, number: int | None, opaque: str | None) -> dict[str, int]:
        """Add a descriptor to a set; to a new one if no number is given."""
        if number is None:
            number = next(n for n in range(len(self._sets) + 1) if n not in self._sets)
        elif number < 0:
            os.close(fd)
            raise CommandError("Parameter 'fdset-id' expects a non-negative value")
        self._sets.setdefault(number, Set()).members.append(Member(fd, opaque))
        return {"fdset-id": number, "fd": fd}

    def remove(self, number: int, fd: int | None, *, at_once: bool) -> None:
        """Mark a set, or one of its members, for removal, and remove what is marked."""
        found = [m for m in self._sets[number].members if fd in (None, m.fd)] if number in self._sets else []
        if not found:
            shown = f"fdset-id:{number}" + ("" if fd is None else f", fd:{fd}")
            raise CommandError(f"File descriptor named '{shown}' not found")
        for member in found:
            member.removed = True
        if at_once:
            self._sweep(number)

    def describe(self) -> list[dict[str, object]]:
        """Return what `query-fdsets` does, newest set first."""
        return [
            {"fdset-id": number, "fds": [_describe(member) for member in self._sets[number].members]}
            for number in reversed(self._sets)
        ]

    def open(self, path: str, *, read_only: bool) -> int:
        """Return a duplicate of the member that a `/dev/fdset/N` path names. Raises OSError."""
        digits = path.removeprefix(PREFIX)
        flags = os.O_RDONLY if read_only else os.O_RDWR
        chosen = self._sets.get(int(digits)) if digits.isdigit() else None
        if chosen is None:
            raise FileNotFoundError(2, os.strerror(2))
        for member in chosen.members:
            mode = fcntl.fcntl(member.fd, fcntl.F_GETFL) & os.O_ACCMODE
            if not member.removed and mode == flags:
                chosen.users += 1
                return fcntl.fcntl(member.fd, fcntl.F_DUPFD_CLOEXEC, 3)
        raise PermissionError(13, os.strerror(13))

    def release(self, path: str, *, at_once: bool) -> None:
        """Note that a node no longer holds its duplicate."""
        number = int(path.removeprefix(PREFIX))
        if number in self._sets:
            self._sets[number].users -= 1
            if at_once:
                self._sweep(number)

    def sweep(self) -> None:
        """Close the marked descriptors, and those that no node uses: the last monitor client has left."""
        for number in list(self._sets):
            self._sweep(number, unclaimed=True)

    def _sweep(self, number: int, *, unclaimed: bool = False) -> None:
        chosen = self._sets[number]
        abandoned = unclaimed and not chosen.users
        for member in [m for m in chosen.members if m.removed or abandoned]:
            os.close(member.fd)
            chosen.members.remove(member)
        if not chosen.members and not chosen.users:
            del self._sets[number]

    def name(self, name: str, fd: int) -> None:
        """Give a descriptor a name; an older one of that name is closed."""
        if name[:1].isdigit():
            os.close(fd)
            raise CommandError("Parameter 'fdname' expects a name not starting with a digit")
        if name in self._named:
            os.close(self._named[name])
        self._named[name] = fd

    def take(self, name: str) -> int:
        """Return a named descriptor, which the caller then owns."""
        if name not in self._named:
            raise CommandError(f"File descriptor named '{name}' has not been found")
        return self._named.pop(name)

    def close_named(self, name: str) -> None:
        """Close a named descriptor."""
        if name not in self._named:
            raise CommandError(f"File descriptor named '{name}' not found")
        os.close(self._named.pop(name))

    def close(self) -> None:
        """Close everything."""
        for fd in self._all():
            os.close(fd)
        self._sets, self._named = {}, {}

    def _all(self) -> Iterator[int]:
        yield from self._named.values()
        for chosen in self._sets.values():
            yield from (member.fd for member in chosen.members)


def _describe(member: Member) -> dict[str, object]:
    return {"fd": member.fd} | ({} if member.opaque is None else {"opaque": member.opaque})
