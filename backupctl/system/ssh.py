# SPDX-License-Identifier: GPL-2.0-or-later
"""A program on another host, run over ssh: lines to and from it, and unix sockets of its own forwarded here.

::

    this process ── pipe ──► ssh ════════════ one connection ════════════► sshd ── pipe ──► program
    LOCAL/name  ◄────────── ssh ◄── a channel for each client ──────────► sshd ──────────► REMOTE/name

OpenSSH's own client does it all: keys, jump hosts, ports and ciphers are those of the user's ssh_config. What
the safety of a backup rests on is set here and cannot be undone there: no question is asked, the host's key
is checked, and a silent line ends within 15 s. The end of our pipe is the end of the program's input, so the
program notices our death as it notices a line that was cut.
"""

import logging
import os
import select
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from backupctl.errors import UNTOUCHED, Failed, Refused, UsageError
from backupctl.system import private_dir, trusted
from backupctl.system.address import Address

CONFIG_VARIABLE = "BACKUPCTL_SSH_CONFIG"
"""The environment variable that names another ssh_config, read in place of the user's and the system's."""
CONNECT_SECONDS = 15
_ALIVE_SECONDS, _ALIVE_COUNT = 5, 3
_MOST_LINE_BYTES = 4 << 20
_MOST_ERROR_BYTES = 4096
_END_SECONDS = 5.0
_LOOK_SECONDS = 0.2
_OPTIONS = (
    "BatchMode=yes",
    "StrictHostKeyChecking=yes",
    f"ConnectTimeout={CONNECT_SECONDS}",
    f"ServerAliveInterval={_ALIVE_SECONDS}",
    f"ServerAliveCountMax={_ALIVE_COUNT}",
    "ExitOnForwardFailure=yes",
    "ControlMaster=no",  # a connection that other commands share would end when they like
    "ControlPath=none",
    "ForwardX11=no",
    "ForwardAgent=no",
    "PermitLocalCommand=no",
    "RemoteCommand=none",
    "RequestTTY=no",
    "StreamLocalBindMask=0177",
    "LogLevel=ERROR",
)

_log = logging.getLogger("backupctl.system.ssh")


class Ended(NamedTuple):
    """How ssh ended. code: 255 if ssh itself failed, or the program's. text: its last words."""

    code: int
    text: str


class Connection:
    """A running program on another host; `connect` makes one.

    local: the directory here in which the forwarded sockets are.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", errors: IO[bytes], local: Path) -> None:
        self.local = local
        self._process = process
        self._errors = errors
        self._received = bytearray()

    @property
    def alive(self) -> bool:
        """Whether ssh still runs."""
        return self._process.poll() is None

    def send(
        self, content: bytes, seconds: float = CONNECT_SECONDS, look: Callable[[], None] = lambda: None
    ) -> None:
        """Write to the program's input. look: called while nobody takes it; what it raises ends the wait.

        Raises OSError, TimeoutError if not all was taken after so many seconds.
        """
        assert self._process.stdin is not None
        left, target = memoryview(content), self._process.stdin.fileno()
        deadline = time.monotonic() + seconds
        while left:
            if select.select([], [target], [], _LOOK_SECONDS)[1]:
                left = left[os.write(target, left[: select.PIPE_BUF]) :]
            elif time.monotonic() > deadline:
                raise TimeoutError
            else:
                look()

    def line(self, deadline: float) -> bytes:
        """Return the next line of the program's output, waiting until the deadline of `time.monotonic`.

        Raises TimeoutError, EOFError, ValueError if the line has no end.
        """
        assert self._process.stdout is not None
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > _MOST_LINE_BYTES:
                raise ValueError("a line without an end")
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise TimeoutError
            content = os.read(self._process.stdout.fileno(), 65536)
            if not content:
                raise EOFError
            self._received += content
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line

    def ended(self) -> Ended:
        """Return how ssh ended, after the end of its output."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        with suppress(OSError):
            size = self._errors.seek(0, os.SEEK_END)
            self._errors.seek(max(size - _MOST_ERROR_BYTES, 0))
        text = self._errors.read(_MOST_ERROR_BYTES).decode(errors="replace")
        return Ended(
            self._process.returncode if self._process.returncode is not None else -1, " ".join(text.split())
        )

    def close(self) -> None:
        """End the program's input, and ssh if it does not end by itself soon. Never raises."""
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def connect(address: Address, program: str, remote: Path, names: Sequence[str]) -> Iterator[Connection]:
    """Run a program on the host of an address for as long as the block lasts.

    program: as the remote user's shell takes it. remote: the directory there that will have the sockets of
    these names; each is forwarded to one of its name here. Raises Failed, Refused.
    """
    with private_dir.directory() as local, tempfile.TemporaryFile() as errors:
        forwards = [f"-L{local / name}:{remote / name}" for name in names]
        command = [*_command(address), *forwards, "--", address.host or "", program]
        _log.debug("run %s", shlex.join(command[:-1]))
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd="/",
                start_new_session=True,  # a terminal's Ctrl-C asks us to end, and we end the program in order
                bufsize=0,
            )
        except OSError as err:
            raise Failed(f"cannot run ssh: {err.strerror}", hint="apt install openssh-client") from err
        made = Connection(process, errors, local)
        try:
            yield made
        finally:
            made.close()


def command_to(address: Address) -> list[str]:
    """Return how a person calls ssh to get to the host of an address; a command may follow."""
    command = ["ssh", *(["-p", str(address.port)] if address.port else [])]
    return [*command, f"{address.user}@{address.host}" if address.user else str(address.host)]


def _refuse_untrusted(config: Path) -> None:
    """Refuse a configuration that others could change: it may name programs, which run with our rights.

    ssh itself checks only the one in the user's home directory. Raises Refused.
    """
    try:
        why = trusted.objection(config)
    except OSError as err:
        why = UsageError(f"cannot open {config}: {err.strerror}")
    if why is not None:
        raise Refused(
            f"{CONFIG_VARIABLE} is set, but {why.message}", state=UNTOUCHED, next_command=why.next_command
        )


def _command(address: Address) -> list[str]:
    command = ["ssh", "-T", "-a", "-x"]
    if config := os.environ.get(CONFIG_VARIABLE):
        _refuse_untrusted(Path(config))
        command += ["-F", config]
    for option in _OPTIONS:
        command += ["-o", option]
    if address.user:
        command += ["-l", address.user]
    if address.port:
        command += ["-p", str(address.port)]
    return command
