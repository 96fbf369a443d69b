# SPDX-License-Identifier: GPL-2.0-or-later
"""Copies files and directories of a point into a directory of the user."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from backupctl.errors import FilesystemError, WriteFailed
from backupctl.filesystems import tree
from backupctl.filesystems.tree import Node
from backupctl.operations.files.run import Found
from backupctl.targets import extraction
from backupctl.targets.extraction import Extraction, UnsafeName
from backupctl.vm.filling import Filling

_MOST_SKIPPED = 1000
_MOST_DEPTH = 100
_MOST_ENTRIES = 50_000_000


@dataclass(frozen=True)
class Skipped:
    """Something that was not copied. path: in the guest."""

    path: str
    why: str


@dataclass
class ExtractReport:
    """What was copied. data_bytes: without holes. skipped: the first thousand things that were not copied."""

    target: Path
    files: int = 0
    directories: int = 0
    data_bytes: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    skipped_count: int = 0


def extract(found: tuple[Found, ...], target: Path, repository: Path) -> ExtractReport:
    """Copy what was found to `target`, each under its last name; directories with all that is in them.

    Symbolic links, devices, pipes and sockets are skipped. Nothing is overwritten. If it fails, what was
    copied stays; only the file under way is removed. It ends before it takes the room of a VM whose disks
    are on the same file system. Raises UsageError, TargetExists, WriteFailed, FilesystemError, DamageFound,
    RepositoryError, Interrupted.
    """
    report = ExtractReport(target)
    with extraction.into(target, repository) as out:
        filling = Filling(target)
        for one in found:
            _Copy(one, report, filling).run(out)
        report.files, report.directories, report.data_bytes = out.files, out.directories, out.data_bytes
    return report


class _Copy:
    """The copying of one path.

    Directories that are met twice, and more data than the file system can hold, are signs of one that was
    made to fill the disk of the host.
    """

    def __init__(self, found: Found, report: ExtractReport, filling: Filling) -> None:
        self._found = found
        self._filling = filling
        self._filesystem = found.filesystem
        self._report = report
        self._met: set[int] = set()
        self._left_bytes = found.place.size
        self._left_entries = _MOST_ENTRIES

    def run(self, out: Extraction) -> None:
        """Copy it."""
        name = self._found.path.rpartition(b"/")[2]
        if name or self._found.node.kind != "directory":
            self._copy(out, self._found.path.rpartition(b"/")[0], name, self._found.node)
            return
        self._directory(out, b"", self._found.node)  # the root: all that is in it

    def _copy(self, out: Extraction, above: bytes, name: bytes, node: Node) -> None:
        path = above + b"/" + name
        self._left_entries -= 1
        if self._left_entries < 0:
            raise FilesystemError("there are more files than a file system can hold")
        try:
            if node.unreadable:
                self._skip(path, node.unreadable)
            elif node.kind == "directory":
                with out.directory(name) as below:
                    self._directory(below, path, node)
            elif node.kind == "file":
                out.file(name, self._content(node), bool(node.mode & 0o100), node.modified)
            else:
                self._skip(path, _kind_of(node))
        except UnsafeName as err:
            self._skip(path, str(err))

    def _directory(self, out: Extraction, path: bytes, node: Node) -> None:
        if node.number in self._met:
            raise FilesystemError(f"damaged: the directory {tree.shown(path)} is there twice")
        if path.count(b"/") > _MOST_DEPTH:
            raise FilesystemError(f"directories are nested more than {_MOST_DEPTH} levels deep")
        self._met.add(node.number)
        for name, child in self._filesystem.entries(node):
            self._copy(out, path, name, child)

    def _content(self, node: Node) -> Iterator[bytes | int]:
        for piece in self._filesystem.content(node):
            if not isinstance(piece, int):
                self._filling.check(WriteFailed)
                self._left_bytes -= len(piece)
                if self._left_bytes < 0:
                    raise FilesystemError("there is more data in its files than the file system can hold")
            yield piece

    def _skip(self, path: bytes, why: str) -> None:
        self._report.skipped_count += 1
        if len(self._report.skipped) < _MOST_SKIPPED:
            self._report.skipped.append(Skipped(tree.shown(path), why))


def _kind_of(node: Node) -> str:
    kinds = {"link": "a symbolic link", "unknown": "an unknown kind of file"}
    return kinds.get(node.kind, f"a {node.kind}")
