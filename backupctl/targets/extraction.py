# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of a guest, written below one directory of the user.

The guest chose their names and kinds. So each is created by its descriptor in a directory that was opened
the same way, a name is one component, nothing that exists is opened or followed, and only regular files and
directories are made: no links, no devices, no set-user-ID, and all belong to whoever runs this.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from backupctl.errors import TargetExists, UsageError, WriteFailed
from backupctl.targets import output

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_MODE, _DIRECTORY_MODE = 0o600, 0o700
_MOST_TIME = 1 << 40  # seconds: what utimensat(2) takes without an error on common file systems


class UnsafeName(Exception):
    """A name that no file of the host may get. The text says why."""


def check_name(name: bytes) -> None:
    """Refuse a name that is not one plain component. Raises UnsafeName."""
    if name in (b"", b".", b".."):
        raise UnsafeName("its name has a meaning of its own")
    if b"/" in name or b"\0" in name:
        raise UnsafeName("its name contains a slash or a null byte")
    if len(name) > 255:
        raise UnsafeName("its name is too long")


@dataclass
class Extraction:
    """A directory that files are written below. descriptor: of the directory, open."""

    path: Path
    descriptor: int
    files: int = field(default=0, init=False)
    directories: int = field(default=0, init=False)
    data_bytes: int = field(default=0, init=False)

    @contextmanager
    def directory(self, name: bytes) -> Iterator["Extraction"]:
        """Make a directory, and yield the extraction below it; what it writes is counted here as well.

        Raises UnsafeName, TargetExists, WriteFailed.
        """
        check_name(name)
        with _writing(self.path, name):
            os.mkdir(name, _DIRECTORY_MODE, dir_fd=self.descriptor)
            # Whatever may be there by now: a link is not followed.
            descriptor = os.open(name, _DIRECTORY, dir_fd=self.descriptor)
        below = Extraction(self.path / os.fsdecode(name), descriptor)
        try:
            yield below
        finally:
            os.close(descriptor)
            self.files += below.files
            self.directories += below.directories + 1
            self.data_bytes += below.data_bytes

    def file(self, name: bytes, content: Iterable[bytes | int], executable: bool, modified: int) -> None:
        """Write a new file. content: its bytes in order, and the lengths of holes. modified: seconds.

        A file that is not complete is removed. Raises UnsafeName, TargetExists, WriteFailed, and what
        `content` raises.
        """
        check_name(name)
        mode = _FILE_MODE | (0o100 if executable else 0)
        with _writing(self.path, name):
            descriptor = os.open(name, _NEW_FILE, mode, dir_fd=self.descriptor)
        try:
            self._fill(descriptor, name, content)
            with suppress(OSError, OverflowError):  # a time that the host's file system cannot store
                moment = max(-_MOST_TIME, min(modified, _MOST_TIME))
                os.utime(descriptor, (moment, moment))
        except BaseException:
            with suppress(OSError):  # the first error is the one to report
                os.unlink(name, dir_fd=self.descriptor)
            raise
        finally:
            os.close(descriptor)
        self.files += 1

    def _fill(self, descriptor: int, name: bytes, content: Iterable[bytes | int]) -> None:
        end = 0
        for piece in content:
            if isinstance(piece, int):
                end += piece
                continue
            with _writing(self.path, name):
                _write_all(descriptor, piece, end)
            end += len(piece)
            self.data_bytes += len(piece)
        with _writing(self.path, name):
            os.ftruncate(descriptor, end)
            os.fsync(descriptor)


@contextmanager
def into(target: Path, repository: Path) -> Iterator[Extraction]:
    """Open the directory that files are written to; it is made if it does not exist.

    Raises UsageError if it is inside the repository, or, as root, if others could exchange it; WriteFailed.
    """
    output.refuse_inside(repository, target)
    place = output.place_of(target)
    try:
        place.mkdir(_DIRECTORY_MODE, exist_ok=True)
        descriptor = os.open(place, _DIRECTORY)
    except (FileExistsError, NotADirectoryError) as err:
        raise UsageError(f"{target} is not a directory") from err
    except OSError as err:
        raise WriteFailed(f"cannot write to {target}: {err.strerror}") from err
    try:
        yield Extraction(target, descriptor)
    finally:
        with suppress(OSError):  # its files are synced; without this a power failure may cost their names
            os.fsync(descriptor)
        os.close(descriptor)


def _write_all(descriptor: int, content: bytes, offset: int) -> None:
    left = memoryview(content)
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written


@contextmanager
def _writing(directory: Path, name: bytes) -> Iterator[None]:
    shown = directory / os.fsdecode(name)
    try:
        yield
    except FileExistsError as err:
        raise TargetExists(f"{shown} already exists", hint="use an empty directory") from err
    except (OSError, ValueError, OverflowError) as err:
        raise WriteFailed(f"cannot write {shown}: {getattr(err, 'strerror', None) or err}") from err
