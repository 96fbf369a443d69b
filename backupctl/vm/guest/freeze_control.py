# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's freeze, as the guard holds it: begun and ended for the run, or ended without it.

The guard imports this: only what loads quickly.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Protocol

from backupctl.errors import (
    AgentError,
    AgentRefused,
    AgentTimeout,
    AgentUnavailable,
    BackupctlError,
    FreezeOverrun,
    Refused,
)
from backupctl.system.address import Address
from backupctl.vm.guest.agent import Agent, Thaw

THAW_PATIENCE_SECONDS = 300.0
ANSWER_SECONDS = 0.25
"""After the end of the budget, by which the run has an answer. It waits for a second, then kills us."""
STATUS_SECONDS = 1.0
RETRY_SECONDS = 0.5


class GuestAgent(Protocol):
    """A conversation with a guest's agent: see `agent.Agent`."""

    until: float | None

    def freeze_status(self, seconds: float | None = None) -> str:
        """Return "thawed" or "frozen"."""

    def freeze(self, seconds: float) -> int:
        """Freeze; return how many file systems."""

    def thaw_for_sure(self) -> Thaw:
        """Thaw."""

    def close(self) -> None:
        """Hang up."""


class FreezeControl:
    """The guest's file systems: thawed, frozen by us, or not known.

    agent: its socket, or what begins a conversation with it; None without one.

    Nothing here holds up an answer to the run for longer than the budget lasts: a thaw that takes its time is
    done by a thread, and while that works nothing else speaks to the agent.
    """

    def __init__(self, agent: Address | Callable[[], GuestAgent] | None, timeout_seconds: float) -> None:
        self._connect: Callable[[], GuestAgent] | None
        self._connect = (
            partial(Agent.connect, agent, timeout_seconds) if isinstance(agent, Address) else agent
        )
        self._timeout = timeout_seconds
        self._agent: GuestAgent | None = None
        self._frozen_at = 0.0
        self._count = 0
        self._thawing: threading.Thread | None = None
        self._give_up = 0.0
        self.doubt = ""
        self.deadline: float | None = None  # while the guest is, or may be, frozen by us
        self.overrun = False

    def ping(self) -> None:
        """See whether the agent is there and the guest not frozen. Raises AgentError, Refused."""
        if self.deadline is not None:  # a thread has the agent
            raise AgentTimeout("the guest is still being thawed")
        try:
            self._refuse_foreign_freeze(self._talk())
        except BackupctlError:
            self._hang_up()
            raise

    def freeze(self, budget_seconds: float) -> int:
        """Freeze; returns how many file systems. Raises AgentError.

        `ping` has to come right before it. From the moment the command is sent the guest may be frozen.
        """
        agent = self._talk()
        self._frozen_at = time.monotonic()
        self.deadline = self._frozen_at + budget_seconds
        self.overrun = False
        try:
            self._count = agent.freeze(budget_seconds)
        except AgentTimeout:
            self.deadline = self._frozen_at  # its outcome is unknown, so a thaw is due now
            raise
        except AgentError:
            self._look_after_a_refusal(agent)
            raise
        if not self._count:
            self._undo_an_empty_freeze()
        return self._count

    def thaw(self) -> float:
        """Thaw; returns the milliseconds from freeze to thaw. Raises AgentError, FreezeOverrun.

        `doubt` then tells why the guest may not have been frozen until now, "" if it was. It was if the agent
        says so right before, and then thaws as much as it froze. (A thaw past the agent leaves its status
        "frozen", and shows in what there is to thaw.)
        """
        if self.overrun:
            guard = (
                "the guard thawed the guest" if self.deadline is None else "the guard is thawing the guest"
            )
            raise FreezeOverrun(f"the freeze budget ended before the run thawed, and {guard}")
        try:
            self._thaw_once(self._soon())
        except AgentError:
            self.deadline = time.monotonic()  # go on trying now, not only when the budget ends
            raise
        return (time.monotonic() - self._frozen_at) * 1000

    def thaw_when_due(self) -> None:
        """Begin to thaw if the budget has ended."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            self.overrun = True
            self.thaw_for_good()

    def thaw_for_good(self) -> None:
        """Have a thread thaw, however often it must be tried, for minutes at the most from now on."""
        self._give_up = time.monotonic() + THAW_PATIENCE_SECONDS
        if self._thawing is not None and self._thawing.is_alive():
            return
        try:
            self._thawing = threading.Thread(target=self._go_on_thawing)
            self._thawing.start()
        except RuntimeError:  # no memory for one
            self._thawing = None
            self._go_on_thawing()

    def join(self) -> None:
        """Wait until the thread has done its work."""
        if self._thawing is not None:
            self._thawing.join()

    def _go_on_thawing(self) -> None:
        while self.deadline is not None and time.monotonic() < self._give_up:
            with suppress(AgentError):
                self._thaw_once()
                return
            time.sleep(RETRY_SECONDS)

    def _refuse_foreign_freeze(self, agent: GuestAgent) -> None:
        if agent.freeze_status() == "frozen":
            raise Refused(
                "the guest is frozen already, by somebody else", state="the guest was left as it is"
            )

    def _look_after_a_refusal(self, agent: GuestAgent) -> None:
        # A refusal should have no effect. An agent that fails half-way may leave the guest frozen.
        agent.until = self._soon()
        with suppress(AgentError):
            if agent.freeze_status() == "thawed":
                self._let_go()
                return
        self.deadline = self._frozen_at

    def _undo_an_empty_freeze(self) -> None:
        """The agent froze nothing. It has called its hooks all the same, and they wait for the thaw."""
        try:
            self._thaw_once(self._soon())
        except AgentError:
            self.deadline = self._frozen_at
            raise
        raise AgentRefused("the guest agent froze none of the guest's file systems: it counts 0")

    def _soon(self) -> float:
        return max(self.deadline or 0.0, time.monotonic()) + ANSWER_SECONDS

    def _thaw_once(self, until: float | None = None) -> None:
        """until: the moment at which this has ended, one way or another."""
        try:
            again = self._agent is None
            agent = self._talk()
            agent.until = until
            status = self._status_before(agent)
            if again and status == "thawed":  # the try before did it, whatever was answered
                self._let_go()
                return
            thaw = agent.thaw_for_sure()
        except AgentError:
            # A new conversation for the next try: this one may be with an agent that has died.
            self._hang_up()
            raise
        self.doubt = _doubt(status, thaw, self._count)
        self._let_go()

    def _status_before(self, agent: GuestAgent) -> str:
        """Ask for the status; the guest is frozen and waits, so not for long. "" if there is no answer."""
        with suppress(AgentError):
            return agent.freeze_status(min(STATUS_SECONDS, self._timeout))
        return ""

    def _let_go(self) -> None:
        """The guest is thawed. Its agent serves one client at a time, and the copy may take hours."""
        self._hang_up()
        self.deadline = None

    def _talk(self) -> GuestAgent:
        if self._agent is None:
            if self._connect is None:
                raise AgentUnavailable("no guest agent is configured")
            self._agent = self._connect()
        return self._agent

    def _hang_up(self) -> None:
        if self._agent is not None:
            self._agent.close()
            self._agent = None


def _doubt(before: str, thaw: Thaw, frozen: int) -> str:
    """Say why a freeze may have ended before its thaw; "" if it lasted."""
    if thaw.refusal:
        return f"{thaw.refusal}; the guest is thawed, but since when is not known"
    if before == "thawed" or thaw.thawed < frozen:
        return "somebody in the guest thawed its file systems before the point in time was taken"
    return ""
