# SPDX-License-Identifier: GPL-2.0-or-later
"""What one run is given: VM, repository and options; how it reports, is stopped, and tells the time."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property

from backupctl.cancel import Cancellation
from backupctl.events import StepStarted
from backupctl.names import PointId
from backupctl.operations.backup.activity_log import ActivityLog
from backupctl.options import RunOptions, VmConfig
from backupctl.progress import Reporter
from backupctl.repository.repository import Repository
from backupctl.repository.vm_directory import VmDirectory


def _now() -> datetime:
    return datetime.now(UTC)


def _nothing(_step: str) -> None:
    pass


@dataclass
class RunContext:
    """The surroundings of one run.

    clock: tells the time after which the point is named. on_step: called with the name of each step as the
    run enters it, before anything of it is done; for drills and tests. current: the step that the run is in.
    point: the point that it makes, once that is named. activity: tells `status`, once the lock is held.
    """

    vm: VmConfig
    repository: Repository
    options: RunOptions
    reporter: Reporter
    cancel: Cancellation
    clock: Callable[[], datetime] = _now
    on_step: Callable[[str], None] = _nothing
    current: str = field(default="prepare", init=False)
    point: PointId | None = field(default=None, init=False)
    activity: ActivityLog | None = field(default=None, init=False)

    @cached_property
    def directory(self) -> VmDirectory:
        """The VM's directory in the repository."""
        return self.repository.vm(self.vm.name)

    def step(self, name: str) -> None:
        """Enter a step, and report it."""
        self.enter(name)
        self.reporter.event(StepStarted(name))
        if self.activity is not None:
            self.activity.step(name, self.point)

    def enter(self, name: str) -> None:
        """Enter a step without reporting it: the guest is frozen, and nothing may wait for a terminal."""
        self.current = name
        self.on_step(name)
