# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls of the command line in children of one process that has imported it: that takes most of a call.

`python -m backupctl.drills.fork_server MODULE…` is that process. On its stdin, a socket, it takes requests:
JSON, with the descriptors of the child's stdout and stderr, and of a socket on which its process id is told
and, later, its exit code. It runs no call itself, so each child begins as a process just started would. A
child is killed when nobody listens for its end any more.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any, NoReturn, Self

from backupctl.errors import Failed

CLI = "backupctl.cli.main:main"
MODULES = (
    *(f"backupctl.cli.{name}" for name in ("main", "backup", "list_show", "restore", "verify", "simulate")),
    "backupctl.simulator.process",
)
"""What drills call."""
_REQUEST_BYTES = 1 << 18  # more than a socket sends at once by default
_END_SECONDS = 5.0


@dataclass(frozen=True)
class CallSpec:
    """A function to be called as a program.

    environment: all of it. folder: the working directory. entry: module:function.
    """

    arguments: Sequence[str]
    environment: Mapping[str, str]
    folder: str
    entry: str = CLI


class ForkServer:
    """The process, seen from outside; a context manager that starts and ends it. Threads may share it."""

    def __init__(
        self, modules: Sequence[str] = MODULES, environment: Mapping[str, str] | None = None
    ) -> None:
        self._modules = modules
        self._environment = environment
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Start it; it gets ready while we go on."""
        with contextlib.ExitStack() as held:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._control = held.enter_context(ours)
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-m", __name__, *self._modules],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    env=self._environment,
                )
            held.callback(process.wait, _END_SECONDS)
            held.callback(ours.shutdown, socket.SHUT_RDWR)
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def start(self, program: CallSpec, out: IO[Any], words: IO[Any]) -> "ForkedProcess":
        """Call it in a child. out, words: files for what it writes to stdout and stderr. Raises Failed."""
        news, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.ExitStack() as held:
            held.enter_context(news)
            with theirs:
                request = json.dumps(asdict(program)).encode()
                try:
                    socket.send_fds(self._control, [request], [out.fileno(), words.fileno(), theirs.fileno()])
                except OSError as err:
                    raise Failed(f"the process that starts the drills' runs can't be asked: {err}") from err
            call = ForkedProcess(news)
            held.pop_all()
            return call

    def run(self, program: CallSpec, timeout: float) -> "subprocess.CompletedProcess[str]":
        """Call it and wait for its end; returns what came of it.

        timeout: seconds; after them it is killed. Raises subprocess.TimeoutExpired, Failed.
        """
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as words:
            with self.start(program, out, words) as call:
                code = call.wait(timeout)
            out.seek(0)
            words.seek(0)
            return subprocess.CompletedProcess(program.arguments, code, out.read(), words.read())


class ForkedProcess:
    """A call under way, with the ways of a Popen; a context manager that kills it if it has not ended."""

    def __init__(self, news: socket.socket) -> None:
        """Wait until it has begun. Raises Failed."""
        self._news = news
        self.returncode: int | None = None
        self.pid = self._told()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._news.close()

    def wait(self, timeout: float) -> int:
        """Return its exit code, negative for a signal. Raises subprocess.TimeoutExpired, Failed."""
        if self.returncode is None:
            if not select.select([self._news], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self.returncode = self._told()
            self._news.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return its exit code if it has ended. Raises Failed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, if it has not ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _told(self) -> int:
        told = self._news.recv(100)
        if not told:
            raise Failed("the process that starts the drills' runs has ended")
        return int(told)


@dataclass(eq=False)
class _Child:
    """A call, seen from the process that made it. ended: a pidfd. news: where its caller listens."""

    process: int
    ended: int
    news: socket.socket

    @classmethod
    def begin(cls, request: bytes, descriptors: Sequence[int]) -> "_Child":
        """Fork. descriptors: of its stdout and stderr, and of its news."""
        process = os.fork()
        if process == 0:
            _be(json.loads(request), descriptors)
        for descriptor in descriptors[:2]:
            os.close(descriptor)
        child = cls(process, os.pidfd_open(process), socket.socket(fileno=descriptors[2]))
        child._tell(process)
        return child

    def kill(self) -> None:
        """Send SIGKILL; until `reap` the process id is its own."""
        os.kill(self.process, signal.SIGKILL)

    def reap(self) -> None:
        """Wait for its end and tell of it."""
        _, status = os.waitpid(self.process, 0)
        self._tell(os.waitstatus_to_exitcode(status))
        self.news.close()
        os.close(self.ended)

    def _tell(self, number: int) -> None:
        with contextlib.suppress(OSError):  # nobody may listen
            self.news.send(str(number).encode())


def serve(control: socket.socket) -> None:
    """Take requests until nobody can make any; then all children are killed."""
    children = set[_Child]()
    with selectors.DefaultSelector() as look:
        look.register(control, selectors.EVENT_READ, None)
        while True:
            for key, _ in look.select():
                child = key.data
                if child is None:
                    request, descriptors, _, _ = socket.recv_fds(control, _REQUEST_BYTES, 3)
                    if not request:
                        for left in children:
                            left.kill()
                        return
                    child = _Child.begin(request, descriptors)
                    children.add(child)
                    for watched in (child.ended, child.news):
                        look.register(watched, selectors.EVENT_READ, child)
                elif child in children:  # both may be told of at once
                    for watched in (child.ended, child.news):
                        look.unregister(watched)
                    if key.fileobj is child.news:  # its caller is gone
                        child.kill()
                    child.reap()
                    children.remove(child)


def _be(request: dict[str, Any], descriptors: Sequence[int]) -> NoReturn:
    """Become the program that was asked for."""
    code = 1
    try:
        for number, descriptor in enumerate([os.open(os.devnull, os.O_RDONLY), *descriptors[:2]]):
            os.dup2(descriptor, number)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv = ["backupctl", *request["arguments"]]
        module, _, function = request["entry"].partition(":")
        getattr(importlib.import_module(module), function)()
        code = 0
    except SystemExit as err:
        code = err.code if isinstance(err.code, int) else int(err.code is not None)
    except BaseException:  # noqa: BLE001 - told as the interpreter would
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a Ctrl-C in the terminal our parent makes an end
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()
    with socket.socket(fileno=os.dup(0)) as stdin:
        serve(stdin)
