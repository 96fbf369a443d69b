# SPDX-License-Identifier: GPL-2.0-or-later
"""Images of file systems, made by the distribution's own tools, and devices to read them from."""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from backupctl.filesystems import tree
from backupctl.filesystems.device import check_bounds
from backupctl.filesystems.tree import FileSystem


@dataclass
class Memory:
    """A device in memory, which counts what is read of it."""

    content: bytes
    read_bytes: int = 0

    @property
    def size(self) -> int:
        return len(self.content)

    def read(self, offset: int, length: int) -> bytes:
        check_bounds(self.size, offset, length)
        self.read_bytes += length
        return self.content[offset : offset + length]


def make_tree(directory: Path) -> Path:
    """Make files of every kind that a copy must get right."""
    (directory / "etc").mkdir(parents=True)
    (directory / "etc/hostname").write_text("web\n")
    (directory / "empty").touch()
    (directory / "large").write_bytes(os.urandom(3_000_001))
    with (directory / "sparse").open("wb") as file:
        file.seek(2_000_000)
        file.write(b"x" * 70_000)
        file.truncate(6_000_000)
    (directory / "link").symlink_to("../../etc/shadow")
    (directory / "long-link").symlink_to("a" * 200)
    (directory / "many").mkdir()
    for number in range(400):
        (directory / f"many/file-number-{number}-with-a-long-name").write_text(str(number))
    return directory


def make_ext(image: Path, *options: str, content: Path | None = None, size: str = "24M") -> bytes:
    """Make an ext file system that holds a directory, and return all of it."""
    image.unlink(missing_ok=True)
    source = ["-d", str(content)] if content else []
    run("/sbin/mke2fs", "-q", "-F", *options, *source, str(image), size)
    return image.read_bytes()


def make_xfs(image: Path, content: Path, *options: str) -> bytes:
    """Make an XFS that holds a directory, and return all of it. mkfs.xfs takes a list of all files."""
    lines = ["/", "0 0", "d--755 0 0", *_prototype(content), "$"]
    listed = image.with_suffix(".proto")
    listed.write_text("\n".join(lines) + "\n")
    image.unlink(missing_ok=True)
    with image.open("wb") as file:
        file.truncate(300 << 20)
    run("/sbin/mkfs.xfs", "-q", "-f", "-p", str(listed), *options, str(image))
    return image.read_bytes()


def _prototype(directory: Path) -> Iterator[str]:
    for path in sorted(directory.iterdir()):
        if path.is_symlink():
            yield f"{path.name} l--777 0 0 {path.readlink()}"
        elif path.is_dir():
            yield f"{path.name} d--755 0 0"
            yield from _prototype(path)
            yield "$"
        else:
            yield f"{path.name} ---644 0 0 {path}"


def run(*command: str, given: str = "") -> str:
    """Run a tool; its output."""
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, input=given).stdout


def content_of(filesystem: FileSystem, path: bytes) -> bytes:
    """Return the content of a file."""
    pieces = filesystem.content(tree.find(filesystem, path))
    return b"".join(piece if isinstance(piece, bytes) else bytes(piece) for piece in pieces)


def everything(filesystem: FileSystem) -> dict[str, bytes | str]:
    """Return all files with their content, links with their targets, and directories."""
    found: dict[str, bytes | str] = {}
    for names, node in tree.walk(filesystem, filesystem.root()):
        path = b"/".join(names)
        if node.kind == "file":
            found[path.decode()] = content_of(filesystem, path)
        else:
            found[path.decode()] = filesystem.target(node).decode() if node.kind == "link" else node.kind
    return found


def of_directory(top: Path) -> dict[str, bytes | str]:
    """Return what `everything` finds, of a directory of the host."""
    found: dict[str, bytes | str] = {}
    for path in top.rglob("*"):
        name = str(path.relative_to(top))
        if path.is_symlink():
            found[name] = str(path.readlink())
        else:
            found[name] = "directory" if path.is_dir() else path.read_bytes()
    return found
