# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading and writing large files past the page cache, which is slower than the disk and belongs to others.

With O_DIRECT the disk reads and writes the caller's memory itself. Memory, offset and length must be aligned
to the disk's blocks; whole clusters in memory of `aligned` are. A file system that refuses O_DIRECT (tmpfs
before Linux 6.6, some FUSE and network file systems) goes through the page cache; so does all that follows a
piece which is not aligned. There, what was written is sent to the disk at once, and dropped soon after.
"""

import ctypes
import errno
import fcntl
import logging
import math
import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Self

from backupctl.system import durable

_log = logging.getLogger("backupctl.system.direct_io")
_LIBC = ctypes.CDLL(None, use_errno=True)
_MOST_PARTS = 1024  # IOV_MAX
_PUNCH_HOLE_KEEP_SIZE = 3
_PIECES_KEPT = 64  # in the page cache, before they are dropped
_STEP_BYTES = 16 << 20, 256 << 20

_Transfer = Callable[[int, Sequence[memoryview], int], int]


def aligned(size_bytes: int, *, huge_pages: bool = False) -> memoryview:
    """Return zeroed memory that begins at a page, as direct I/O needs it.

    huge_pages: ask for them; each costs as much to pin for direct I/O as a small one. Where there are none
    (memory is fragmented, the kernel was built without) nothing is different.
    """
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A child that is forked during a read would share the pages, and the kernel might give us a copy from
    # before the read (open(2), O_DIRECT: "should never be run concurrently with the fork(2) system call").
    memory.madvise(mmap.MADV_DONTFORK)
    if huge_pages:
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


class _DirectFile:
    """A file that was opened before, opened once more for direct I/O.

    The second descriptor has flags of its own: whoever reads through the first one need not be aligned.
    """

    def __init__(self, descriptor: int, access: int) -> None:
        self.direct = True
        try:
            # The very file, whatever became of its name.
            self._descriptor = os.open(f"/proc/self/fd/{descriptor}", access | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as err:
            self._descriptor = os.dup(descriptor)
            self._go_through_the_cache(err)
        self._lock = Lock()
        self._users = 0
        self._closed = False
        self._close_descriptor = weakref.finalize(self, os.close, self._descriptor)
        self._close_descriptor.atexit = False
        self._cached: deque[tuple[int, int]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the second descriptor. A call that has not ended keeps it until nobody holds this object.

        A thread may hang in a call long after the others have given up. If its descriptor were closed, it
        could go on in another file that got the same number.
        """
        with self._lock:
            self._closed = True
            if not self._users:
                self._close_descriptor()

    @contextmanager
    def _in_use(self) -> Iterator[int]:
        """Yield the descriptor, open until the block ends. Raises OSError after `close`."""
        with self._lock:
            if self._closed:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self._users += 1
        try:
            yield self._descriptor
        finally:
            with self._lock:
                self._users -= 1

    def _move(self, call: _Transfer, parts: Sequence[memoryview], offset: int) -> int:
        """Call preadv or pwritev, again through the page cache if the first one was refused."""
        try:
            done = call(self._descriptor, parts[:_MOST_PARTS], offset)
        except OSError as err:
            if err.errno != errno.EINVAL:
                raise
            # Not "if self.direct": another thread may have got there first.
            self._go_through_the_cache(err)
            done = call(self._descriptor, parts[:_MOST_PARTS], offset)
        if not self.direct:
            self._drop_from_cache(offset, done)
        return done

    def _go_through_the_cache(self, err: OSError) -> None:
        _log.debug("no direct I/O on descriptor %d: %s", self._descriptor, err.strerror)
        self.direct = False
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        if flags & os.O_DIRECT:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)

    def _drop_from_cache(self, offset: int, length: int) -> None:
        """Have the kernel write out a piece now, and forget one that was moved a while ago."""
        with self._lock:
            self._cached.append((offset, length))
            old = self._cached.popleft() if len(self._cached) > _PIECES_KEPT else None
        with suppress(OSError):
            # Linux starts to write out the pages that are dirty, and drops those that are not.
            os.posix_fadvise(self._descriptor, offset, length, os.POSIX_FADV_DONTNEED)
            if old:
                os.posix_fadvise(self._descriptor, *old, os.POSIX_FADV_DONTNEED)


