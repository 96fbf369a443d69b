# SPDX-License-Identifier: GPL-2.0-or-later
"""Sockets to serve on: unix, or TCP; without TLS on this machine only."""

import errno
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from backupctl.errors import UNTOUCHED, UsageError
from backupctl.system import locks

_BACKLOG = 16
_PATIENCE_SECONDS = 3.0
_TCP = re.compile(r"(?:(?P<host>\[[0-9A-Fa-f:.]+\]|[^:\[\]]+):)?(?P<port>[0-9]{1,5})", re.ASCII)

_NBD = "NBD has no authentication"
_NBD_HINT = (
    "listen on a unix socket (--socket PATH) and connect with ssh -L 10809:PATH HOST, or use --tls DIR"
)


def tcp_address(
    text: str, *, secured: bool = False, why_here: str = _NBD, hint: str = _NBD_HINT
) -> tuple[str, int]:
    """Parse ``[HOST:]PORT``. Port 0: any free port. Raises UsageError.

    secured: whether there is TLS; without it only loopback hosts are allowed. why_here: why no other host is
    allowed. hint: what to do instead.
    """
    match = _TCP.fullmatch(text)
    if not match or int(match["port"]) > 65535:
        raise UsageError(f"invalid address {text!r:.80}. Examples: 10809, 127.0.0.1:10809")
    host = (match["host"] or "127.0.0.1").strip("[]")
    host = "127.0.0.1" if host == "localhost" else host
    with suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback or secured:
            return host, int(match["port"])
    if secured:
        raise UsageError(f"{host!r:.80} is not an IP address", hint="0.0.0.0 is any of this machine")
    raise UsageError(
        f"refusing to listen on {host!r:.80}: {why_here}",
        state=UNTOUCHED,
        hint=hint,
    )


@contextmanager
def tcp(host: str, port: int) -> Iterator[socket.socket]:
    """Listen on a TCP port. Raises UsageError if it is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
            listening.listen(_BACKLOG)
        except OSError as err:
            raise UsageError(f"cannot listen on {host}:{port}: {err.strerror}", state=UNTOUCHED) from err
        yield listening


@contextmanager
def unix(path: Path) -> Iterator[socket.socket]:
    """Listen on a unix socket that only our user may connect to; its file is removed when the block ends.

    A socket that a killed server left is replaced, anything else is not. Raises UsageError.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        made = _bind(listening, path)
        try:
            yield listening
        finally:
            with suppress(OSError):
                if os.path.samestat(path.lstat(), made):
                    path.unlink()


def uri(listening: socket.socket, export: str, *, secured: bool = False) -> str:
    """Return the NBD URI of an export on a listening socket."""
    name = quote(export, safe="")
    if listening.family == socket.AF_UNIX:
        return f"nbd+unix:///{name}?socket={quote(listening.getsockname())}"
    host, port = listening.getsockname()[:2]
    scheme = "nbds" if secured else "nbd"
    return f"{scheme}://[{host}]:{port}/{name}" if ":" in host else f"{scheme}://{host}:{port}/{name}"


def _bind(listening: socket.socket, path: Path) -> os.stat_result:
    try:
        with _alone(path.parent):
            _remove_stale(path)
            before = os.umask(0o177)
            try:
                listening.bind(str(path))
            finally:
                os.umask(before)
            listening.listen(_BACKLOG)
            return path.lstat()
    except OSError as err:
        why = err.strerror or str(err)  # a path that is too long has no errno
        raise UsageError(f"cannot create the socket {path}: {why}", state=UNTOUCHED) from err


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keep out other processes of ours, which may be about to replace the same stale socket."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not locks.acquire(descriptor, _PATIENCE_SECONDS):
            raise BlockingIOError(errno.EAGAIN, f"another process keeps {directory} locked")
        yield
    finally:
        os.close(descriptor)


def _remove_stale(path: Path) -> None:
    """Remove a socket on which nobody listens. Raises OSError if anything else has that name."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise FileExistsError(errno.EEXIST, "it exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(errno.EADDRINUSE, "another process listens on it")
