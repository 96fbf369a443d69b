# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a socket is, and how to connect to it. The guard imports this: only what loads quickly."""

import os
import re
import socket
from typing import NamedTuple

from backupctl.errors import UsageError

_PORT = re.compile(r"[0-9]{1,5}", re.ASCII)


class Address(NamedTuple):
    """A socket: a unix socket's path, or a TCP host and port."""

    path: str | None = None
    host: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Read ``unix:PATH``, ``tcp:HOST:PORT`` or a plain path. Raises UsageError."""
        scheme, _, rest = text.partition(":")
        if scheme == "tcp":
            host, _, port = rest.rpartition(":")
            if not host or not _PORT.fullmatch(port) or not 0 < int(port) < 65536:
                raise UsageError(f"invalid address {text!r:.200}: use tcp:HOST:PORT")
            return cls(host=host.strip("[]"), port=int(port))
        path = rest if scheme == "unix" else text
        if not path or "\0" in path:
            raise UsageError(f"invalid address {text!r:.200}: use unix:PATH or tcp:HOST:PORT")
        return cls(path=path)

    def absolute(self) -> "Address":
        """Return the same address for a process in another directory."""
        return Address(path=os.path.join(os.getcwd(), self.path)) if self.path else self  # noqa: PTH109, PTH118

    def connect(self, timeout_seconds: float) -> socket.socket:
        """Return a connected socket with this time-out. Raises OSError."""
        if self.path is None:
            return socket.create_connection((self.host or "", self.port or 0), timeout_seconds)
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.settimeout(timeout_seconds)
            made.connect(self.path)
        except BaseException:
            made.close()
            raise
        return made

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else f"tcp:{self.host}:{self.port}"
