# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl restore-test`."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import click

from backupctl.cancel import Cancellation
from backupctl.cli import (
    common,
    crash_log,
    output,
    param_types,
    point_argument,
    reporters,
    settings,
    units,
    vm_argument,
)
from backupctl.cli.common import DEFAULTS, Declared
from backupctl.cli.target import Target
from backupctl.errors import UNTOUCHED, TargetExists, UsageError, WriteFailed
from backupctl.names import disk_name
from backupctl.operations import restore_test as core
from backupctl.operations.restore_test import RestoreTestReport, RestoreTestRequest
from backupctl.outcome import documents
from backupctl.targets import output as target_files
from backupctl.vm.trial.options import Accelerator, DiskBus, TrialOptions, Until

BUILT_IN = TrialOptions()
CONSOLE = "backupctl-console-"
"""How the names of files begin that have the console of a failed test."""


@dataclass(frozen=True)
class TrialArguments:
    """The options that the configuration has as well."""

    restore_test_until: Until
    restore_test_command: str
    restore_test_timeout: float
    restore_test_machine: str
    restore_test_memory: int
    restore_test_disk_bus: DiskBus
    restore_test_accelerator: Accelerator
    restore_test_firmware: Path | None
    restore_test_kernel: Path | None
    restore_test_initrd: Path | None
    restore_test_append: str

    def options(self) -> TrialOptions:
        """Return what they mean."""
        return TrialOptions(
            until="command" if self.restore_test_command else self.restore_test_until,
            command=self.restore_test_command,
            timeout_seconds=self.restore_test_timeout,
            machine=self.restore_test_machine,
            memory_mib=self.restore_test_memory >> 20,
            disk_bus=self.restore_test_disk_bus,
            accelerator=self.restore_test_accelerator,
            firmware=self.restore_test_firmware,
            kernel=self.restore_test_kernel,
            initrd=self.restore_test_initrd,
            append=self.restore_test_append,
        )


def configured(target: Target) -> TrialOptions:
    """Return what the configuration says of a VM's restore tests, for `run`."""
    said = target.config.of(target.name)

    def path(text: str | None) -> Path | None:
        return param_types.absolute(text) if text else None

    memory = units.parse_size(said.restore_test_memory) >> 20 if said.restore_test_memory else None
    return TrialOptions(
        until="command" if said.restore_test_command else said.restore_test_until or BUILT_IN.until,
        command=said.restore_test_command or "",
        timeout_seconds=said.restore_test_timeout or BUILT_IN.timeout_seconds,
        machine=said.restore_test_machine or BUILT_IN.machine,
        memory_mib=memory or BUILT_IN.memory_mib,
        disk_bus=said.restore_test_disk_bus or BUILT_IN.disk_bus,
        accelerator=said.restore_test_accelerator or BUILT_IN.accelerator,
        firmware=path(said.restore_test_firmware),
        kernel=path(said.restore_test_kernel),
        initrd=path(said.restore_test_initrd),
        append=said.restore_test_append or "",
    )


def _path(option: str, text: str) -> Callable[[Declared], Declared]:
    return click.option(
        option, f"restore_test_{option[2:]}", type=param_types.PATH, metavar="FILE", help=text
    )


_OPTIONS = (
    click.option(
        "--until",
        "restore_test_until",
        type=click.Choice(("agent", "login")),
        default=BUILT_IN.until,
        show_default=True,
        help="Wait for an answer of the guest agent, or for a prompt to log in on the serial console.",
    ),
    click.option(
        "--command",
        "restore_test_command",
        metavar="COMMAND",
        default="",
        help="Wait for the agent, then run COMMAND with /bin/sh in the guest until it succeeds.",
    ),
    click.option(
        "--timeout",
        "restore_test_timeout",
        type=click.FloatRange(1, settings.MAX_BOOT_SECONDS),
        metavar="SECONDS",
        default=BUILT_IN.timeout_seconds,
        show_default=True,
        help="The longest that the guest may take.",
    ),
    click.option(
        "--machine",
        "restore_test_machine",
        type=param_types.MACHINE,
        metavar="TYPE",
        default=BUILT_IN.machine,
        show_default=True,
        help="QEMU's machine type: q35, pc.",
    ),
    click.option(
        "--memory",
        "restore_test_memory",
        type=param_types.SIZE,
        metavar="SIZE",
        default=f"{BUILT_IN.memory_mib}M",
        show_default=True,
        help="Memory of the VM.",
    ),
    click.option(
        "--disk-bus",
        "restore_test_disk_bus",
        type=click.Choice(("virtio", "scsi", "sata")),
        default=BUILT_IN.disk_bus,
        show_default=True,
        help="How the disks are attached, in the order in which the point lists them.",
    ),
    click.option(
        "--accelerator",
        "restore_test_accelerator",
        type=click.Choice(("auto", "tcg")),
        default=BUILT_IN.accelerator,
        show_default=True,
        help="Use KVM where it can be used, or emulate the CPU: slower, but it works on every host.",
    ),
    _path(
        "--firmware",
        "Boot with this firmware, e.g. /usr/share/ovmf/OVMF.fd. Default: OVMF with the UEFI variables of the "
        "point, or the BIOS if it has none.",
    ),
    _path("--kernel", "Boot this kernel of the host instead of what is on the disks."),
    _path("--initrd", "The initial RAM disk for --kernel."),
    click.option(
        "--append",
        "restore_test_append",
        metavar="TEXT",
        default="",
        help="The command line for --kernel.",
    ),
)


