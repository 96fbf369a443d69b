# SPDX-License-Identifier: GPL-2.0-or-later
"""A fork server: calls of the command line in children of one process that has already imported it.

Most of the time of a short call is the import. `python -m backupctl.drills.fork_server MODULE…` is the
server. Its stdin is a socket for requests: JSON, with the descriptors of the child's stdout and stderr, and
of a socket on which the server sends the child's process id and, later, its exit code. The server runs no
call itself, so each child starts as a new process would. A child is killed when its caller closes that
socket.
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
from pathlib import Path
from typing import IO, Any, NoReturn, Self

from backupctl.errors import Failed

CLI = "backupctl.cli.main:main"
MODULES = (
    *(f"backupctl.cli.{name}" for name in ("main", "backup", "list_show", "restore", "verify", "simulate")),
    "backupctl.simulator.process",
)
"""Modules that drills call."""
_REQUEST_BYTES = 1 << 18  # more than the default size of a message on a socket
_END_SECONDS = 5.0


@dataclass(frozen=True)
class CallSpec:
    """A function to be called as a program.

    environment: all of it. directory: the working directory. entry: module:function.
    """

    arguments: Sequence[str]
    environment: Mapping[str, str]
    directory: str
    entry: str = CLI


def own_environment() -> dict[str, str]:
    """Return our environment, in which a Python finds this backupctl, wherever it is installed."""
    ours = str(Path(__file__).resolve().parents[2])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH")))),
    }


class ForkServer:
    """The client side; a context manager that starts and ends the server. Threads may share it."""

    def __init__(
        self, modules: Sequence[str] = MODULES, environment: Mapping[str, str] | None = None
    ) -> None:
        self._modules = modules
        self._environment = environment
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Start it, without waiting until it is ready."""
        with contextlib.ExitStack() as held:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._control = held.enter_context(ours)
            with theirs:
                process = subprocess.Popen(
                    # -P: not a module of the current directory.
                    [sys.executable, "-P", "-m", __name__, *self._modules],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    env=self._environment or own_environment(),
                )
            held.callback(process.wait, _END_SECONDS)
            held.callback(ours.shutdown, socket.SHUT_RDWR)
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def start(self, program: CallSpec, out: IO[Any], stderr: IO[Any]) -> "ForkedProcess":
        """Call it in a child. out, stderr: files for its output. Raises Failed."""
        status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.ExitStack() as held:
            held.enter_context(status)
            with theirs:
                request = json.dumps(asdict(program)).encode()
                try:
                    socket.send_fds(
                        self._control, [request], [out.fileno(), stderr.fileno(), theirs.fileno()]
                    )
                except OSError as err:
                    raise Failed(f"cannot send a request to the fork server: {err}") from err
            call = ForkedProcess(status)
            held.pop_all()
            return call

    def run(self, program: CallSpec, timeout: float) -> "subprocess.CompletedProcess[str]":
        """Call it and wait for its end.

        timeout: in seconds; then it is killed. Raises subprocess.TimeoutExpired, Failed.
        """
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as stderr:
            with self.start(program, out, stderr) as call:
                code = call.wait(timeout)
            out.seek(0)
            stderr.seek(0)
            return subprocess.CompletedProcess(program.arguments, code, out.read(), stderr.read())


class ForkedProcess:
    """A running call, with the interface of a Popen; a context manager that kills it if it still runs."""

    def __init__(self, status: socket.socket) -> None:
        """Wait until it has started. Raises Failed."""
        self._status = status
        self.returncode: int | None = None
        self.pid = self._receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._status.close()

    def wait(self, timeout: float) -> int:
        """Return its exit code, negative for a signal. Raises subprocess.TimeoutExpired, Failed."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self.returncode = self._receive()
            self._status.close()
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

    def _receive(self) -> int:
        received = self._status.recv(100)
        if not received:
            raise Failed("the fork server has ended")
        return int(received)


@dataclass(eq=False)
class _Child:
    """A call, on the server's side. ended: a pidfd. status: the socket to its caller."""

    process: int
    ended: int
    status: socket.socket

    @classmethod
    def begin(cls, request: bytes, descriptors: Sequence[int]) -> "_Child":
        """Fork. descriptors: of its stdout, stderr and status socket."""
        process = os.fork()
        if process == 0:
            _become(json.loads(request), descriptors)
        for descriptor in descriptors[:2]:
            os.close(descriptor)
        child = cls(process, os.pidfd_open(process), socket.socket(fileno=descriptors[2]))
        child._send(process)
        return child

    def kill(self) -> None:
        """Send SIGKILL; the process id is not reused before `reap`."""
        os.kill(self.process, signal.SIGKILL)

    def reap(self) -> None:
        """Wait for its end and send its exit code."""
        _, status = os.waitpid(self.process, 0)
        self._send(os.waitstatus_to_exitcode(status))
        self.status.close()
        os.close(self.ended)

    def _send(self, number: int) -> None:
        with contextlib.suppress(OSError):  # the caller may have closed the socket
            self.status.send(str(number).encode())


def serve(control: socket.socket) -> None:
    """Serve requests until the client closes the socket; then all children are killed."""
    children = set[_Child]()
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ, None)
        while True:
            for key, _ in selector.select():
                child = key.data
                if child is None:
                    request, descriptors, _, _ = socket.recv_fds(control, _REQUEST_BYTES, 3)
                    if not request:
                        for left in children:
                            left.kill()
                        return
                    child = _Child.begin(request, descriptors)
                    children.add(child)
                    for watched in (child.ended, child.status):
                        selector.register(watched, selectors.EVENT_READ, child)
                elif child in children:  # both events of a child may come at once
                    for watched in (child.ended, child.status):
                        selector.unregister(watched)
                    if key.fileobj is child.status:  # its caller closed the socket
                        child.kill()
                    child.reap()
                    children.remove(child)


def _become(request: dict[str, Any], descriptors: Sequence[int]) -> NoReturn:
    """Become the requested program."""
    code = 1
    try:
        for number, descriptor in enumerate([os.open(os.devnull, os.O_RDONLY), *descriptors[:2]]):
            os.dup2(descriptor, number)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(request["directory"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv = ["backupctl", *request["arguments"]]
        module, _, function = request["entry"].partition(":")
        getattr(importlib.import_module(module), function)()
        code = 0
    except SystemExit as err:
        code = err.code if isinstance(err.code, int) else int(err.code is not None)
    except BaseException:  # noqa: BLE001 - reported as the interpreter would
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C in the terminal the parent ends this process
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()
    with socket.socket(fileno=os.dup(0)) as stdin:
        serve(stdin)
