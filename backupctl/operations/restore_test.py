# SPDX-License-Identifier: GPL-2.0-or-later
"""Boots a point in a throw-away VM, which shows that it can be restored: `restore-test`.

::

    repository (read-only) ◄─┐
                             ├─ storage daemon ◄── NBD ── QEMU, unprivileged, no network ── the guest
    overlay (no name) ◄──────┘

What the guest writes goes into an overlay, a file without a name in the scratch directory: the kernel frees
it when the test ends, by whatever cause. Both children are killed when we end.
"""

import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.errors import (
    UNTOUCHED,
    BackupctlError,
    RestoreTestFailed,
    UsageError,
)
from backupctl.events import StepStarted
from backupctl.names import DiskName, PointId, VmName
from backupctl.operations import trial_disks, uefi
from backupctl.operations.trial_disks import Wanted
from backupctl.operations.uefi import Uefi
from backupctl.progress import Reporter
from backupctl.repository import read_locks, summary, tested
from backupctl.repository.point import Point
from backupctl.repository.vm_directory import VmDirectory
from backupctl.vm.filling import Filling
from backupctl.vm.trial import boot, machine
from backupctl.vm.trial.machine import TrialVm
from backupctl.vm.trial.options import TrialOptions


@dataclass(frozen=True)
class RestoreTestRequest:
    """What is to be tested. point: an id, or "latest". disks: which to attach; none for all.

    scratch: the directory for what the guest writes. screenshot: whether one is wanted.
    """

    directory: VmDirectory
    point: str
    disks: tuple[DiskName, ...]
    options: TrialOptions
    scratch: Path
    screenshot: bool = False


@dataclass(frozen=True)
class RestoreTestReport:
    """What a test came to. error: why the point did not boot; None if it did. seconds: until then.

    accelerator: kvm or tcg, "" if the VM did not start. console: what the guest wrote on its serial port.
    screenshot: b"" if none was wanted, or none could be made.
    """

    vm: VmName
    point: PointId
    until: str
    seconds: float
    accelerator: str
    error: RestoreTestFailed | None
    console: bytes
    screenshot: bytes

    @property
    def passed(self) -> bool:
        """Whether the point booted."""
        return self.error is None


def test(asked: RestoreTestRequest, reporter: Reporter, stop: Cancellation) -> RestoreTestReport:
    """Boot a point, and record in the repository whether it did. Main thread only.

    The point is locked against a prune meanwhile. Raises NoSuchPoint, UsageError, Locked, DamageFound,
    RepositoryError, WriteFailed, Interrupted, or Failed if no VM could be started at all.
    """
    _check(asked)
    with read_locks.reading(asked.directory, asked.point) as point:
        by_uefi = uefi.of_point(point, asked.options)
        how = "by its UEFI variables, without network" if by_uefi else "without network"
        reporter.event(StepStarted(f"booting {asked.directory.name} {point.id} {how}"))
        report = _boot(asked, point, by_uefi, stop)
    tested.record(asked.directory.path, report.point, datetime.now(UTC), passed=report.passed)
    summary.renew_if_free(asked.directory)  # the new file has broken its seal
    return report


def _check(asked: RestoreTestRequest) -> None:
    if asked.options.until == "command" and not asked.options.command:
        raise UsageError("there is no command to wait for: use --command", state=UNTOUCHED)


def _boot(
    asked: RestoreTestRequest, point: Point, by_uefi: Uefi | None, stop: Cancellation
) -> RestoreTestReport:
    filling = Filling(asked.scratch)
    limited = stop.also(filling.check)
    begun = time.monotonic()
    wanted = Wanted(asked.directory, point, asked.disks, by_uefi, asked.scratch)
    with (
        trial_disks.served(wanted) as served,
        machine.running(asked.options, served.disks, stop, served.firmware) as vm,
    ):
        error = None
        try:
            boot.wait(vm, asked.options, limited)
        except RestoreTestFailed as err:
            error = _failed(asked, point, err, vm.accelerator)
        seconds = time.monotonic() - begun
        screenshot = _screenshot(vm) if asked.screenshot else b""
        vm.console.read()
        return RestoreTestReport(
            asked.directory.name,
            point.id,
            asked.options.until,
            seconds,
            vm.accelerator,
            error,
            vm.console.content,
            screenshot,
        )


def _failed(
    asked: RestoreTestRequest, point: Point, err: RestoreTestFailed, accelerator: str
) -> RestoreTestFailed:
    without_kvm = f"; {machine.WITHOUT_KVM}" if accelerator == "kvm" else ""
    return RestoreTestFailed(
        f"{asked.directory.name} {point.id} did not boot: {err.message}",
        state="the point was not changed",
        hint="look at the console and a screenshot (--console, --screenshot); a guest that was backed up "
        "with other firmware or another disk bus needs --firmware or --disk-bus" + without_kvm,
        next_command=f"backupctl verify {asked.directory.name} {point.id}",
    )


def _screenshot(vm: TrialVm) -> bytes:
    with suppress(BackupctlError):  # a VM that has ended has no screen; that it ended is what is reported
        return vm.screenshot()
    return b""
