# SPDX-License-Identifier: GPL-2.0-or-later
"""Waits until a throw-away VM has booted. What the guest says may be a lie; every wait has an end."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from backupctl.cancel import Cancellation
from backupctl.errors import AgentError, RestoreTestFailed
from backupctl.vm.guest.agent import Agent
from backupctl.vm.trial.machine import TrialVm
from backupctl.vm.trial.options import LOGIN, TrialOptions

_LOOK_SECONDS = 0.2
_AGENT_SECONDS = 10.0
_AGENT_AGAIN_SECONDS = 1.0
_COMMAND_AGAIN_SECONDS = 2.0
_SHELL = "/bin/sh"


def wait(vm: TrialVm, options: TrialOptions, stop: Cancellation) -> None:
    """Return when the guest has booted. Raises RestoreTestFailed with what was missing, Interrupted."""
    deadline = time.monotonic() + options.timeout_seconds
    if options.until == "login":
        _until(vm, stop, deadline, lambda: vm.console.shows(LOGIN), f"no {LOGIN!r} on the serial console")
        return
    agent = _AgentTries(vm, deadline)
    _until(vm, stop, deadline, agent.answers, "the guest agent did not answer")
    if options.until == "command":
        _run(vm, options.command, stop, deadline)


def _until(
    vm: TrialVm, stop: Cancellation, deadline: float, is_so: Callable[[], bool], otherwise: str
) -> None:
    begun = time.monotonic()
    while True:
        stop.check()
        vm.console.read()
        if is_so():
            return
        vm.check()
        if time.monotonic() > deadline:
            last = vm.console.last_line()
            raise RestoreTestFailed(
                f"{otherwise} within {time.monotonic() - begun:.0f} s"
                + (f"; the last line of its console: {last}" if last else "")
            )
        time.sleep(_LOOK_SECONDS)


@dataclass
class _AgentTries:
    """Asks the agent now and then whether it is there."""

    vm: TrialVm
    deadline: float
    next_try: float = field(default=0.0)

    def answers(self) -> bool:
        now = time.monotonic()
        if now < self.next_try:
            return False
        # A short wait at first: while it lasts, nobody looks at the console.
        seconds = max(0.1, min(_AGENT_AGAIN_SECONDS, self.deadline - now))
        try:
            with Agent.connect(self.vm.agent, seconds) as agent:
                agent.ping()
        except AgentError:
            self.next_try = time.monotonic() + _AGENT_AGAIN_SECONDS
            return False
        return True


def _run(vm: TrialVm, command: str, stop: Cancellation, deadline: float) -> None:
    """Run a command in the guest until it succeeds: services may still be starting.

    Raises RestoreTestFailed with its last exit status.
    """
    begun = time.monotonic()
    try:
        with Agent.connect(vm.agent, _AGENT_SECONDS) as agent:
            while (status := _once(vm, agent, command, stop, deadline)) != 0:
                if time.monotonic() + _COMMAND_AGAIN_SECONDS > deadline:
                    how = f"exit status {status}" if status is not None else "no exit status"
                    raise RestoreTestFailed(
                        f"the command did not succeed within {time.monotonic() - begun:.0f} s ({how}): "
                        f"{command:.200}"
                    )
                _pause(vm, stop, _COMMAND_AGAIN_SECONDS)
    except AgentError as err:
        raise RestoreTestFailed(f"the command could not be run: {err.message}") from err


def _once(vm: TrialVm, agent: Agent, command: str, stop: Cancellation, deadline: float) -> int | None:
    process = agent.start(_SHELL, ("-c", command))
    found = agent.exit_status(process)
    while found is None:
        if time.monotonic() > deadline:
            raise RestoreTestFailed(f"the command did not end in time: {command:.200}")
        _pause(vm, stop, _LOOK_SECONDS)
        found = agent.exit_status(process)
    return found.status


def _pause(vm: TrialVm, stop: Cancellation, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        stop.check()
        vm.check()
        vm.console.read()
        if time.monotonic() >= end:
            return
        time.sleep(_LOOK_SECONDS)
