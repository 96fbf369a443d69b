# SPDX-License-Identifier: GPL-2.0-or-later
"""The one walk along a path, from the root to its end, by descriptors, at each directory and each link.

Whoever owns a directory, or may write to it, can replace what is in it at any moment, with a link to another
file or with a file of their own. So a look at a path's end alone says nothing of where the path leads next.
"""

import errno
import os
import stat
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

_MOST_LINKS = 40  # as many as the kernel follows
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True)
class Step:
    """A directory, a link, or what the path ends at.

    path: where it is, all links on the way followed. status: None if there is nothing of that name.
    last: whether the path ends here. directory, name: the descriptor of the directory that it is in, open
    until the next step, and its name there.
    """

    path: Path
    status: os.stat_result | None
    last: bool
    directory: int
    name: str

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return self.status is not None and stat.S_ISDIR(self.status.st_mode)

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link, which is followed next."""
        return self.status is not None and stat.S_ISLNK(self.status.st_mode)


def walk(path: Path, *, may_be_missing: bool = False) -> Generator[Step]:
    """Yield each step from the root to the end of a path. Close the iterator if it is left before its end.

    may_be_missing: go on where there is nothing of a name; what follows is taken as it is written. Raises
    OSError; FileNotFoundError without this option.
    """
    rest = list(reversed(path.absolute().parts[1:]))
    place, links, missing = Path("/"), 0, 0
    directory = os.open("/", _DIRECTORY)
    try:
        yield Step(place, os.fstat(directory), not rest, directory, ".")
        while rest:
            name = rest.pop()
            there = place.parent if name == ".." else place / name
            if missing:
                place, missing = there, missing + (-1 if name == ".." else 1)
                yield Step(place, None, not rest, directory, name)
                continue
            try:
                # O_PATH: a pipe or a device is looked at, and not opened.
                found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            except FileNotFoundError:
                if not may_be_missing:
                    raise
                place, missing = there, 1
                yield Step(place, None, not rest, directory, name)
                continue
            try:
                step = Step(there, os.fstat(found), not rest, directory, name)
                yield step
                if step.is_link:
                    links += 1
                    target = Path(_target(found, links, path))
                    rest += reversed(target.parts[1:] if target.is_absolute() else target.parts)
                    if target.is_absolute():
                        place, root = Path("/"), os.open("/", _DIRECTORY)
                        os.close(directory)
                        directory = root
                    continue
                place = there
                directory, found = found, directory
            finally:
                os.close(found)
    finally:
        os.close(directory)


def others_may_write(status: os.stat_result) -> bool:
    """Whether group or others may write to a file, or replace what is in a directory."""
    # In a sticky directory (/tmp) nobody else may rename or remove what is ours.
    sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    return bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)) and not sticky


def _target(link: int, links: int, path: Path) -> str:
    if links > _MOST_LINKS:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return os.readlink("", dir_fd=link)
