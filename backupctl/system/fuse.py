# SPDX-License-Identifier: GPL-2.0-or-later
"""nbdfuse, which shows an NBD export as a file, and fusermount3, which removes such a mount.

Both are children that end with us. `auto_unmount` leaves the unmounting to a process of fusermount3, which
does it when nbdfuse ends, by whatever cause (mount.fuse3(8)).
"""

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from backupctl.errors import Failed, UsageError
from backupctl.system import qemu_tools
from backupctl.system.qemu_tools import Child

_START_SECONDS = 30.0
_UNMOUNT_SECONDS = 20.0
_LOOK_SECONDS = 0.05
_PROGRAMS = {"nbdfuse": "libnbd-bin", "fusermount3": "fuse3"}
_DEVICE = Path("/dev/fuse")


def check() -> None:
    """Raise UsageError, naming what is to be installed, if nothing can be mounted here."""
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        packages = " ".join(_PROGRAMS[name] for name in missing)
        raise UsageError(
            f"cannot mount: {' and '.join(missing)} not found",
            hint="`backupctl serve` and `backupctl files` need neither",
            next_command=f"apt install {packages}",
        )
    if not _DEVICE.exists():
        raise UsageError(
            f"cannot mount: there is no {_DEVICE}",
            hint="load the kernel module fuse, or use `backupctl files`",
        )


def mount(uri: str, file: Path, ready: Path, complaints: IO[bytes], stop: Callable[[], None]) -> Child:
    """Show an export as a read-only file over an existing one; only our user may read it.

    ready: a name for a file that nbdfuse writes when it serves. stop: called while we wait; may raise. Main
    thread only. Raises Failed.
    """
    command = ["nbdfuse", "-r", "-o", "auto_unmount", "-P", str(ready), str(file), uri]
    child = qemu_tools.start(command, complaints=complaints)
    try:
        _await(child, file, ready, complaints, stop)
    except BaseException:
        end(child)
        raise
    return child


def _await(child: Child, file: Path, ready: Path, complaints: IO[bytes], stop: Callable[[], None]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not ready.exists():
        stop()
        if child.poll() is not None:
            raise Failed(f"cannot mount {file}: {qemu_tools.last_message(complaints)}")
        if time.monotonic() > deadline:
            raise Failed(f"cannot mount {file}: nbdfuse did not start within {_START_SECONDS:g} s")
        time.sleep(_LOOK_SECONDS)


def end(child: Child) -> None:
    """End nbdfuse; fusermount3 then unmounts its file."""
    child.kill()
    child.wait()


def unmount(file: Path, *, in_use_too: bool = False) -> None:
    """Unmount a file. in_use_too: even if somebody has it open. Raises Failed."""
    command = ["fusermount3", "-u", *(["-z"] if in_use_too else []), "--", str(file)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_UNMOUNT_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        raise Failed(f"cannot unmount {file}: {err}") from err
    if done.returncode:
        raise Failed(
            f"cannot unmount {file}: {done.stderr.strip()[:200]}", hint="end the programs that have it open"
        )
