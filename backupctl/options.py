# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run is told: which VM, where its sockets are, and what the user asked for."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from backupctl.names import DiskName, PointId, VmName
from backupctl.system.address import Address

Kind = Literal["full", "incremental"]
FreezeMode = Literal["auto", "require", "never"]
OnBrokenChain = Literal["scan", "full", "fail"]
ViewKind = Literal["fleecing", "snapshot-access", "auto"]
ImageFormat = Literal["qcow2", "raw"]
WhenOff = Literal["backup", "skip", "fail"]


@dataclass(frozen=True)
class QmpAccess:
    """A QEMU with a monitor of its own, or a storage daemon. agent: the socket of the guest agent."""

    qmp: Address
    agent: Address | None = None


@dataclass(frozen=True)
class LibvirtAccess:
    """A domain of libvirt.

    uri: of a libvirt, on this machine or on another (`system.libvirt_uri`). domain: its name there.
    """

    uri: str
    domain: str


@dataclass(frozen=True)
class NoMonitor:
    """A VM that is known by its images alone. agent: always None."""

    agent: None = None


Access = QmpAccess | LibvirtAccess | NoMonitor
"""How a VM is reached: a type for each driver (see `vm.open_driver`)."""


@dataclass(frozen=True)
class ImageFile:
    """One file of a VM's disk. format: never taken from the file, whose first bytes may be a guest's."""

    path: Path
    format: ImageFormat = "qcow2"


@dataclass(frozen=True)
class VmImage:
    """The image of one disk, for when the VM is off.

    disk: the name that the disk is stored under. files: the image that the VM writes to, then the backing
    files below it, one after the other. host: where ssh finds the host that they are on; None for this one,
    or for where the VM's libvirt is. Its path has no meaning.
    """

    disk: DiskName
    files: tuple[ImageFile, ...]
    host: Address | None = None


@dataclass(frozen=True)
class VmConfig:
    """A virtual machine as the user names it.

    disk_names: the VM's own name of a disk (with QEMU: qdev id, node or device name) to the name it is stored
    under. images: those of its disks, for when it is off; libvirt tells them for its domains, unless named
    here. when_off: what a backup does then; None for "backup" if the images are known, otherwise "fail".
    """

    name: VmName
    access: Access
    disk_names: dict[str, str] = field(default_factory=dict)
    images: tuple[VmImage, ...] = ()
    when_off: WhenOff | None = None


@dataclass(frozen=True)
class Timeouts:
    """How long to wait before giving up. All in seconds.

    command_seconds: for the answer to one command of the monitor. agent_seconds: for the answer to one
    command of the guest agent, except a freeze, which has its own budget. stall_seconds: for the next byte of
    a copy.
    """

    command_seconds: float = 30.0
    agent_seconds: float = 5.0
    stall_seconds: float = 60.0

    def brief(self) -> "Timeouts":
        """Return those of a command that only asks, while somebody waits for the answer."""
        return replace(self, command_seconds=min(self.command_seconds, self.agent_seconds))


DEFAULT_TIMEOUTS = Timeouts()


@dataclass(frozen=True)
class FreezeOptions:
    """Whether the guest's file systems are frozen for the point in time.

    budget_seconds: how long they may stay frozen.
    """

    mode: FreezeMode = "auto"
    budget_seconds: float = 10.0


@dataclass(frozen=True)
class ScratchOptions:
    """Where QEMU keeps the old content of what the guest overwrites during a run.

    size_bytes: how much to reserve for all disks together; None for what they hold, but half of what is free
    at most.
    """

    directory: Path = Path("/var/tmp")  # noqa: S108 - large, survives a reboot, and the files in it have no name
    size_bytes: int | None = None


@dataclass(frozen=True)
class ChainOptions:
    """How a disk's chain of layers goes on.

    on_broken: what to do with a disk whose bitmap cannot be used. max_layers: at most MAX_CHAIN; a disk whose
    chain has that many is taken full. checkpoints: how many bitmaps of older points stay in the VM for
    differentials.
    """

    on_broken: OnBrokenChain = "scan"
    max_layers: int = 150
    checkpoints: int = 0


@dataclass(frozen=True)
class RunOptions:
    """What one run was asked to do.

    disks: names of disks to take; all writable ones if empty. since: the point to differ from; None for the
    newest. limit_bytes_per_second: rate limit of the copy over all disks; None for none. include: files of
    the VM's host that are stored with the point. firmware: whether the UEFI variables are backed up.
    """

    kind: Kind
    disks: tuple[str, ...] = ()
    since: PointId | None = None
    limit_bytes_per_second: int | None = None
    view: ViewKind = "fleecing"
    freeze: FreezeOptions = FreezeOptions()
    scratch: ScratchOptions = ScratchOptions()
    chain: ChainOptions = ChainOptions()
    timeouts: Timeouts = DEFAULT_TIMEOUTS
    include: tuple[Path, ...] = ()
    firmware: bool = True
