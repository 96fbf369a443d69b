# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's tools as child processes of ours: they die with us, and what they complain of is kept."""

import ctypes
import errno
import logging
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, TypeAlias

from backupctl.errors import UNTOUCHED, Failed, RepositoryError
from backupctl.system import log

_log = logging.getLogger("backupctl.system.qemu_tools")

Child: TypeAlias = "subprocess.Popen[bytes]"

END_SECONDS = 120.0
_AGAIN_SECONDS = 1.0
_IMG_SECONDS = 300.0
_NO_LOCK = re.compile(r'Failed to get (shared )?"[a-z ]+" lock')
_PR_SET_PDEATHSIG = 1
# Not EIO: with that QEMU tells of tables that lead nowhere, too.
_HINDRANCES = (
    *(errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE, errno.ENFILE),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOLCK),
)
_LIBC = ctypes.CDLL(None, use_errno=True)


def img(
    arguments: Sequence[str],
    descriptors: Sequence[int] = (),
    rights: tuple[int, int] | None = None,
) -> "subprocess.CompletedProcess[str]":
    """Run a `qemu-img` command that takes no time worth telling. Raises RepositoryError.

    descriptors: those that it inherits, under the same numbers. rights: the user and group that it runs as,
    for root only.
    """
    user, group = rights or (None, None)
    command = [img_program(), *arguments]
    _log.debug("run %s", log.Shown(command))
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_IMG_SECONDS,
            check=False,
            pass_fds=descriptors,
            user=user,
            group=group,
            extra_groups=[] if rights else None,
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        raise RepositoryError(f"{command[0]} can't be run: {err}") from err


def img_program() -> str:
    """Name the qemu-img to use."""
    return os.environ.get("QEMU_IMG", "qemu-img")


def server_program() -> str:
    """Name the qemu-storage-daemon to use."""
    return os.environ.get("QEMU_STORAGE_DAEMON", "qemu-storage-daemon")


def require_tools() -> None:
    """Raise RepositoryError if one of QEMU's tools is not there: then nothing could be told of an image."""
    for program in (img_program(), server_program()):
        if shutil.which(program) is None:
            raise RepositoryError(f"{program} is needed, and not found", state=UNTOUCHED)


def start(
    command: Sequence[str],
    *,
    complaints: IO[bytes],
    output: int = subprocess.DEVNULL,
    environment: Mapping[str, str] | None = None,
    descriptors: Sequence[int] = (),
) -> Child:
    """Start a child that dies with us. Raises Failed.

    complaints: gets its stderr. descriptors: those that it inherits, under the same numbers.
    """
    _log.debug("start %s", log.Shown(list(command)))
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=complaints,
            env={**os.environ, **(environment or {})},
            pass_fds=descriptors,
            start_new_session=True,  # a Ctrl-C in the terminal is ours to handle, not the child's
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - one system call, no lock can be held in it
        )
    except OSError as err:
        raise Failed(f"{command[0]} can't be started: {err.strerror}") from err


def end(server: Child) -> int | None:
    """End a qemu-storage-daemon with SIGTERM, on which it closes its images properly; returns its status.

    None if it has not ended after `END_SECONDS`. The signal is sent again and again: its handler sets a
    flag and wakes nobody, so one that comes between the main loop's look at the flag and its wait for
    events is not noticed (QEMU 7.2.22, once in some 30,000 ends).
    """
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            return server.wait(_AGAIN_SECONDS)
    return None


def said(complaints: IO[bytes]) -> str:
    """Return the last line of what a child complained of."""
    complaints.seek(0)
    text = complaints.read(20_000).decode(errors="replace").strip()
    return text.splitlines()[-1][:500] if text else "it said nothing"


def hindered(said_by_qemu: str) -> bool:
    """Whether QEMU's complaint is one of the operating system's that tells nothing of the image's bytes."""
    return any(os.strerror(number) in said_by_qemu for number in _HINDRANCES)


def in_use(said_by_qemu: str) -> bool:
    """Whether QEMU's complaint is that somebody else has an image open and locked."""
    return "Is another process using the image" in said_by_qemu or bool(_NO_LOCK.search(said_by_qemu))


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
