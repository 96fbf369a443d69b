# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run is told: which VM, where its sockets are, and what the user asked for."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from backupctl.names import PointId, VmName
from backupctl.system.address import Address

Kind = Literal["full", "incremental"]
FreezeMode = Literal["auto", "require", "never"]
OnBrokenChain = Literal["scan", "full", "fail"]
ViewKind = Literal["fleecing", "snapshot-access", "auto"]


@dataclass(frozen=True)
class VmConfig:
    """A virtual machine as the user names it.

    disk_names: QEMU's name of a disk (qdev id, node or device name) to the name it is stored under.
    """

    name: VmName
    qmp: Address
    agent: Address | None = None
    disk_names: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunOptions:
    """What one run was asked to do.

    disks: names of disks to take, all writable ones if empty.
    scratch: folder for the scratch files.
    scratch_bytes: room to set aside for them together, at least; None for half of what is free, at most.
    limit_bytes_per_second: rate limit of the copy over all disks, None for none.
    since: the point to differ from; None means the newest.
    checkpoints: how many bitmaps of older points stay in the VM for differentials.
    max_chain: how many layers a disk's chain may have (at most `sizes.MAX_CHAIN`) before a full is taken.
    freeze_budget_seconds: how long the guest may stay frozen.
    command_timeout_seconds: the longest that any one command to monitor or agent may take.
    stall_timeout_seconds: the longest that the copy may go without a byte arriving.
    """

    kind: Kind
    disks: tuple[str, ...] = ()
    freeze: FreezeMode = "auto"
    freeze_budget_seconds: float = 10.0
    scratch: Path = Path("/var/tmp")  # noqa: S108 - large, survives a reboot, and the files in it have no name
    scratch_bytes: int | None = None
    limit_bytes_per_second: int | None = None
    view: ViewKind = "fleecing"
    since: PointId | None = None
    checkpoints: int = 0
    max_chain: int = 150
    on_broken_chain: OnBrokenChain = "scan"
    command_timeout_seconds: float = 30.0
    agent_timeout_seconds: float = 5.0
    stall_timeout_seconds: float = 60.0
