# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs a program that the configuration names, and always ends: with its process group, after a time limit.

The program must be one that nobody but root and we could have written (`trusted.py`): it gets our rights. It
is started as it is listed, without a shell, in a session of its own.
"""

import logging
import os
import select
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from backupctl.errors import UsageError
from backupctl.system import trusted

_log = logging.getLogger("backupctl.system.programs")

SENDMAIL = "/usr/sbin/sendmail"
"""Where each mail system has its command (Filesystem Hierarchy Standard 3.0, 4.10.2)."""
_LAST_LINES = 5
_MOST_LOGGED = 1000  # lines
_MOST_CHARACTERS = 500  # of a line
_PIECE_BYTES = 1 << 16
_MOST_LEFT = 16  # pieces that are still in the pipe when a program has ended
_LOOK_SECONDS = 0.05
_GRACE_SECONDS = 2.0


class ProgramFailed(Exception):
    """A program could not be started, failed, or was ended. The text says which and why."""


def _nothing() -> None:
    pass


def run(
    command: Sequence[str],
    stdin: bytes,
    environment: Mapping[str, str],
    limit_seconds: float,
    check: Callable[[], None] = _nothing,
) -> None:
    """Run a program to its end; what it prints is logged. command: its absolute path, and its arguments.

    environment: added to ours. check: called while it runs, and may raise to end it. Raises ProgramFailed,
    or what `check` raises.
    """
    if why := objection(Path(command[0])):
        raise ProgramFailed(why.message)
    with _file_of(stdin) as given:
        try:
            process = subprocess.Popen(
                command,
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                cwd="/",
                start_new_session=True,  # a group of its own, to be ended with all that it has started
            )
        except OSError as err:
            raise ProgramFailed(f"{command[0]} cannot be started: {err.strerror}") from err
    assert process.stdout is not None
    with process.stdout as pipe:
        printed = _Printed(command[0], pipe)
        try:
            code = _wait(process, printed, time.monotonic() + limit_seconds, check)
        except BaseException:
            _end(process)
            raise
        finally:
            for _ in range(_MOST_LEFT):
                printed.read()
    if code is None:
        raise ProgramFailed(f"{command[0]} took longer than {limit_seconds:g} s and was ended{printed.last}")
    if code:
        how = f"was killed by {_name(-code)}" if code < 0 else f"failed with exit code {code}"
        raise ProgramFailed(f"{command[0]} {how}{printed.last}")


def objection(program: Path) -> UsageError | None:
    """Return why a program is not started; None if nothing speaks against it."""
    try:
        return trusted.objection(program)
    except OSError as err:
        return UsageError(f"{program} cannot be started: {err.strerror}")


def _file_of(content: bytes) -> IO[bytes]:
    """Return a file in memory. A pipe would block us if the program did not read it."""
    file = os.fdopen(os.memfd_create("backupctl-stdin", os.MFD_CLOEXEC), "w+b")
    file.write(content)
    file.seek(0)
    return file


class _Printed:
    """What a program prints: logged line by line, the last lines kept. Reading it never waits."""

    def __init__(self, program: str, pipe: IO[bytes]) -> None:
        self._name = Path(program).name
        self._descriptor = pipe.fileno()
        os.set_blocking(self._descriptor, False)
        self._rest = b""
        self._lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._left = _MOST_LOGGED
        self.ended = False

    def read(self) -> None:
        """Read what there is, a piece of it at most."""
        if self.ended:
            return
        try:
            piece = os.read(self._descriptor, _PIECE_BYTES)
        except BlockingIOError:
            return
        self.ended = not piece
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if self.ended or len(self._rest) > _MOST_CHARACTERS:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            self._add(line)

    def wait(self, seconds: float) -> None:
        """Wait until there is something to read, or so long."""
        if self.ended:
            time.sleep(seconds)
        else:
            select.select([self._descriptor], [], [], seconds)

    def _add(self, line: bytes) -> None:
        text = line[:_MOST_CHARACTERS].decode(errors="backslashreplace").strip()
        if not text:
            return
        self._lines.append(text)
        if self._left:
            self._left -= 1
            _log.info("%s: %s", self._name, text)

    @property
    def last(self) -> str:
        """The last lines, to be added to a message."""
        rest = [self._rest.decode(errors="backslashreplace").strip()] if self._rest.strip() else []
        return "".join(
            f"; {line}" if number else f": {line}" for number, line in enumerate([*self._lines, *rest])
        )


def _wait(
    process: "subprocess.Popen[bytes]", printed: _Printed, deadline: float, check: Callable[[], None]
) -> int | None:
    """Return the program's exit code; None if it took too long, and was ended."""
    while process.poll() is None:
        check()
        if time.monotonic() > deadline:
            _end(process)
            return None
        printed.wait(_LOOK_SECONDS)
        printed.read()
    return process.returncode


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a program and its process group."""
    if process.returncode is not None:
        return
    # It is not waited for before the last signal: its process id, which is that of the group, would be free.
    _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if time.monotonic() > deadline:
            break
        time.sleep(_LOOK_SECONDS)
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):  # it may have got other rights: sudo
        os.killpg(process.pid, number)


def _name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
