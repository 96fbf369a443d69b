# SPDX-License-Identifier: GPL-2.0-or-later
"""How the guard reaches a domain of libvirt: by connections of its own.

Loaded by the guard of such a VM only. What the run tells it: the jobs that it watches are sockets of backups.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Self

from backupctl.errors import MonitorUnreachable
from backupctl.vm.guest.guard_monitor import Leftovers
from backupctl.vm.libvirt import job
from backupctl.vm.libvirt.agent import LibvirtAgent
from backupctl.vm.libvirt.connection import Connection

ABSENCE_SECONDS = 60.0
"""How long a libvirtd may be away before a job that no client of ours holds is left to the next run."""


@dataclass
class Hands:
    """What the guard needs to know of a domain.

    modules: the directory of libvirt's Python module, which the guard's interpreter does not look in by
    itself. seconds: the longest that one call may take.
    """

    uri: str
    domain: str
    modules: str
    seconds: float
    away_since: float | None = field(default=None, compare=False)

    def argument(self) -> str:
        """Return this as an argument of the guard."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, argument: str) -> Self:
        """Make the hands of an argument of the guard."""
        made = cls(**json.loads(argument))
        if made.modules not in sys.path:
            sys.path.append(made.modules)
        return made

    def agent(self, timeout_seconds: float) -> LibvirtAgent:
        """Begin a conversation with the guest's agent. Raises AgentUnavailable."""
        return LibvirtAgent.connect(self.uri, self.domain, timeout_seconds)

    def take_down(self, left: Leftovers, drain: Callable[[], object]) -> None:
        """End the run's backup job, drain its clients until it is gone, and let a paused guest go on.

        Raises ConnectionRefusedError if libvirt has been away for long, MonitorError, Failed.
        """
        try:
            connection = Connection.open(self.uri, self.domain, self.seconds)
        except MonitorUnreachable as err:
            self.away_since = self.away_since or time.monotonic()
            if time.monotonic() - self.away_since > ABSENCE_SECONDS:
                raise ConnectionRefusedError from err
            raise
        with connection:
            self.away_since = None
            if left.jobs and connection.is_running():
                job.end(connection, lambda path: path in left.jobs, drain, left.hang_up)
                job.resume(connection)
