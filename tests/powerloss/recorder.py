# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line, with a record of all that it does to the repository's directories and files.

Called with TRACE=DIRECTORY REPOSITORY=DIR in its environment it writes `DIRECTORY/trace`, a line of JSON for
each step, and the content of every file at its fsync, under the name of its digest. FORGET=sync_file (or
another function of `durable`) makes that one do nothing: a planted bug.

What is seen: every file and directory made, renamed, linked or removed by Python (its audit events), and
every fsync. What is written into an image is not seen, and need not be:
an image counts as dirty from its making to the first fsync; one that is written in place, while others stand
on it, as `inplace`, and so does one of our own writer that is written after an fsync.
"""

import hashlib
import json
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backupctl.cli.main import main
from backupctl.images import create, nbd_server
from backupctl.images.open_image import OpenImage
from backupctl.system import durable
from backupctl.system.direct_io import DirectWriter
from backupctl.vm.qmp.monitor import Monitor

REPOSITORY = Path(os.environ["REPOSITORY"])
TRACE = Path(os.environ["TRACE"])
RETIRED = "block-dirty-bitmap-remove"
clean: set[int] = set()
"""Inodes of files that were synced, and not written since."""
_log = (TRACE / "trace").open("a")


def note(do: str, path: Path | None = None, **more: Any) -> None:
    """Write a step down, if it is of the repository."""
    if path is None:
        name = None
    elif path == REPOSITORY or REPOSITORY in path.parents:
        name = str(path.relative_to(REPOSITORY))
    else:
        return
    _log.write(json.dumps({"do": do, "path": name, **more}) + "\n")
    _log.flush()


def absolute(path: Any, directory: int = -1) -> Path:
    """Return the path that a call means; directory: the descriptor that it is relative to."""
    if isinstance(path, int):
        return Path(os.readlink(f"/proc/self/fd/{path}"))
    base = os.readlink(f"/proc/self/fd/{directory}") if directory >= 0 else os.getcwd()
    return Path(base, os.fsdecode(path))


def heard(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what Python is about to do, unless it will fail."""
    if event == "open":
        _opened(*arguments)
    elif event == "os.mkdir":
        path = absolute(arguments[0], arguments[2])
        if not os.path.lexists(path):
            note("mkdir", path)
    elif event in ("os.rename", "os.link"):
        source, target = absolute(arguments[0], arguments[2]), absolute(arguments[1], arguments[3])
        if os.path.lexists(source) and (event == "os.rename" or not os.path.lexists(target)):
            note(event[3:], source, to=str(target.relative_to(REPOSITORY)) if in_repository(target) else None)
    elif event in ("os.remove", "os.rmdir"):
        path = absolute(arguments[0], arguments[1])
        if os.path.lexists(path):
            note("remove", path)
    elif event == "os.truncate" and in_repository(absolute(arguments[0])):
        _dirty(absolute(arguments[0]))


def in_repository(path: Path) -> bool:
    return path == REPOSITORY or REPOSITORY in path.parents


def _opened(name: Any, _mode: Any, flags: int) -> None:
    if isinstance(name, int) or not isinstance(flags, int):
        return
    path = absolute(name)
    if path.is_dir():  # to look into it, or for a file without a name, which no crash leaves
        return
    if flags & os.O_CREAT and not os.path.lexists(path):
        note("create", path)
    elif flags & os.O_APPEND and path.stat().st_nlink == 1:
        note("append", path)
    elif flags & os.O_APPEND:
        pass  # it is replaced
    elif flags & (os.O_WRONLY | os.O_RDWR) and path.suffix != ".qcow2":  # that one is opened for QEMU
        _dirty(path)


def _dirty(path: Path) -> None:
    # These two are opened for writing to be locked; what `lock` says is only a help for people.
    if path.name not in ("lock", "repository.json"):
        note("dirty", path)


def synced(descriptor: int) -> None:
    """Note an fsync, with the file's content; then do it."""
    path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    if in_repository(path) and not path.name.endswith(" (deleted)"):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            note("sync", path)
        else:
            content = Path(f"/proc/self/fd/{descriptor}").read_bytes()
            name = hashlib.sha256(content).hexdigest()
            (TRACE / name).write_bytes(content)
            note("sync", path, content=name)
            clean.add(os.fstat(descriptor).st_ino)
    real_fsync(descriptor)


def written(self: DirectWriter, parts: Sequence[memoryview], offset: int) -> None:
    """Note the first write into an image after a sync: each block of it may be old or new until the next."""
    path = Path(os.readlink(f"/proc/self/fd/{self._descriptor}"))
    if (inode := os.fstat(self._descriptor).st_ino) in clean:
        clean.remove(inode)
        note("inplace", path)
    real_write(self, parts, offset)


def served(chain: Sequence[OpenImage], *, writable: bool = False, in_use: bool = False) -> Any:
    """Note an image that is about to be written in place."""
    if writable and in_use:
        note("inplace", chain[0].path)
    return real_serve(chain, writable=writable, in_use=in_use)


def resized(image: OpenImage, size_bytes: int) -> None:
    """Note an image that is about to get another size."""
    note("inplace", image.path)
    real_resize(image, size_bytes)


def told(self: Monitor, actions: Any) -> Any:
    """Note that bitmaps are given up: from here on the new point must be there, whatever happens."""
    if any(action["type"] == RETIRED for action in actions):
        note("retired")
    return real_transaction(self, actions)


real_fsync, real_transaction = os.fsync, Monitor.transaction
real_serve, real_resize, real_write = nbd_server.serve, create.resize, DirectWriter.write


def recorded() -> None:
    """Be the command line, whose steps are noted."""
    os.fsync, Monitor.transaction = synced, told
    nbd_server.serve, create.resize, DirectWriter.write = served, resized, written  # type: ignore[method-assign]
    for forgotten in os.environ.get("FORGET", "").split():
        setattr(durable, forgotten, lambda _path: None)
    sys.addaudithook(heard)
    try:
        main()
    except SystemExit as end:
        if end.code == 0:
            note("reported")
        raise
