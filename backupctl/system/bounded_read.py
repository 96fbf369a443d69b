# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads small plain files of the host that others may have put there, such as those of QEMU's own user.

A link at the end of the path is refused, and so is one on the way that is neither root's nor ours: whoever
may write to a directory could lead root to another file with it. The file is opened once, in the last
directory of the walk, and what is checked and read is its descriptor.
"""

import os
import stat
from contextlib import closing
from pathlib import Path

from backupctl.system import path_walk


class Unusable(Exception):
    """The file cannot be used. The text says which one, and why."""


def read(path: Path, most_bytes: int) -> bytes:
    """Return the content of a regular file of at most `most_bytes`. Raises Unusable."""
    descriptor, size = open_plain(path, most_bytes)
    try:
        content = read_at(descriptor, 0, size + 1)
    except OSError as err:
        raise Unusable(f"cannot read {path}: {err.strerror}") from err
    finally:
        os.close(descriptor)
    if len(content) != size:
        raise Unusable(f"cannot read {path}: its size changed meanwhile")
    return content


def open_plain(path: Path, most_bytes: int) -> tuple[int, int]:
    """Open a regular file of at most `most_bytes`; return its descriptor and its size. Raises Unusable."""
    try:
        descriptor = _opened(path)
    except OSError as err:
        raise Unusable(f"cannot open {path}: {err.strerror}") from err
    size = os.fstat(descriptor).st_size
    if size > most_bytes:
        os.close(descriptor)
        raise Unusable(f"{path} is too large: {size} bytes, and at most {most_bytes >> 20} MiB are stored")
    return descriptor, size


def read_at(descriptor: int, offset: int, length: int) -> bytes:
    """Return up to `length` bytes from `offset` on; fewer only at the end of the file. Raises OSError."""
    found = bytearray()
    while len(found) < length:
        part = os.pread(descriptor, length - len(found), offset + len(found))
        if not part:
            break
        found += part
    return bytes(found)


def names(directory: Path, most: int) -> list[str]:
    """Return the names in a directory, sorted, at most so many. Raises Unusable."""
    try:
        found = sorted(one.name for one in directory.iterdir())
    except OSError as err:
        raise Unusable(f"cannot read the directory {directory}: {err.strerror}") from err
    if len(found) > most:
        raise Unusable(f"the directory {directory} has {len(found)} files, and at most {most} are stored")
    return found


def _opened(path: Path) -> int:
    """Walk to a file, and open it. Raises OSError, Unusable."""
    with closing(path_walk.walk(path)) as steps:
        for step in steps:
            assert step.status is not None
            if step.last:
                return _open_last(path, step)
            if step.is_link and step.status.st_uid not in (0, os.geteuid()):
                raise Unusable(
                    f"cannot open {path}: {step.path} is a symbolic link of user {step.status.st_uid}"
                )
    raise AssertionError("a walk ends with a last step")


def _open_last(path: Path, step: path_walk.Step) -> int:
    assert step.status is not None
    if not stat.S_ISREG(step.status.st_mode):  # a pipe or a device is not even opened
        raise Unusable(f"cannot open {path}: it is not a regular file")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(step.name, flags, dir_fd=step.directory)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Unusable(f"cannot open {path}: it is not a regular file")
    return descriptor
