# SPDX-License-Identifier: GPL-2.0-or-later
"""`restore --define`: the disks of a point, and a domain of libvirt that uses them.

The domain is defined last, when all its files are durable, and it is not started. A restore that is killed
anywhere before that leaves files in the target directory, and libvirt knows nothing of them.
"""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.errors import UNTOUCHED, BackupctlError, MonitorError, TargetExists, UsageError
from backupctl.events import StepStarted
from backupctl.events.restore import DomainNote
from backupctl.operations.restore import definition, destination, whole
from backupctl.operations.restore.request import RestoreRequest
from backupctl.operations.restore.whole import RestoredDisk, RestoreReport
from backupctl.options import Timeouts
from backupctl.progress import Reporter
from backupctl.repository import read_locks, stored_files
from backupctl.repository.point import Point
from backupctl.system import durable
from backupctl.targets import output
from backupctl.vm import define
from backupctl.vm.define import Changes, NewDisk, Rewritten

_VARIABLES, _DOMAIN = "variables.fd", "domain.xml"
_DIRECTORY_MODE = 0o711
"""QEMU, which runs as another user, must be able to open the images by their names, and no more."""


@dataclass(frozen=True)
class DefineRequest:
    """What domain is to be made. uri: of libvirt. name: "" for that of the stored domain.

    keep_identity: whether the UUID and the MAC addresses stay as they were.
    """

    uri: str
    name: str
    keep_identity: bool
    timeouts: Timeouts


@dataclass(frozen=True)
class DefineReport:
    """The result: the disks, and the domain. variables: the UEFI variables, None if the point has none."""

    restored: RestoreReport
    domain: str
    uuid: str
    variables: Path | None


def restore(
    wanted: RestoreRequest, asked: DefineRequest, reporter: Reporter, stop: Cancellation
) -> DefineReport:
    """Restore the disks of a point, and define a domain with them.

    Everything that can be refused is refused before a byte is written. Raises as `whole.restore`, and
    MonitorError.
    """
    with read_locks.reading(wanted.directory, wanted.point) as point:
        document, directory = _stored(wanted, point)
        entry = stored_files.first(point.manifest.definition, "variables")
        variables = directory / _VARIABLES if entry else None
        foretold = define.rewritten(document, _changes(point, (), variables, asked))
        with define.connected(asked.uri, asked.timeouts.command_seconds) as connection:
            define.refuse_existing(connection, foretold)
        with _directory_made(directory):
            restored = whole.restore(wanted, reporter, stop)
        if entry is not None and variables is not None:
            definition.restore_file(wanted, point, entry, variables, reporter)
        stop.check()
        made = define.rewritten(document, _changes(point, restored.images, variables, asked))
        reporter.event(StepStarted("define"))
        definition.write(wanted, directory / _DOMAIN, made.document.encode(), reporter)
        _define(wanted, made, asked, directory)
    for note in made.notes:
        reporter.event(DomainNote(made.name, note))
    return DefineReport(restored, made.name, made.uuid, variables)


def _stored(wanted: RestoreRequest, point: Point) -> tuple[str, Path]:
    """Return the XML of the point's domain, and the directory that everything goes to.

    Raises UsageError, TargetExists, DamageFound.
    """
    entry = stored_files.first(point.manifest.definition, "domain")
    if entry is None:
        raise _no_domain(wanted, point)
    directory = _directory(wanted)
    _refuse_files(wanted, directory)
    return stored_files.read(point.path, entry).decode(errors="replace"), directory


def _no_domain(wanted: RestoreRequest, point: Point) -> BackupctlError:
    name = wanted.directory.name
    if stored_files.first(point.manifest.definition, "qemu", "images") is None:
        return definition.no_definition(wanted.directory, point)
    return UsageError(
        f"{name} {point.id} was not a domain of libvirt, so there is nothing to define",
        state=UNTOUCHED,
        hint="restore the disks, and start QEMU with the command line that the point holds",
        next_command=f"backupctl show {name} {point.id} --definition",
    )


def _directory(wanted: RestoreRequest) -> Path:
    if wanted.disk is not None:
        raise UsageError("--define restores all disks: it cannot be used with --disk", state=UNTOUCHED)
    if wanted.to == destination.STDOUT or not destination.is_directory(wanted.to):
        raise UsageError("--define needs a directory: --to DIR/", state=UNTOUCHED)
    return output.place_of(Path(wanted.to).absolute())


def _refuse_files(wanted: RestoreRequest, directory: Path) -> None:
    for name in (_VARIABLES, _DOMAIN):
        definition.refuse_file(wanted, directory / name)


@contextmanager
def _directory_made(directory: Path) -> Iterator[None]:
    """Make the directory, if there is none: `whole.restore` would make one that QEMU's user cannot enter.

    If the block fails before anything is in it, it goes again.
    """
    missing = not directory.is_dir() and directory.parent.is_dir()
    if missing:
        durable.make_directory(directory)
        directory.chmod(_DIRECTORY_MODE)  # whatever the umask is, which keeps others out of what we create
    try:
        yield
    except BaseException:
        if missing:
            with suppress(OSError):  # something is in it
                directory.rmdir()
        raise


def _changes(
    point: Point, images: tuple[RestoredDisk, ...], variables: Path | None, asked: DefineRequest
) -> Changes:
    disks = {}
    for image in images:
        entry = point.manifest.disk(image.name)
        target = entry.node if entry else image.name  # libvirt's name of a disk, whatever it is stored under
        disks[str(target)] = NewDisk(output.place_of(Path(image.path).absolute()), image.format)
    return Changes(asked.name, disks, variables, asked.keep_identity)


def _define(wanted: RestoreRequest, made: Rewritten, asked: DefineRequest, directory: Path) -> None:
    """Define the domain, of files that are all durable. Raises MonitorError, TargetExists."""
    try:
        with define.connected(asked.uri, asked.timeouts.command_seconds) as connection:
            define.refuse_existing(connection, made)
            define.define(connection, made)
    except (MonitorError, TargetExists) as err:
        err.state = ""
        raise err.add(
            state=f"the disks are restored to {wanted.to}; no domain was defined",
            next_command=shlex.join(["virsh", "-c", asked.uri, "define", str(directory / _DOMAIN)]),
        ) from err
