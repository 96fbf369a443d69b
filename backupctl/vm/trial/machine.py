# SPDX-License-Identifier: GPL-2.0-or-later
"""A throw-away VM: QEMU with nothing of the host but connections to its disks.

Each disk is a socket that is connected to an NBD server of ours; monitor, agent and console are sockets that
QEMU inherits; kernel and firmware are copies in memory. There is no network. As root QEMU runs as an
unprivileged user (`system/confined.py`). A guest that breaks out of it finds nothing else.
"""

import logging
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from backupctl.cancel import Cancellation
from backupctl.errors import (
    CommandFailed,
    Failed,
    MonitorError,
    RepositoryError,
    RestoreTestFailed,
    UsageError,
)
from backupctl.system import confined, log, private_dir, qemu_tools, safe_open
from backupctl.system.address import Address
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.trial import command
from backupctl.vm.trial.command import Descriptors, Flash
from backupctl.vm.trial.console import Console
from backupctl.vm.trial.options import TrialOptions

_log = logging.getLogger("backupctl.vm.trial")

_MOST_BOOT_BYTES = 1 << 30
_MOST_SCREEN_BYTES = 64 << 20
_START_SECONDS = 60.0
_END_SECONDS = 5.0
WITHOUT_KVM = "if this host is itself a VM, its KVM may be at fault: try --accelerator tcg"


@dataclass(frozen=True)
class TrialDisk:
    """A disk: a socket that is connected to an NBD server, and the name of the export there."""

    export: str
    connection: socket.socket


@dataclass(frozen=True)
class TrialFirmware:
    """Firmware in two flash chips. variables: a disk, or the content of a file; written to in the VM only."""

    code: Path
    variables: TrialDisk | bytes


@dataclass(frozen=True)
class TrialVm:
    """A running VM. agent: where its guest agent is reached. accelerator: kvm or tcg."""

    process: "subprocess.Popen[bytes]"
    monitor: Monitor
    agent: Address
    console: Console
    complaints: IO[bytes]
    screen: int
    accelerator: str

    def check(self) -> None:
        """Raise RestoreTestFailed if QEMU has ended: the guest powered itself off, or QEMU failed."""
        if self.process.poll() is not None:
            raise RestoreTestFailed(f"the VM ended: {_why(self.process, self.complaints)}")

    def screenshot(self) -> bytes:
        """Return what the screen shows: PNG, or PPM from a QEMU that cannot make PNG. Raises Failed."""
        arguments = {"filename": f"/proc/self/fd/{self.screen}"}
        try:
            self.monitor.execute("screendump", {**arguments, "format": "png"})
        except CommandFailed:
            self.monitor.execute("screendump", arguments)
        found = os.pread(self.screen, _MOST_SCREEN_BYTES, 0)
        if not found:
            raise Failed("QEMU made an empty screenshot")
        return found


@contextmanager
def running(
    options: TrialOptions,
    disks: Sequence[TrialDisk],
    stop: Cancellation,
    firmware: TrialFirmware | None = None,
) -> Iterator[TrialVm]:
    """Start a VM, and end it with the block. The connections to the disks are QEMU's from then on.

    firmware: None for what the options name. Main thread only. Raises UsageError for files that cannot be
    used, Failed, Interrupted.
    """
    if len(disks) > command.most_disks(options.disk_bus):
        raise UsageError(f"too many disks for {options.disk_bus}: {len(disks)}")
    with ExitStack() as held:
        directory = held.enter_context(private_dir.directory())
        complaints = held.enter_context(tempfile.TemporaryFile())
        screen = held.enter_context(_memory("screen", b"")).fileno()
        ours, theirs = socket.socketpair()
        held.callback(ours.close)
        with ExitStack() as inherited:
            inherited.callback(theirs.close)
            given = Descriptors(
                monitor=inherited.enter_context(_listening(directory / "qmp")).fileno(),
                agent=inherited.enter_context(_listening(directory / "ga")).fileno(),
                console=theirs.fileno(),
                disks=[(one.export, one.connection.fileno()) for one in disks],
                boot=_boot_files(options, inherited),
                flash=_flash(firmware, inherited) if firmware else None,
            )
            process = _start(command.arguments(options, given), [*given.all(), screen], complaints)
            held.callback(_kill, process)
            for one in disks:
                one.connection.close()
            if firmware and isinstance(firmware.variables, TrialDisk):
                firmware.variables.connection.close()
        monitor = held.enter_context(
            _monitor(Address(path=str(directory / "qmp")), process, complaints, stop)
        )
        agent = Address(path=str(directory / "ga"))
        accelerator = "kvm" if monitor.execute("query-kvm").get("enabled") is True else "tcg"
        yield TrialVm(process, monitor, agent, Console(ours), complaints, screen, accelerator)
        with suppress(MonitorError):
            monitor.execute("quit")
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)


