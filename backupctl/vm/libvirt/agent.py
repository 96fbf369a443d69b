# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest agent of a domain, through libvirt, which holds its socket. The guard imports this.

It is what `guest.agent.Agent` is for a socket of our own. Source: virDomainFSFreeze, virDomainFSThaw and
virDomainQemuAgentCommand of libvirt's API.
"""

import json
import time
from collections.abc import Callable
from typing import Any, Self

from backupctl.errors import (
    AgentRefused,
    AgentTimeout,
    AgentUnavailable,
    CommandFailed,
    MonitorError,
    OutcomeUnknown,
)
from backupctl.vm.guest.agent import Thaw, thaw_for_sure
from backupctl.vm.libvirt.connection import HELD, NO_JOB, NOT_RUNNING, Connection

_NOT_CONFIGURED = "74"
_UNRESPONSIVE = "86"
_NOT_RUNNING = (NO_JOB, NOT_RUNNING)
_COMMAND_FAILED = "112"
_STATUS = '{"execute": "guest-fsfreeze-status"}'


class LibvirtAgent:
    """A conversation with one guest's agent; `connect` begins it.

    until: the moment, as `time.monotonic` tells it, at which every call has ended; None for no such limit.
    """

    def __init__(self, connection: Connection, timeout_seconds: float) -> None:
        self._connection = connection
        self._timeout = timeout_seconds
        self.until: float | None = None

    @classmethod
    def connect(cls, uri: str, domain: str, timeout_seconds: float) -> Self:
        """Connect to libvirt; nothing is said to the agent yet. Raises AgentUnavailable."""
        try:
            return cls(Connection.open(uri, domain, timeout_seconds), timeout_seconds)
        except MonitorError as err:
            raise AgentUnavailable(err.message) from err

    def freeze_status(self, seconds: float | None = None) -> str:
        """Return "thawed" or "frozen", within so many seconds. Raises AgentError."""
        domain, allowed = self._connection.domain, self._seconds(seconds)

        def ask() -> str:
            import libvirt_qemu  # noqa: PLC0415 - the connection has loaded it

            return str(libvirt_qemu.qemuAgentCommand(domain, _STATUS, max(1, int(allowed)), 0))

        try:
            status: Any = json.loads(self._call("guest-fsfreeze-status", ask, allowed))["return"]
        except (ValueError, KeyError, TypeError, RecursionError) as err:
            raise AgentRefused("the agent's answer to guest-fsfreeze-status is invalid") from err
        if status not in ("thawed", "frozen"):
            raise AgentRefused(f"the agent's answer to guest-fsfreeze-status is invalid: {status!r:.60}")
        return str(status)

    def freeze(self, seconds: float) -> int:
        """Freeze the guest's file systems; returns how many. Raises AgentError."""
        domain = self._connection.domain
        return int(self._call("virDomainFSFreeze", domain.fsFreeze, self._seconds(seconds)))

    def thaw_for_sure(self) -> Thaw:
        """Thaw the guest, and ask whether it is. Raises AgentError if it is not, or if that is not known."""
        domain = self._connection.domain
        return thaw_for_sure(
            lambda: int(self._call("virDomainFSThaw", domain.fsThaw, self._seconds(None))), self.freeze_status
        )

    def close(self) -> None:
        """Disconnect. Never raises."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _seconds(self, seconds: float | None) -> float:
        allowed = self._timeout if seconds is None else seconds
        return allowed if self.until is None else max(0.0, min(allowed, self.until - time.monotonic()))

    def _call(self, name: str, function: Callable[[], Any], seconds: float) -> Any:
        try:
            return self._connection.call(name, function, seconds)
        except OutcomeUnknown as err:
            raise AgentTimeout(err.message) from err
        except CommandFailed as err:
            if err.error_class in (_NOT_CONFIGURED, _UNRESPONSIVE, *_NOT_RUNNING):
                raise AgentUnavailable(f"no guest agent answers: {err.description}") from err
            if err.error_class in (_COMMAND_FAILED, HELD):
                raise AgentRefused(err.message) from err
            # Whether the agent got the command is not known.
            raise AgentTimeout(err.message) from err


def thaw_if_frozen(uri: str, domain: str, timeout_seconds: float) -> bool:
    """Thaw a guest that is frozen; whether it was. Raises AgentError."""
    with LibvirtAgent.connect(uri, domain, timeout_seconds) as agent:
        if agent.freeze_status() == "thawed":
            return False
        agent.thaw_for_sure()
        return True
