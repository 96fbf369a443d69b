# SPDX-License-Identifier: GPL-2.0-or-later
"""Boots a point in a throw-away VM, which shows that it can be restored: `restore-test`.

::

    repository (read-only) ◄─┐
                             ├─ storage daemon ◄── NBD ── QEMU, unprivileged, no network ── the guest
    overlay (no name) ◄──────┘

What the guest writes goes into an overlay, a file without a name in the scratch directory: the kernel frees
it when the test ends, by whatever cause. Both children are killed when we end.
"""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.errors import (
    UNTOUCHED,
    BackupctlError,
    Failed,
    RestoreTestFailed,
    UsageError,
    WriteFailed,
)
from backupctl.events import StepStarted
from backupctl.images import create, public_server
from backupctl.images.open_image import OpenImage
from backupctl.images.public_server import ServedImage
from backupctl.names import DiskName, PointId, VmName
from backupctl.operations import flash
from backupctl.progress import Reporter
from backupctl.repository import chain, read_locks, summary, tested
from backupctl.repository.manifest import DiskEntry
from backupctl.repository.point import Point
from backupctl.repository.vm_directory import VmDirectory
from backupctl.system import listen, private_dir
from backupctl.vm.filling import Filling
from backupctl.vm.trial import boot, machine
from backupctl.vm.trial.machine import TrialDisk, TrialVm
from backupctl.vm.trial.options import TrialOptions

_UNNAMED = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
_CONNECT_SECONDS = 10.0


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
        reporter.event(StepStarted(f"booting {asked.directory.name} {point.id} without network"))
        report = _boot(asked, point, stop)
    tested.record(asked.directory.path, report.point, datetime.now(UTC), passed=report.passed)
    summary.renew_if_free(asked.directory)  # the new file has broken its seal
    return report


def _check(asked: RestoreTestRequest) -> None:
    if asked.options.until == "command" and not asked.options.command:
        raise UsageError("there is no command to wait for: use --command", state=UNTOUCHED)


def _boot(asked: RestoreTestRequest, point: Point, stop: Cancellation) -> RestoreTestReport:
    filling = Filling(asked.scratch)
    limited = stop.also(filling.check)
    begun = time.monotonic()
    with (
        _served(asked, point) as disks,
        machine.running(asked.options, disks, stop) as vm,
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


@contextmanager
def _served(asked: RestoreTestRequest, point: Point) -> Iterator[Sequence[TrialDisk]]:
    """Serve the point's disks, writable by an overlay, on a private socket; yield a connection to each."""
    with ExitStack() as held:
        images = [held.enter_context(_image(asked, point, one)) for one in _entries(asked, point)]
        directory = held.enter_context(private_dir.directory())
        public = directory / "public"
        public.mkdir(mode=0o700)
        listening = held.enter_context(listen.unix(public / "nbd.sock"))
        held.enter_context(public_server.serve(images, listening))
        yield [TrialDisk(one.name, held.enter_context(_connected(public / "nbd.sock"))) for one in images]


def _entries(asked: RestoreTestRequest, point: Point) -> tuple[DiskEntry, ...]:
    for name in asked.disks:
        if point.manifest.disk(name) is None:
            raise chain.no_such_disk(point, name)
    chips = flash.disks(point)  # as a disk, one could take the place of the disk that the guest boots from
    wanted = (one for one in point.manifest.disks if not asked.disks or one.name in asked.disks)
    return tuple(one for one in wanted if one not in chips)


@contextmanager
def _image(asked: RestoreTestRequest, point: Point, entry: DiskEntry) -> Iterator[ServedImage]:
    layers = chain.layers(asked.directory, point, entry.name)
    with _unnamed(asked.scratch) as overlay, chain.opened(layers) as opened:
        create.create_layer(overlay, entry.size, None)
        yield ServedImage.layered(entry.name, overlay, opened)


@contextmanager
def _unnamed(scratch: Path) -> Iterator[OpenImage]:
    try:
        descriptor = os.open(scratch, _UNNAMED, 0o600)
    except OSError as err:
        raise WriteFailed(
            f"cannot create a file in {scratch}: {err.strerror}",
            state=UNTOUCHED,
            hint="name another directory with --scratch",
        ) from err
    with OpenImage(scratch / "(overlay)", descriptor) as made:
        yield made


@contextmanager
def _connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        made.settimeout(_CONNECT_SECONDS)
        try:
            made.connect(str(path))
        except OSError as err:
            raise Failed(f"cannot connect to the NBD server: {err.strerror or err}") from err
        made.settimeout(None)  # QEMU gets it
        yield made
