# SPDX-License-Identifier: GPL-2.0-or-later
"""The run's handle on a guard that is on the VM's host (see `vm/guest/guard.py` for one that is here)."""

import socket
import time
from typing import Any, Self

from backupctl import errors
from backupctl.errors import BackupctlError, GuardLost, MonitorError
from backupctl.vm.guest.guard import GuardClient
from backupctl.vm.remote.channel import Channel

_ANSWER_SECONDS = 10.0
_OVERDUE_SECONDS = 3.0
"""As for a guard that is here, and the way there and back, which may lose a packet."""
_PROBE_SECONDS = 5.0


class RemoteGuard(GuardClient):
    """See `GuardClient`. Where the line to it is cut, it does what is due as if the run had died.

    clients: for the descriptor of each forwarded NBD client here, that of QEMU's side there.
    """

    def __init__(self, channel: Channel, clients: dict[int, int], agent_seconds: float) -> None:
        self._channel = channel
        self._clients = clients
        self._timeout = agent_seconds
        self._due: float | None = None
        self._probed = time.monotonic()

    def stand_by(self) -> None:
        """It is there since the connection is."""

    @property
    def due(self) -> float | None:
        """See `GuardClient.due`."""
        return None if self._due is None else self._due + _OVERDUE_SECONDS

    def hold(self, connection: socket.socket, export: str) -> None:
        """Have the guard hold a duplicate of QEMU's side of a client's connection."""
        self._ask({"do": "hold", "export": export}, (self._clients[connection.fileno()],))

    def release(self) -> None:
        """The exports are gone: both, the guard and the relay, may let go of the connections."""
        self._clients.clear()
        try:
            self._channel.ask("disconnect")
        except (BackupctlError, OSError):
            return
        super().release()

    @property
    def alive(self) -> bool:
        """Whether its host can be reached."""
        return self._channel.alive

    def check(self) -> None:
        """Raise GuardLost if the line to the guard is cut, or it has died."""
        if not self.alive:
            raise GuardLost(f"the line to the guard on {self._channel.host} is cut")
        if time.monotonic() - self._probed > _PROBE_SECONDS:
            self._probed = time.monotonic()
            self._ask({"do": "frozen"})

    def close(self) -> None:
        """Leave it to the end of the connection."""

    def __enter__(self) -> Self:
        return self

    def _ask(
        self, request: dict[str, object], descriptors: tuple[int, ...] = (), seconds: float = 0.0
    ) -> Any:
        wait = _ANSWER_SECONDS + seconds
        if self.due is not None:
            wait = max(self.due - time.monotonic(), _OVERDUE_SECONDS)
        try:
            answer = self._channel.ask(
                "guard", wait + 1.0, request=request, descriptors=list(descriptors), seconds=wait
            )
        except (MonitorError, OSError) as err:
            raise GuardLost(f"the guard on {self._channel.host} is out of reach: {err}") from err
        if not isinstance(answer, dict):
            raise GuardLost(f"what answers on {self._channel.host} is not a guard")
        if "error" in answer:
            text, state = str(answer.get("message", ""))[:1000], str(answer.get("state", ""))[:300]
            raise errors.received(str(answer["error"]), text, state)
        return answer.get("value")
