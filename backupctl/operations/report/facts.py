# SPDX-License-Identifier: GPL-2.0-or-later
"""What a report says: plain facts, which any page or program can show. Sizes are in bytes."""

from dataclasses import dataclass, field
from datetime import datetime

from backupctl.names import DiskName, PointId, VmName
from backupctl.operations.check import Verdict
from backupctl.operations.prune.retention import Decision, Rules
from backupctl.repository.tested import RestoreTests


@dataclass(frozen=True)
class LastResult:
    """The end of the last command of a kind. ended: UTC. reason: the code of its error, "" for none.

    partial: a verify that did not read all of the VM.
    """

    command: str
    ended: datetime
    seconds: float
    reason: str = ""
    partial: bool = False


@dataclass(frozen=True)
class LastResults:
    """The last commands on a VM, as far as they are remembered."""

    backup: LastResult | None = None
    verify: LastResult | None = None
    prune: LastResult | None = None


@dataclass(frozen=True)
class PointFacts:
    """One recovery point.

    taken: UTC, by the clock of its run. kind: full, incremental or mixed. seconds: how long the run took.
    frozen_ms: None if the guest was not frozen. layers: of its longest chain, None if that cannot be counted.
    decision: of the next prune, None without rules. broken: messages about disks that cannot be restored.
    """

    id: PointId
    taken: datetime
    seconds: float
    kind: str
    parent: PointId | None
    consistency: str
    frozen_ms: int | None
    stored_bytes: int
    copied_bytes: int
    disks: tuple[DiskName, ...]
    layers: int | None
    protected: bool
    decision: Decision | None = None
    broken: tuple[str, ...] = ()

    @property
    def is_dropped(self) -> bool:
        """Whether the next prune drops it."""
        return self.decision is not None and not self.decision.keep


@dataclass(frozen=True)
class BadPoint:
    """A point whose manifest cannot be used. unreadable: the system refused to read it; it may be whole."""

    id: str
    message: str
    unreadable: bool


@dataclass(frozen=True)
class MapRow:
    """What one point stores of a disk. shares: for each part of the disk how much of it, 0 to 255.

    problem: why that is not known, "" if it is.
    """

    point: PointId
    stored_bytes: int
    shares: bytes = b""
    problem: str = ""


@dataclass(frozen=True)
class DiskMap:
    """Which parts of a disk each of its newest points stores. rows: oldest first. columns: parts of a row.

    chain_bytes: the lengths of all images that the newest point consists of; None if a layer is missing.
    """

    disk: DiskName
    size_bytes: int
    columns: int
    rows: tuple[MapRow, ...]
    chain_bytes: int | None = None


@dataclass(frozen=True)
class RunFacts:
    """A command that works on a VM now. kind: full, incremental, or other: a prune, a verify, a recovery.

    The rest is known of a backup only. point: None before it is named. step: None while the run is undone.
    estimated: total_bytes is. left_seconds: until all disks are copied, None while nobody knows.
    """

    kind: str
    point: PointId | None = None
    elapsed_seconds: int = 0
    step: int | None = None
    description: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    estimated: bool = False
    left_seconds: int | None = None


@dataclass(frozen=True)
class OlderPoints:
    """Points that are not reported one by one. oldest: UTC. dropped: those that the next prune drops."""

    count: int
    stored_bytes: int
    oldest: datetime
    dropped: tuple[PointId, ...] = ()


@dataclass(frozen=True)
class VmFacts:
    """One VM. points: oldest first. older: the rest of them, None if there are no others.

    pruning_problem: why it is not known what the next prune does, or "".
    run: what works on it now, None if nothing does. tested: the last restore tests, None if there was none.
    """

    name: VmName
    verdict: Verdict
    points: tuple[PointFacts, ...] = ()
    bad: tuple[BadPoint, ...] = ()
    rules: Rules = field(default_factory=Rules)
    pruning_problem: str = ""
    last: LastResults | None = None
    maps: tuple[DiskMap, ...] = ()
    run: RunFacts | None = None
    tested: RestoreTests | None = None
    older: OlderPoints | None = None

    @property
    def count(self) -> int:
        """How many points there are."""
        return len(self.points) + (self.older.count if self.older else 0)

    @property
    def stored_bytes(self) -> int:
        """What its points store together."""
        older = self.older.stored_bytes if self.older else 0
        return sum(point.stored_bytes for point in self.points) + older

    @property
    def dropped(self) -> tuple[PointId, ...]:
        """The points that the next prune drops, oldest first."""
        older = self.older.dropped if self.older else ()
        return tuple(sorted((*older, *(point.id for point in self.points if point.is_dropped))))


@dataclass(frozen=True)
class RepositoryFacts:
    """One repository. problem: why it cannot be opened, "" if it can."""

    path: str
    vms: tuple[VmFacts, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Report:
    """All that is reported. made: UTC. version: of backupctl."""

    made: datetime
    version: str
    repositories: tuple[RepositoryFacts, ...]

    @property
    def vms(self) -> tuple[VmFacts, ...]:
        """The VMs of all repositories."""
        return tuple(vm for one in self.repositories for vm in one.vms)

    @property
    def is_damaged(self) -> bool:
        """Whether any VM's state is critical because of what is stored."""
        return any(vm.bad or any(point.broken for point in vm.points) for vm in self.vms)