def _start(arguments: list[str], inherited: list[int], complaints: IO[bytes]) -> "subprocess.Popen[bytes]":
    program = qemu_tools.system_program()
    _log.debug("start %s", log.Shown([program, *arguments]))
    try:
        return subprocess.Popen(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=complaints,
            stderr=complaints,
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
            cwd="/",
            pass_fds=inherited,
            start_new_session=True,  # a Ctrl-C in the terminal is ours to handle, not QEMU's
            preexec_fn=confined.prepared(confined.rights_for_kvm()),  # noqa: PLW1509 - system calls only
        )
    except subprocess.SubprocessError as err:
        raise Failed(
            f"cannot start {program}: it could not be given the rights of another user",
            hint="root needs CAP_SETUID and CAP_SETGID for it",
        ) from err
    except OSError as err:
        raise Failed(
            f"cannot start {program}: {err.strerror}",
            hint="install qemu-system-x86, or set QEMU_SYSTEM to a QEMU",
        ) from err


@contextmanager
def _monitor(
    address: Address, process: "subprocess.Popen[bytes]", complaints: IO[bytes], stop: Cancellation
) -> Iterator[Monitor]:
    """Connect to the monitor; QEMU greets once it has made its devices."""
    try:
        monitor = Monitor.connect(address, _START_SECONDS, stop)
    except MonitorError as err:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
            raise Failed(f"QEMU did not start: {_why(process, complaints)}", hint=WITHOUT_KVM) from err
        raise
    with monitor:
        yield monitor


def _why(process: "subprocess.Popen[bytes]", complaints: IO[bytes]) -> str:
    """Return why QEMU has ended."""
    if process.returncode == 0:
        return "the guest powered itself off"
    return qemu_tools.last_message(complaints)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End QEMU. Nothing that it has is to be kept."""
    process.kill()
    process.wait()


@contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        made.bind(str(path))
        made.listen(1)
        yield made


def _boot_files(options: TrialOptions, held: ExitStack) -> dict[str, int]:
    """Copy kernel, initrd and firmware to memory, where QEMU can open them whoever it runs as."""
    named = {"-kernel": options.kernel, "-initrd": options.initrd, "-bios": options.firmware}
    return {
        option: held.enter_context(_memory(option, _read(path))).fileno()
        for option, path in named.items()
        if path is not None
    }


def _flash(firmware: TrialFirmware, held: ExitStack) -> Flash:
    code = held.enter_context(_memory("code", _read(firmware.code))).fileno()
    if isinstance(firmware.variables, TrialDisk):
        return Flash(code, firmware.variables.connection.fileno(), firmware.variables.export)
    return Flash(code, held.enter_context(_memory("variables", firmware.variables)).fileno(), "")


def _read(path: Path) -> bytes:
    try:
        found = safe_open.read(path.resolve(), _MOST_BOOT_BYTES)
    except (safe_open.NotThere, RepositoryError) as err:
        raise UsageError(f"cannot read {path}: {err}") from err
    if not found or len(found) > _MOST_BOOT_BYTES:
        raise UsageError(f"{path} is empty, or too large to boot")
    return found


@contextmanager
def _memory(name: str, content: bytes) -> Iterator[IO[bytes]]:
    """Yield a file in memory, which anybody may open who has got its descriptor."""
    with os.fdopen(os.memfd_create(name, os.MFD_CLOEXEC), "w+b") as file:
        file.write(content)
        file.flush()
        yield file