def trial_options(command: Declared) -> Declared:
    """Give a command the options that say what the throw-away VM is like."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True)
class ReportArguments:
    """Where the evidence goes."""

    screenshot: Path | None
    console: Path | None
    as_json: bool


@common.command(
    "restore-test",
    0,
    1,
    2,
    4,
    75,
    examples=(
        ("Boot the newest point until the guest agent answers", "backupctl restore-test web"),
        (
            "Until all services run",
            "backupctl restore-test web --command 'systemctl is-system-running'",
        ),
        (
            "A guest without an agent, and what its screen shows",
            "backupctl restore-test web --until login --screenshot /root/web.png",
        ),
    ),
)
@vm_argument.Named(needs_vm=False)
@point_argument.point(default="latest")
@click.option("--disk", "disks", multiple=True, metavar="D", help="Attach only this disk (repeatable).")
@trial_options
@click.option(
    "--scratch",
    type=param_types.PATH,
    metavar="DIR",
    default=DEFAULTS.scratch.directory,
    show_default=True,
    help="Directory for what the guest writes; it is gone afterwards.",
)
@click.option(
    "--screenshot",
    type=param_types.PATH,
    metavar="FILE",
    help="Write what the screen shows at the end (PNG).",
)
@click.option(
    "--console", type=param_types.PATH, metavar="FILE", help="Write all that the serial console showed."
)
@common.json_option
@common.gathered(TrialArguments)
@common.gathered(ReportArguments)
def restore_test(
    target: Target,
    trial: TrialArguments,
    asked: ReportArguments,
    *,
    point: str,
    disks: tuple[str, ...],
) -> None:
    """Boot POINT in a throw-away VM, to show that it can be restored.

    The VM has no network, no access to the host, and as root it runs as an unprivileged user. What the guest
    writes is thrown away. With KVM where it is available, it takes as long as the guest takes to boot.

    The exit code is 0 if the guest booted, and 1 if it did not. On failure what the serial console showed is
    kept in a file.
    """
    for option, path in (("--screenshot", asked.screenshot), ("--console", asked.console)):
        if path is not None:
            _refuse(path, option)
    directory = target.vm_directory()
    stop = Cancellation()
    request = RestoreTestRequest(
        directory,
        point,
        tuple(disk_name(one) for one in disks),
        trial.options(),
        target.scratch,
        screenshot=asked.screenshot is not None,
    )
    with stop.on_signals(), reporters.reporter() as reporter:
        report = core.test(request, reporter, stop)
    kept = _keep(report, asked)
    output.done("the test is over; its exit code tells how it ended")
    if asked.as_json:
        output.print_json(documents.restore_test(report, kept))
    elif report.passed:
        output.print_line(
            f"{report.vm} {report.point} booted in {report.seconds:.0f} s ({report.accelerator})"
        )
    if report.error:
        raise report.error


def _refuse(target: Path, option: str) -> None:
    """Refuse a file that could not be written when the test is over. Raises UsageError, TargetExists."""
    if os.path.lexists(target):
        raise TargetExists(f"{target} already exists", state=UNTOUCHED, hint="name a new file")
    directory = target_files.place_of(target, option).parent
    if not directory.is_dir():
        raise UsageError(f"cannot write {target}: there is no directory {directory}", state=UNTOUCHED)


def _keep(report: RestoreTestReport, asked: ReportArguments) -> dict[str, Path]:
    """Write screenshot and console where they are wanted; the console of a failure in any case."""
    kept = {}
    if asked.screenshot is not None and report.screenshot:
        kept["screenshot"] = _write(asked.screenshot, report.screenshot)
    if asked.console is not None:
        kept["console"] = _write(asked.console, report.console)
    elif report.error and report.console:
        with suppress(OSError):
            descriptor, name = crash_log.new_file(CONSOLE)
            with os.fdopen(descriptor, "wb") as file:
                file.write(report.console)
            kept["console"] = Path(name)
    if report.error and "console" in kept:
        report.error.hint = f"what its console showed is in {kept['console']}. {report.error.hint}"
    return kept


def _write(target: Path, content: bytes) -> Path:
    try:
        with target_files.file(target, force=False) as made:
            os.write(made.descriptor, content)
    except OSError as err:
        raise WriteFailed(f"cannot write {target}: {err.strerror}") from err
    return target
