# SPDX-License-Identifier: GPL-2.0-or-later
"""What a throw-away VM is like, and how it is known that it has booted."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Until = Literal["agent", "login", "command"]
DiskBus = Literal["virtio", "scsi", "sata"]
Accelerator = Literal["auto", "tcg"]
LOGIN = "login:"
"""What getty(8) writes on a console."""


@dataclass(frozen=True)
class TrialOptions:
    """What the VM needs in order to boot, and when it has.

    until: what is waited for: an answer of the guest agent, a prompt to log in on the serial console, or the
    success of `command`, which the agent runs with the guest's shell. timeout_seconds: for all of it.
    accelerator: "auto" for KVM where it can be used. firmware: an image for `-bios`; None for that of the
    point's UEFI variables, or the BIOS. kernel, initrd, append: to boot a kernel of the host.
    """

    until: Until = "agent"
    command: str = ""
    timeout_seconds: float = 600.0
    machine: str = "q35"
    memory_mib: int = 1024
    disk_bus: DiskBus = "virtio"
    accelerator: Accelerator = "auto"
    firmware: Path | None = None
    kernel: Path | None = None
    initrd: Path | None = None
    append: str = ""
