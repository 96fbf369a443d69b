# SPDX-License-Identifier: GPL-2.0-or-later
"""On the remote host: how a VM there is reached, by QEMU's monitor, through libvirt, or not at all.

All have the same methods: `connect` returns a socket on which a client here is relayed to, the monitor's or
libvirt's own; `guard_arguments` are those by which the guard knows the VM.
"""

import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from backupctl.errors import AgentUnavailable, MonitorUnreachable
from backupctl.system.address import Address
from backupctl.vm.guest import agent
from backupctl.vm.libvirt.agent import LibvirtAgent
from backupctl.vm.libvirt.guard_hands import Hands

_CONNECT_SECONDS = 10.0
_SOCKETS = ("/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock", "/var/run/libvirt/libvirt-sock")
"""Where libvirt's daemon for QEMU serves root: a daemon of its own, or the one for all kinds of VMs."""
_DEBIAN_MODULES = "/usr/lib/python3/dist-packages"


class QmpVm:
    """A QEMU with a monitor. options: monitor and agent are sockets here; "" for no agent."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._monitor = Address(path=str(options["monitor"]))
        self._agent = Address(path=str(options["agent"])) if options["agent"] else None
        self._seconds = float(options["agent_seconds"])

    @property
    def lock_name(self) -> str:
        """What a lock on the VM is called by."""
        return str(self._monitor.path)

    def guard_arguments(self) -> tuple[str, str]:
        """Return the addresses of monitor and agent."""
        return str(self._monitor), str(self._agent or "")

    def connect(self) -> socket.socket:
        """Connect to the monitor. Raises OSError."""
        return self._monitor.connect(_CONNECT_SECONDS)

    def freeze_status(self) -> str:
        """Ask the guest agent. Raises AgentError."""
        if self._agent is None:
            raise AgentUnavailable("no guest agent is configured")
        with agent.Agent.connect(self._agent, self._seconds) as connection:
            return connection.freeze_status()

    def thaw(self) -> bool:
        """Thaw a guest that is frozen; whether it was. Raises AgentError."""
        return self._agent is not None and agent.thaw_if_frozen(self._agent, self._seconds)


class ImagesVm:
    """A VM that is known by its images alone. options: image is the newest one of its first disk."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._image = str(options["image"])

    @property
    def lock_name(self) -> str:
        """What a lock on the VM is called by."""
        return self._image

    def guard_arguments(self) -> tuple[str, str]:
        """Raise MonitorUnreachable: there is nothing to guard."""
        raise MonitorUnreachable("the VM has no monitor")

    def connect(self) -> socket.socket:
        """Raise MonitorUnreachable: it has no monitor of its own."""
        raise MonitorUnreachable("the VM has no monitor")

    def freeze_status(self) -> str:
        """Raise AgentUnavailable."""
        raise AgentUnavailable("no guest agent is configured")

    def thaw(self) -> bool:
        """Nothing is frozen."""
        return False


class LibvirtVm:
    """A domain of libvirt, or all of them. options: socket is libvirt's, "" for the usual one."""

    def __init__(self, options: dict[str, Any]) -> None:
        said = options["libvirt"]
        self._socket = _found_socket(str(said["socket"]))
        self._domain = str(said["domain"])
        self._call_seconds = float(said["seconds"])
        self._agent_seconds = float(options["agent_seconds"])
        self._modules = _module_directory()
        if self._modules and self._modules not in sys.path:
            sys.path.append(self._modules)

    @property
    def lock_name(self) -> str:
        """What a lock on the VM is called by."""
        return f"/libvirt/{self._domain}"

    def guard_arguments(self) -> tuple[str, str]:
        """Return what `guard_hands` takes. Raises MonitorUnreachable if libvirt's module is not here."""
        if not self._modules:
            raise MonitorUnreachable(
                "the Python module of libvirt is not installed there: the guard needs it to thaw the guest "
                "when the line is cut (apt install python3-libvirt)"
            )
        return Hands(self._uri, self._domain, self._modules, self._call_seconds).argument(), ""

    def connect(self) -> socket.socket:
        """Connect to libvirt. Raises OSError."""
        return Address(path=self._socket).connect(_CONNECT_SECONDS)

    def freeze_status(self) -> str:
        """Ask the guest agent through libvirt. Raises AgentError."""
        with LibvirtAgent.connect(self._uri, self._domain, self._agent_seconds) as talk:
            return talk.freeze_status()

    def thaw(self) -> bool:
        """Thaw a guest that is frozen; whether it was. Raises AgentError."""
        with LibvirtAgent.connect(self._uri, self._domain, self._agent_seconds) as talk:
            if talk.freeze_status() == "thawed":
                return False
            talk.thaw_for_sure()
            return True

    @property
    def _uri(self) -> str:
        return f"qemu:///system?socket={self._socket}"


def _found_socket(said: str) -> str:
    """Return libvirt's socket: the one that is named, or the first that somebody serves."""
    for path in () if said else _SOCKETS:
        with suppress(OSError), Address(path=path).connect(_CONNECT_SECONDS):
            return path
    return said or _SOCKETS[1]


def _module_directory() -> str:
    """Return where libvirt's Python module is, "" if it is nowhere; this interpreter does not look there."""
    import site  # noqa: PLC0415 - only for libvirt

    for place in (*site.getsitepackages(), _DEBIAN_MODULES):
        if Path(place, "libvirt.py").is_file():
            return place
    return ""
