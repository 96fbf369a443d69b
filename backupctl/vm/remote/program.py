# SPDX-License-Identifier: GPL-2.0-or-later
"""What runs on the host of a VM that is reached by ssh, for as long as a command works on that VM.

::

    run ══ ssh ══► this program ──► QEMU's monitor       relayed, and descriptors of ours sent along
                      │    │   └──► QEMU's NBD server    relayed; the connections are the guard's as well
                      │    ├──────► a storage daemon     on the images of a VM that is off, without a guard
                      │    └──────► scratch files
                      └── socket pair ──► the guard      (vm/guest/guard_process.py, a process of its own)

It answers one line of JSON with one line of JSON. The end of its input, or silence there, is the end of
the run. It ends too, and the guard, which has all that could harm the guest, thaws and cleans up as it does
on the run's own machine. It imports only what loads quickly, and needs nothing but Python's standard library.
"""

import base64
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from backupctl.errors import BackupctlError, Failed, Refused
from backupctl.names import Namespace, VmName
from backupctl.system import bounded_read, open_files, private_dir
from backupctl.vm.filling import Filling
from backupctl.vm.guest import guard_process, handshake
from backupctl.vm.libvirt import run_directory
from backupctl.vm.qmp.files import LOCAL
from backupctl.vm.remote.names import MONITOR, NBD, READY, SILENCE_SECONDS
from backupctl.vm.remote.relay import Relay
from backupctl.vm.remote.vm_lock import VmLock
from backupctl.vm.remote.vms import ImagesVm, LibvirtVm, QmpVm

if TYPE_CHECKING:
    from backupctl.vm.remote.image_server import ImageServer

_CONNECT_SECONDS = 10.0
_GUARD_END_SECONDS = 10.0
_MOST_LINE_BYTES = 1 << 20