class DirectReader(_DirectFile):
    """Reads an open file. descriptor: stays the caller's, who may close it."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, os.O_RDONLY)

    def read(self, parts: Sequence[memoryview], offset: int) -> int:
        """Fill memory from one run of bytes. Return how many there were: fewer only at the end of the file.

        Several threads may read at once. Raises OSError.
        """
        left, done = _after(parts, 0), 0
        with self._in_use():
            while left:
                now = self._move(os.preadv, left, offset + done)
                if not now:
                    break
                left, done = _after(left, now), done + now
        return done


class DirectWriter(_DirectFile):
    """Writes an open file. descriptor: stays the caller's, who may close it."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, os.O_WRONLY)
        self._aside_lock = Lock()
        self._aside: float = 0  # up to where it was tried, infinite if it is of no use

    def write(self, parts: Sequence[memoryview], offset: int) -> None:
        """Write memory as one run of bytes. It is not durable before `sync`.

        Several threads may write at once. Raises OSError.
        """
        left = _after(parts, 0)
        with self._in_use():
            while left:
                done = self._move(os.pwritev, left, offset)
                if not done:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                left, offset = _after(left, done), offset + done

    def set_aside(self, end: int) -> None:
        """Have space ready up to `end`, in bytes, and a step beyond: writes into it need not grow the file.

        To be called before a write up to `end`; `cut` gives back what was not needed. Where the file system
        cannot do it, or has little space left, nothing happens. Raises OSError.
        """
        if end <= self._aside:
            return
        with self._aside_lock, self._in_use() as file:
            if end > self._aside:
                step = min(max(end // 4, _STEP_BYTES[0]), _STEP_BYTES[1])
                self._aside = _set_aside(file, int(self._aside), end, end + step)

    def punch(self, offset: int, length: int) -> bool:
        """Make a run of bytes zeroes without writing them. Return whether the file or device can do that."""
        with self._in_use() as file:
            run = ctypes.c_int64(offset), ctypes.c_int64(length)
            return not _LIBC.fallocate64(file, _PUNCH_HOLE_KEEP_SIZE, *run)

    def cut(self, end: int) -> None:
        """Make the file end there, in bytes. Raises OSError."""
        with self._in_use() as file:
            os.ftruncate(file, end)

    def sync(self) -> None:
        """Flush all that was written to stable storage. Raises OSError."""
        with self._in_use() as file:
            durable.sync_file(file)


def _after(parts: Sequence[memoryview], done: int) -> list[memoryview]:
    """Return what is left of the parts after `done` bytes."""
    for index, part in enumerate(parts):
        if done < part.nbytes:
            return [part[done:], *parts[index + 1 :]]
        done -= part.nbytes
    return []


def _set_aside(file: int, start: int, needed: int, end: int) -> float:
    """Set space aside from `start` to `end`. Return up to where it need not be tried again."""
    # The guest's own disks may be on this file system: a step must never be what fills it.
    if end - start > _free_bytes(file) // 16:
        return end
    # Not posix_fallocate, which writes zeroes where the file system does not know the call.
    if not _LIBC.fallocate64(file, 0, ctypes.c_int64(start), ctypes.c_int64(end - start)):
        return end
    number = ctypes.get_errno()
    _log.debug("fallocate: %s", os.strerror(number))
    if number in (errno.ENOSPC, errno.EDQUOT):
        # Some of it was set aside. All writes so far ended below `start`, and none is above `needed`: theirs
        # wait for this.
        os.ftruncate(file, max(start, needed))
    return math.inf


def _free_bytes(descriptor: int) -> int:
    found = os.fstatvfs(descriptor)
    return found.f_bavail * found.f_frsize
