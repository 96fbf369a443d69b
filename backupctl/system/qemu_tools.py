# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's tools as child processes: they are killed when we end, and their error messages are kept."""

import errno
import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, TypeAlias

from backupctl.errors import Failed, RepositoryError
from backupctl.system import log, parent_death

_log = logging.getLogger("backupctl.system.qemu_tools")

Child: TypeAlias = "subprocess.Popen[bytes]"

END_SECONDS = 120.0
_AGAIN_SECONDS = 1.0
_IMG_SECONDS = 300.0
_VERSION_SECONDS = 10.0
_VERSION_BYTES = 200
_NO_LOCK = re.compile(r'Failed to get (shared )?"[a-z ]+" lock')
# Not EIO: QEMU reports invalid tables with it, too.
_HINDRANCES = (
    *(errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE, errno.ENFILE),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOLCK),
)


def img(
    arguments: Sequence[str],
    descriptors: Sequence[int] = (),
    rights: tuple[int, int] | None = None,
) -> "subprocess.CompletedProcess[str]":
    """Run a `qemu-img` command that takes a short time. Raises RepositoryError.

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
        raise RepositoryError(f"cannot run {command[0]}: {err}") from err


def img_program() -> str:
    """Return the qemu-img to use."""
    return os.environ.get("QEMU_IMG", "qemu-img")


def server_program() -> str:
    """Return the qemu-storage-daemon to use."""
    return os.environ.get("QEMU_STORAGE_DAEMON", "qemu-storage-daemon")


def version(program: str) -> str:
    """Return what one of the tools says of its version, such as "7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)".

    Raises RepositoryError.
    """
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, timeout=_VERSION_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as err:
        raise RepositoryError(f"cannot run {program}: {err}") from err
    first = done.stdout[:_VERSION_BYTES].decode(errors="replace").partition("\n")[0]
    return first.partition(" version ")[2].strip() or first.strip()


def system_program() -> str:
    """Return the QEMU that boots a throw-away VM."""
    return os.environ.get("QEMU_SYSTEM", "qemu-system-x86_64")


def start(
    command: Sequence[str],
    *,
    complaints: IO[bytes],
    output: int = subprocess.DEVNULL,
    environment: Mapping[str, str] | None = None,
    descriptors: Sequence[int] = (),
) -> Child:
    """Start a child that the kernel kills when we end. Raises Failed.

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
            preexec_fn=parent_death.signalled(signal.SIGKILL),  # noqa: PLW1509 - one system call, no lock can be held in it
        )
    except OSError as err:
        raise Failed(f"cannot start {command[0]}: {err.strerror}") from err


def end(server: Child) -> int | None:
    """Stop a qemu-storage-daemon with SIGTERM, on which it closes its images cleanly; returns its status.

    None if it has not ended after `END_SECONDS`. The signal is sent repeatedly: its handler only sets a flag
    (`qemu_system_killed` in storage-daemon/qemu-storage-daemon.c), so a signal between the main loop's check
    of the flag and its wait for events is lost (QEMU 7.2.22, once in some 30,000 ends).
    """
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            return server.wait(_AGAIN_SECONDS)
    return None


def last_message(complaints: IO[bytes]) -> str:
    """Return the last line of a child's error messages."""
    complaints.seek(0)
    text = complaints.read(20_000).decode(errors="replace").strip()
    return text.splitlines()[-1][:500] if text else "no error message"


def is_os_error(message: str) -> bool:
    """Whether QEMU's message is an error of the operating system, which says nothing of the image's bytes."""
    return any(os.strerror(number) in message for number in _HINDRANCES)


def in_use(message: str) -> bool:
    """Whether QEMU's message is that another process keeps an image locked."""
    return "Is another process using the image" in message or bool(_NO_LOCK.search(message))
