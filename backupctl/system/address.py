# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a socket is, and how to connect to it. The guard imports this: only what loads quickly."""

import errno
import os
import re
import socket
from typing import NamedTuple

from backupctl.errors import UsageError

_PORT = re.compile(r"[0-9]{1,5}", re.ASCII)
_SSH = re.compile(
    r"//(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})@)?"
    r"(?P<host>[A-Za-z0-9][A-Za-z0-9_.-]{0,252}|\[[0-9A-Fa-f:.]{2,45}\])"
    r"(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[A-Za-z0-9_.,:=+@/-]{1,255})",
    re.ASCII,
)
"""What cannot be taken for an option or be of meaning to a shell or to ssh's configuration."""
_FORMS = "use unix:PATH, tcp:HOST:PORT or ssh://[USER@]HOST[:PORT]/PATH"


class Address(NamedTuple):
    """A socket: a unix socket's path, a TCP host and port, or a unix socket on a host that ssh reaches.

    A path with a host is one on that host; user and port are ssh's, None for what its configuration says.
    """

    path: str | None = None
    host: str | None = None
    port: int | None = None
    user: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Read ``unix:PATH``, ``tcp:HOST:PORT``, ``ssh://[USER@]HOST[:PORT]/PATH`` or a plain path.

        Raises UsageError.
        """
        scheme, _, rest = text.partition(":")
        if scheme == "ssh":
            return cls._ssh(text, rest)
        if scheme == "tcp":
            host, _, port = rest.rpartition(":")
            if not host or not _PORT.fullmatch(port) or not 0 < int(port) < 65536:
                raise UsageError(f"invalid address {text!r:.200}: use tcp:HOST:PORT")
            return cls(host=host.strip("[]"), port=int(port))
        path = rest if scheme == "unix" else text
        if not path or "\0" in path:
            raise UsageError(f"invalid address {text!r:.200}: {_FORMS}")
        return cls(path=path)

    @classmethod
    def _ssh(cls, text: str, rest: str) -> "Address":
        found = _SSH.fullmatch(rest)
        port = found and found["port"]
        if found is None or (port is not None and not 0 < int(port) < 65536):
            raise UsageError(
                f"invalid address {text!r:.200}: use ssh://[USER@]HOST[:PORT]/PATH, with an absolute path of "
                "letters, digits and _.,:=+@/-"
            )
        return cls(found["path"], found["host"].strip("[]"), int(port) if port else None, found["user"])

    @property
    def remote(self) -> bool:
        """Whether it is a socket on a host that ssh reaches; `connect` cannot connect to it."""
        return self.path is not None and self.host is not None

    @property
    def loopback(self) -> bool:
        """Whether what is said on the connection stays on this machine, or is encrypted by ssh."""
        if self.path is not None or self.host == "localhost":
            return True
        import ipaddress  # noqa: PLC0415 - the guard, which must start quickly, never asks

        try:
            return ipaddress.ip_address(self.host or "").is_loopback
        except ValueError:
            return False

    def on_host(self) -> "Address":
        """Return the address that a remote socket has on its own host."""
        return Address(path=self.path)

    def absolute(self) -> "Address":
        """Return the same address for a process in another directory."""
        if self.remote:
            return self
        return Address(path=os.path.join(os.getcwd(), self.path)) if self.path else self  # noqa: PTH109, PTH118

    def connect(self, timeout_seconds: float) -> socket.socket:
        """Return a connected socket with this time-out. Raises OSError."""
        if self.remote:
            raise OSError(errno.EPROTONOSUPPORT, "only ssh connects to it")
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
        if self.remote:
            host = f"[{self.host}]" if ":" in (self.host or "") else self.host
            user, port = f"{self.user}@" if self.user else "", f":{self.port}" if self.port else ""
            return f"ssh://{user}{host}{port}{self.path}"
        return f"unix:{self.path}" if self.path else f"tcp:{self.host}:{self.port}"
