# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl mount` and `backupctl umount`."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from backupctl.cancel import Cancellation
from backupctl.cli import common, output, param_types, point_argument, reporters, units, vm_argument
from backupctl.cli.target import Target
from backupctl.events import StepStarted
from backupctl.operations import mount as core
from backupctl.operations.mount import MountedDisk
from backupctl.operations.serve import ServeRequest
from backupctl.outcome import documents

_READY = b"+"


@common.command(
    "mount",
    0,
    1,
    2,
    4,
    75,
    examples=(
        ("Every disk as a file, until Ctrl-C", "backupctl mount web latest /mnt/web"),
        ("In the background", "backupctl mount web latest /mnt/web --background"),
    ),
)
@vm_argument.Named(needs_vm=False)
@point_argument.point()
@click.argument("directory", metavar="DIR", type=param_types.PATH)
@click.option("--disk", metavar="D", help="Only this disk.")
@click.option("--background", is_flag=True, help="Return when the disks are mounted.")
@common.json_option
def mount(
    target: Target, *, point: str, directory: Path, disk: str | None, background: bool, as_json: bool
) -> None:
    """Show the disks of POINT as read-only files DIR/DISK.raw, until Ctrl-C or `umount`.

    The files are raw disks, for programs that read disk images: guestmount, guestfish, qemu-img, testdisk.
    Only you can read them. The file systems in them are not mounted: do not mount them with the host's
    kernel, which a malicious guest could attack that way. `backupctl files` reads single files safely. For
    other file systems, guestfish can run as a user without rights: docs/rights.md says how.

    This needs nbdfuse (package libnbd-bin) and fusermount3 (package fuse3).
    """
    vm_directory = target.vm_directory()
    request = ServeRequest(vm_directory.point(point), disk)
    with _in_background() if background else _in_foreground() as tell:
        stop = Cancellation()

        def ready(mounted: tuple[MountedDisk, ...]) -> None:
            if as_json:
                output.print_json(documents.mounted(vm_directory.name, request.point.id, mounted))
            else:
                output.print_table(
                    ("DISK", "SIZE>", "FILE"), [(one.disk, units.size(one.size), one.path) for one in mounted]
                )
            tell()

        with stop.on_signals(), reporters.reporter() as reporter:
            what = f"mounting {vm_directory.name} {request.point.id}"
            until = f"backupctl umount {directory}" if background else "Ctrl-C"
            reporter.event(StepStarted(f"{what}, until {until}"))
            core.mount(vm_directory, request, directory, ready=ready, stop=stop)


@contextmanager
def _in_foreground() -> Iterator[Callable[[], None]]:
    yield lambda: None


@contextmanager
def _in_background() -> Iterator[Callable[[], None]]:
    """Do the block in a child, which goes on when it has told that it is ready; end this process then.

    If the child ends first, so does this process, with its exit code: it has printed why.
    """
    reading, writing = os.pipe()
    child = os.fork()  # before anything is started: a child of ours ends with the process that started it
    if child:
        os.close(writing)
        try:
            is_ready = os.read(reading, 1) == _READY
        except BaseException:  # Ctrl-C, which the child does not get
            os.kill(child, signal.SIGTERM)
            raise
        code = 0 if is_ready else os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(code if code >= 0 else 1)
    os.close(reading)
    os.setsid()

    def tell() -> None:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
        os.write(writing, _READY)
        os.close(writing)

    yield tell


@common.command("umount", 0, 1, 2, examples=(("End a mount, wherever it runs", "backupctl umount /mnt/web"),))
@click.argument("directory", metavar="DIR", type=param_types.PATH)
@common.json_option
def umount(directory: Path, *, as_json: bool) -> None:
    """Unmount what `backupctl mount` has mounted in DIR; the command that mounted it then ends.

    Mounts that a killed command left are removed, too. Files that are in use stay mounted.
    """
    removed = core.unmount(directory)
    if as_json:
        output.print_json({"unmounted": [str(path) for path in removed]})
    else:
        output.print_line(
            f"unmounted: {', '.join(map(str, removed))}" if removed else f"nothing is mounted in {directory}"
        )