class RemoteProgram:
    """Serves one command's requests. options: what `vm.remote.host` or `vm.remote.libvirt_host` asked for.

    directory: for our own sockets; "" where none are needed. guard: whether there is to be one; there is if
    nothing is said. images: whether the VM is off, and its images are read; then there is no guard.
    """

    def __init__(self, options: dict[str, Any], held: ExitStack) -> None:
        self._vm = _vm(options)
        self._agent_seconds = float(options["agent_seconds"])
        self._held = held
        self._monitor: Relay | None = None
        self._earlier: list[Relay] = []
        self._clients: list[Relay] = []
        self._nbd_path = ""
        self._guard: socket.socket | None = None
        self._guard_pid = 0
        self._lock: VmLock | None = None
        self._images: ImageServer | None = None
        if options["directory"]:
            # Before anything that the guard need not have, and before any thread.
            if options.get("guard", True):
                self._lock = VmLock.acquire(self._vm.lock_name, float(options["lock_seconds"]))
            try:
                self._begin(Path(options["directory"]), images=bool(options.get("images")))
            except BaseException:
                if self._lock is not None and not self._guard_pid:
                    self._lock.remove()
                raise

    def _begin(self, directory: Path, *, images: bool) -> None:
        if images:
            self._images = self._held.enter_context(closing(_image_server()))
        elif self._lock is not None:
            self._fork_guard()
        self._directory = self._held.enter_context(private_dir.named(directory))
        self._listeners = {name: self._listener(self._directory / name) for name in (MONITOR, NBD)}

    def serve(self, lines: Iterator[bytes]) -> None:
        """Answer requests until there are no more. Raises OSError if nobody hears the answer."""
        for line in lines:
            if line:
                os.write(1, json.dumps(self._answer(json.loads(line))).encode() + b"\n")

    def end(self) -> None:
        """Leave the guard alone, which ends by itself, and wait for it: it has the lock.

        Without a guard the lock is held until a daemon on images has ended.
        """
        if isinstance(self._vm, LibvirtVm) and self._images is None and self._clients:
            self._leave_handshakes()
        for one in (*self._earlier, *([self._monitor] if self._monitor else [])):  # the guard needs it
            one.close()
        if self._guard is not None:
            self._guard.close()
            self._await_guard()
        self._held.close()
        if self._images is not None and self._lock is not None:
            self._lock.remove()

    def _leave_handshakes(self) -> None:
        """Have clients leave that are in their handshake: the end of a job stops the NBD server, too."""
        for one in self._clients:
            one.hear_no_more()
        time.sleep(handshake.SPEAKS_SECONDS)  # for what QEMU says to what it has heard
        handshake.leave([one.qemu for one in self._clients if one.in_handshake], surely=True)

    def _await_guard(self) -> None:
        with suppress(OSError):
            handle = os.pidfd_open(self._guard_pid)
            waiting = select.poll()
            waiting.register(handle, select.POLLIN)
            if waiting.poll(_GUARD_END_SECONDS * 1000) and self._lock is not None:
                self._lock.remove()

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"value": getattr(self, f"do_{request.pop('do')}")(**request)}
        except BackupctlError as err:
            return {"error": err.code, "message": err.message, "state": err.state, "hint": _hint(err)}
        except OSError as err:
            text = err.strerror or str(err) or type(err).__name__
            return {"error": "OSError", "message": text, "state": "", "errno": err.errno or 0}

    def do_monitor(self) -> int | None:
        """Connect to QEMU's monitor, or to libvirt, for a client that has connected to the forwarded socket.

        A monitor serves one client at a time, libvirt several.
        """
        if self._monitor is not None and isinstance(self._vm, LibvirtVm):
            self._earlier.append(self._monitor)
        elif self._monitor is not None:
            self._monitor.close()
        self._monitor = self._relayed(self._vm.connect)
        return open_files.peer(self._monitor.qemu)

    def do_image_monitor(self) -> None:
        """Connect to the monitor of the daemon on the images, for a client as of `do_monitor`."""
        assert self._images is not None
        self._earlier.append(self._relayed(self._images.connect))

    def _relayed(self, connect: Callable[[], socket.socket]) -> Relay:
        # The client is taken up also where there is nothing to connect it to: in the queue it would be taken
        # for the next one.
        forwarded = self._accepted(MONITOR)
        try:
            server = connect()
        except BaseException:
            forwarded.close()
            raise
        server.settimeout(None)
        return Relay(forwarded, server, outlives=False)

    def do_images(self, call: str, arguments: list[Any]) -> Any:
        """Do the work of one of the methods of `ImageServer`."""
        return getattr(self._images, f"do_{call}")(*arguments)

    def do_send_fd(self, descriptor: int) -> None:
        """Send a descriptor to QEMU, for the next command. No command is under way."""
        assert self._monitor is not None
        socket.send_fds(self._monitor.qemu, [b" "], [descriptor])  # a space: QMP lets it pass

    def do_listen(self, by_descriptor: bool, clients: int) -> dict[str, Any]:
        """Make the socket on which QEMU serves NBD, or name one that QEMU makes itself."""
        path = self._directory / "nbd.sock"
        self._nbd_path = str(path)
        path.unlink(missing_ok=True)
        if not by_descriptor:
            return {"descriptor": -1, "path": self._nbd_path}
        return {"descriptor": self._listener(path, clients).fileno(), "path": ""}

    def do_connect(self) -> int:
        """Connect to QEMU's NBD server for a client of the forwarded socket; return QEMU's side of it."""
        qemu = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        forwarded = self._accepted(NBD)
        try:
            qemu.connect(self._nbd_path)
        except OSError:
            qemu.close()
            forwarded.close()
            raise
        # A daemon on images has no guest that could be harmed by a client that leaves.
        self._clients.append(Relay(forwarded, qemu, outlives=self._images is None))
        return qemu.fileno()

    def do_connect_nbd(self, path: str, qemu_user: list[int] | None) -> int:
        """The same for an export of libvirt's, whose socket must be served by QEMU. Raises Failed."""
        forwarded = self._accepted(NBD)
        try:
            qemu = run_directory.connect(Path(path), _user(qemu_user))
        except BaseException:
            forwarded.close()
            raise
        self._clients.append(Relay(forwarded, qemu, outlives=True))
        return qemu.fileno()

    def do_leave(self, descriptors: list[int]) -> None:
        """Have NBD clients leave that are in their handshake."""
        handshake.leave([one.qemu for one in self._clients if one.qemu.fileno() in descriptors], surely=True)

    def do_disconnect(self) -> None:
        """End the NBD clients, whose exports have gone."""
        while self._clients:
            self._clients.pop().close()

    def do_guard(self, request: dict[str, Any], descriptors: list[int], seconds: float) -> dict[str, Any]:
        """Pass a request to the guard, and its answer back. Raises OSError."""
        assert self._guard is not None
        self._guard.settimeout(seconds)
        socket.send_fds(self._guard, [json.dumps(request).encode()], descriptors)
        content = self._guard.recv(65536)
        if not content:
            raise Failed("the guard process has died")
        return dict(json.loads(content))

    def do_files(self, call: str, arguments: list[Any]) -> Any:
        """Do the work of one of the methods of `vm.qmp.files.Files`."""
        return _FILES[call](*arguments)

    def do_filling(self, directory: str, process: int | None) -> str:
        """Say which guests need the file system of a directory."""
        return Filling(
            Path(directory), "", process if process and open_files.is_qemu(process) else None
        ).who()

    def do_freeze_status(self) -> str:
        """Ask the guest agent."""
        return self._vm.freeze_status()

    def do_thaw(self) -> bool:
        """Thaw a guest that is frozen; whether it was."""
        return self._vm.thaw()

    def _listener(self, path: Path, clients: int = 8) -> socket.socket:
        made = self._held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        made.bind(str(path))
        made.listen(clients)
        return made

    def _accepted(self, name: str) -> socket.socket:
        listener = self._listeners[name]
        listener.settimeout(_CONNECT_SECONDS)
        made = listener.accept()[0]
        made.settimeout(None)
        return made

    def _fork_guard(self) -> None:
        reached = self._vm.guard_arguments()
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._guard_pid = os.fork()
        if not self._guard_pid:
            ours.close()
            _become_guard(its.detach(), reached, self._agent_seconds)
        its.close()
        ours.settimeout(_CONNECT_SECONDS)
        if not ours.recv(65536):
            raise Failed("the guard process did not start")
        self._guard = ours


