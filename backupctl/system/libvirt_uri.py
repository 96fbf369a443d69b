# SPDX-License-Identifier: GPL-2.0-or-later
"""The URI of a libvirt, as far as it tells on which machine that is.

``qemu+ssh://[USER@]HOST[:PORT]/system[?socket=PATH]`` is one on another host. What libvirt's own client
would do with further parameters (a key, another netcat, no check of the host's key) is not allowed: the
connection is ours, with the options of `ssh`.
"""

from typing import NamedTuple

from backupctl.errors import UsageError
from backupctl.system.address import Address

_SCHEME = "qemu+ssh:"


class RemoteUri(NamedTuple):
    """A libvirt on another host. address: of that host. socket: libvirt's there, "" for the usual one."""

    address: Address
    socket: str


def is_remote(uri: str) -> bool:
    """Whether a libvirt is on another host."""
    return uri.startswith(_SCHEME)


def remote(uri: str) -> RemoteUri:
    """Read the URI of a libvirt on another host. Raises UsageError."""
    place, question, parameter = uri.removeprefix(_SCHEME).partition("?")
    key, _, path = parameter.partition("=")
    if question and (key != "socket" or not path.startswith("/") or "&" in path):
        raise UsageError(f"{uri!r:.120}: the only parameter may be socket=/PATH; ssh_config has the rest")
    try:
        address = Address.parse(f"ssh:{place}")
    except UsageError:
        address = None
    if address is None or address.path != "/system":
        raise UsageError(f"invalid libvirt URI {uri!r:.120}: use qemu+ssh://[USER@]HOST[:PORT]/system")
    return RemoteUri(address, path)
