# SPDX-License-Identifier: GPL-2.0-or-later
"""What the session of a VM that runs has its guard do: freeze the guest, thaw it, wait until it is thawed."""

import time
from collections.abc import Callable

from backupctl.errors import AgentTimeout, GuardLost
from backupctl.vm.driver import Thawed
from backupctl.vm.guest.guard import GuardClient

_LOOK_SECONDS = 0.1


class GuardedSession:
    """That part of a `vm.driver.Session`.

    thaw_without_guard: thaws the guest if it is frozen, once the guard is dead and the agent free.
    """

    def __init__(
        self, guard: GuardClient, agent_seconds: float, thaw_without_guard: Callable[[], object]
    ) -> None:
        self._guard = guard
        self._agent_seconds = agent_seconds
        self._thaw_without_guard = thaw_without_guard
        self._frozen_until: float | None = None

    @property
    def has_guest(self) -> bool:
        """A VM that answers may run one."""
        return True

    @property
    def guarded(self) -> bool:
        """Whether the guard is alive."""
        return self._guard.alive

    def stand_by(self) -> None:
        """Wait until the guard is there."""
        self._guard.stand_by()

    def ping_guest(self) -> None:
        """Have the guard ask the agent."""
        self._guard.ping_agent()

    def freeze(self, budget_seconds: float) -> int:
        """Have the guard freeze the guest."""
        count = self._guard.freeze(budget_seconds)
        self._frozen_until = self._guard.due
        return count

    def thaw(self) -> Thawed:
        """Have the guard thaw the guest."""
        return self._guard.thaw()

    def await_thaw(self) -> None:
        """Give the guard a little time with an agent that was silent."""
        deadline = time.monotonic() + 2 * self._agent_seconds
        try:
            while self._guard.may_be_frozen():
                if time.monotonic() > deadline:
                    raise AgentTimeout(
                        "the guest may still be frozen; the guard goes on trying for 5 minutes"
                    )
                time.sleep(_LOOK_SECONDS)
        except GuardLost:
            self._thaw_without_guard()
