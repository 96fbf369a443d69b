# SPDX-License-Identifier: GPL-2.0-or-later
"""The disks of a point as files, until asked to stop, or until all are unmounted.

The host's kernel sees raw bytes of a disk, and no file system in them: what is in the files is for programs
that read disk images.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.errors import Failed
from backupctl.names import DiskName
from backupctl.operations import serve
from backupctl.operations.serve import Export, ServeRequest
from backupctl.repository.vm_directory import VmDirectory
from backupctl.system import fuse, private_dir
from backupctl.system.qemu_tools import Child
from backupctl.targets import mount_points

_GONE_SECONDS = 10.0
_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class MountedDisk:
    """One file. size: in bytes."""

    disk: DiskName
    path: Path
    size: int


def mount(
    directory: VmDirectory,
    request: ServeRequest,
    target: Path,
    *,
    ready: Callable[[tuple[MountedDisk, ...]], None],
    stop: Cancellation,
) -> None:
    """Mount the disks of a point, until `stop` is requested or somebody has unmounted all of them.

    The point is locked against a prune meanwhile. ready: called once when all can be read. Main thread only.
    Raises UsageError, TargetExists, WriteFailed, Failed, and as `serve.serve`.
    """
    fuse.check()
    children: list[tuple[Path, Child]] = []
    with ExitStack() as held:

        def served(exports: tuple[Export, ...]) -> None:
            paths = held.enter_context(mount_points.made(target, [one.disk for one in exports]))
            # Before the empty files are removed, nothing may be mounted over them.
            held.callback(_unmount, children)
            made = held.enter_context(private_dir.directory())
            for one, path in zip(exports, paths, strict=True):
                complaints = held.enter_context(tempfile.TemporaryFile())
                children.append((path, fuse.mount(one.uri, path, made / one.disk, complaints, stop.check)))
            found = zip(exports, paths, strict=True)
            ready(tuple(MountedDisk(one.disk, path, one.size) for one, path in found))

        def is_over() -> bool:
            unmounted = children and all(child.poll() is not None for _, child in children)
            if unmounted or stop.requested:
                held.close()  # while the server still answers, so that no reader meets an error
                return True
            return False

        serve.serve(directory, request, ready=served, stop=_Watched(is_over))


class _Watched(Cancellation):
    """A Cancellation that looks whether something is over each time it is asked."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        super().__init__()
        self._is_over = is_over

    @property
    def requested(self) -> bool:
        """Whether it is over."""
        return self._is_over()


def unmount(target: Path) -> tuple[Path, ...]:
    """Unmount all disks that are mounted in a directory. Raises UsageError, Failed."""
    found = mount_points.mounted(target)
    for path in found:
        fuse.unmount(path)
    return found


def _unmount(children: list[tuple[Path, Child]]) -> None:
    """Remove all mounts, even those in use: their server is about to end. Never raises."""
    while children:
        path, child = children.pop()
        if child.poll() is None:
            with suppress(Failed):
                fuse.unmount(path, in_use_too=True)
            fuse.end(child)
        # Without nbdfuse, a process of fusermount3 unmounts.
        deadline = time.monotonic() + _GONE_SECONDS
        while mount_points.is_listed(path) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