def _vm(options: dict[str, Any]) -> LibvirtVm | QmpVm | ImagesVm:
    if "libvirt" in options:
        return LibvirtVm(options)
    return ImagesVm(options) if "image" in options else QmpVm(options)


def _image_server() -> "ImageServer":
    from backupctl.vm.remote.image_server import ImageServer  # noqa: PLC0415 - sent to few hosts

    return ImageServer()


def _hint(err: BackupctlError) -> str:
    return err.hint or (err.next_command and f"run this there: {err.next_command}")


def _private(prefix: str, vm: str, directory: str) -> str:
    return str(LOCAL.make_private(_namespace(prefix), VmName(vm), Path(directory)))


def _user(said: list[int] | None) -> tuple[int, int] | None:
    return None if said is None else (int(said[0]), int(said[1]))


def _namespace(repository: str) -> Namespace:
    return Namespace(repository)


def _open_plain(path: str, most_bytes: int) -> list[Any]:
    """Return descriptor and size of a plain file, or why it cannot be used."""
    try:
        return [*bounded_read.open_plain(Path(path), most_bytes), ""]
    except bounded_read.Unusable as err:
        return [-1, 0, str(err)]


def _read_at(descriptor: int, offset: int, length: int) -> str:
    return base64.b64encode(bounded_read.read_at(descriptor, offset, length)).decode()


_FILES: dict[str, Any] = {
    "open_plain": _open_plain,
    "read_at": _read_at,
    "command_line": LOCAL.command_line,
    "check_directory": lambda directory: LOCAL.check_directory(Path(directory)),
    "free_bytes": lambda directory: LOCAL.free_bytes(Path(directory)),
    "make_private": _private,
    "left_directories": lambda one, vm, path: LOCAL.left_directories(_namespace(one), VmName(vm), Path(path)),
    "sweep": lambda one, vm, path: LOCAL.sweep(_namespace(one), VmName(vm), Path(path)),
    "make_scratch": lambda directory, path, size, reserve: LOCAL.make_scratch(
        Path(directory), Path(path) if path else None, size, reserve
    ),
    "used_bytes": LOCAL.used_bytes,
    "empty": LOCAL.empty,
    "close": LOCAL.close,
    "header": lambda path: run_directory.header(path).hex(),
    "check_run_directory": lambda directory, prefix, user: run_directory.check(
        Path(directory), prefix, _user(user)
    ),
    "make_run_directory": lambda one, vm, directory, user: str(
        run_directory.make(_namespace(one), VmName(vm), Path(directory), _user(user))
    ),
    "give": lambda descriptor, user: run_directory.give(descriptor, _user(user)),
}


def _become_guard(descriptor: int, reached: tuple[str, str], seconds: float) -> NoReturn:
    """Be the guard from now on: see `guard_process.main`, which never returns."""
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):  # ssh waits for the end of our output
            os.dup2(null, number)
        sys.argv = ["guard", str(descriptor), *reached, str(seconds)]
        guard_process.main()
    finally:
        os._exit(1)


def _lines() -> Iterator[bytes]:
    """Yield each line of the input; end where it ends, or is silent for too long."""
    received, heard = bytearray(), time.monotonic()
    while True:
        while (end := received.find(b"\n")) >= 0:
            line = bytes(received[:end])
            del received[: end + 1]
            yield line
            heard = time.monotonic()
        left = heard + SILENCE_SECONDS - time.monotonic()
        if left <= 0 or len(received) > _MOST_LINE_BYTES or not select.select([0], [], [], left)[0]:
            return
        content = os.read(0, 65536)
        if not content:
            return
        received += content


def main() -> NoReturn:
    """Serve the command at the other end of the standard input and output."""
    os.umask(0o077)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    lines = _lines()
    held = ExitStack()
    try:
        try:
            program = RemoteProgram(json.loads(next(lines)), held)
        except (BackupctlError, OSError) as err:
            held.close()
            code = err.code if isinstance(err, BackupctlError) else Refused.code
            hint = _hint(err) if isinstance(err, BackupctlError) else ""
            said = {"error": code, "message": str(err), "state": "", "hint": hint}
            _say(READY + json.dumps(said).encode() + b"\n")
            os._exit(0)
        _say(READY + json.dumps({"value": os.geteuid()}).encode() + b"\n")
        with suppress(OSError):
            program.serve(lines)
        program.end()
    finally:
        held.close()
        os._exit(0)


def _say(content: bytes) -> None:
    with suppress(OSError):
        os.write(1, content)
