# SPDX-License-Identifier: GPL-2.0-or-later
"""What every file system is to us: directories with entries, and files whose content is read in order.

Names and targets of links are bytes, since guests may use any encoding. None of them is ever part of a path
of the host; `targets/extraction.py` checks them once more.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from backupctl.errors import FilesystemError, UsageError

Kind = Literal["file", "directory", "link", "device", "pipe", "socket", "unknown"]
MOST_NAME_BYTES = 255 * 4
MOST_LINK_BYTES = 4096


@dataclass(frozen=True)
class Node:
    """A file, directory, or something else. All that is here was written by the guest.

    number: what the file system knows it by. mode: permissions, without the kind. size: in bytes. modified:
    seconds since 1970. unreadable: why its content cannot be read, "" if it can be.
    """

    number: int
    kind: Kind
    mode: int = 0
    owner: int = 0
    group: int = 0
    size: int = 0
    modified: int = 0
    unreadable: str = ""
    detail: object = field(default=None, compare=False, repr=False)


class FileSystem(Protocol):
    """A file system. Each call raises FilesystemError for a structure that cannot be right."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What may be missing in it, as far as it is known."""

    def root(self) -> Node:
        """Return the root directory."""

    def entries(self, directory: Node) -> Iterator[tuple[bytes, Node]]:
        """Yield what is in a directory, without "." and ".."; a name may come twice if it is damaged."""

    def content(self, file: Node) -> Iterator[bytes | int]:
        """Yield the content of a file in order: bytes, or the length of a hole."""

    def target(self, link: Node) -> bytes:
        """Return what a symbolic link refers to."""


def find(filesystem: FileSystem, path: bytes) -> Node:
    """Return what a path leads to. Symbolic links are not followed. Raises UsageError, FilesystemError."""
    node = filesystem.root()
    for name in components(path):
        if node.kind != "directory":
            raise missing(path, "a part of it is not a directory")
        found = next((child for each, child in filesystem.entries(node) if each == name), None)
        if found is None:
            raise missing(path, "no such file or directory")
        node = found
    return node


def missing(path: bytes, why: str) -> UsageError:
    """Return the error for a path that leads nowhere."""
    return UsageError(f"{shown(path)}: {why}")


def components(path: bytes) -> list[bytes]:
    """Return the names of a path. Raises UsageError for "..", which could only surprise."""
    names = [name for name in path.split(b"/") if name not in (b"", b".")]
    if b".." in names:
        raise UsageError(f"{shown(path)}: '..' is not supported in a path of the guest")
    return names


def shown(name: bytes) -> str:
    """Return a name for messages; what is not UTF-8 is escaped."""
    return name.decode("utf-8", "backslashreplace")


def walk(
    filesystem: FileSystem, top: Node, most_depth: int = 200
) -> Iterator[tuple[tuple[bytes, ...], Node]]:
    """Yield all below a directory, each directory before what is in it, with the names on the way.

    A directory that is met a second time is damage: the walk of a malicious one would not end. Raises
    FilesystemError.
    """
    met = {top.number}
    waiting: list[tuple[tuple[bytes, ...], Iterator[tuple[bytes, Node]]]] = []
    if top.kind == "directory":
        waiting.append(((), filesystem.entries(top)))
    while waiting:
        names, entries = waiting[-1]
        entry = next(entries, None)
        if entry is None:
            waiting.pop()
            continue
        path, node = (*names, entry[0]), entry[1]
        if node.kind == "directory":
            if node.number in met:
                raise FilesystemError(f"damaged: the directory {shown(b'/'.join(path))} is there twice")
            if len(path) > most_depth:
                raise FilesystemError(f"directories are nested more than {most_depth} levels deep")
            met.add(node.number)
            waiting.append((path, filesystem.entries(node)))
        yield path, node
