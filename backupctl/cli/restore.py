# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl restore`."""

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import click

from backupctl.cancel import Cancellation
from backupctl.cli import common, output, param_types, point_argument, reporters, units, vm_argument
from backupctl.cli.target import Target
from backupctl.errors import DamageFound, UsageError
from backupctl.images.create import ImageFormat
from backupctl.images.foreign_header import FEATURES, ImageFeature
from backupctl.operations.restore import definition, in_place, overlay, whole
from backupctl.operations.restore.definition import RestoredFile
from backupctl.operations.restore.destination import STDOUT
from backupctl.operations.restore.in_place import InPlaceReport
from backupctl.operations.restore.overlay import OverlayReport
from backupctl.operations.restore.request import RestoreRequest
from backupctl.operations.restore.whole import RestoreReport
from backupctl.outcome import documents
from backupctl.progress import Reporter
from backupctl.system import libvirt_uri

if TYPE_CHECKING:  # it loads what few restores need
    from backupctl.operations.restore.define import DefineReport

DEFAULT_URI = "qemu:///system"


@dataclass(frozen=True)
class RestoreArguments:
    """What is asked of a restore. allowed: features that an existing image may have."""

    point: str
    to: str
    disk: str | None
    all_disks: bool
    image_format: ImageFormat | None
    force: bool
    allow_damage: bool
    thin: bool
    only_changed: bool
    allowed: tuple[ImageFeature, ...]
    with_definition: bool
    define: bool
    keep_identity: bool
    as_json: bool


@common.command(
    "restore",
    0,
    1,
    2,
    4,
    75,
    examples=(
        ("All disks of the newest point, as qcow2 images", "backupctl restore web --to /srv/restored/"),
        (
            "One disk of an older point, as a raw image",
            "backupctl restore web 20261123T041500Z --disk vda --to /srv/vda.raw",
        ),
        (
            "The newest point not later than a time",
            'backupctl restore web --at "2026-11-26 18:00" --to /srv/restored/',
        ),
        ("Overlays from which a VM boots at once", "backupctl restore web latest --to /srv/try/ --thin"),
        (
            "Only the differences, onto a device in place",
            "backupctl restore web --disk vda --to /dev/vg/web --only-changed",
        ),
        (
            "The disks, and the files that describe the VM",
            "backupctl restore web --to /srv/restored/ --with-definition",
        ),
        (
            "A VM of libvirt on a new host: its disks, and a domain that uses them",
            "backupctl restore web --to /var/lib/libvirt/images/web/ --define",
        ),
    ),
)
@vm_argument.Named(needs_vm=False)
@point_argument.point(default="latest")
@click.option(
    "--to", required=True, metavar="DIR|FILE|DEVICE|-", help="Where to (see above); `-` is standard output."
)
@click.option("--disk", metavar="D", help="Only this disk.")
@click.option(
    "--all-disks",
    is_flag=True,
    help="Take disks that POINT does not hold from the newest point before it that does.",
)
@click.option("--format", "image_format", type=click.Choice(["qcow2", "raw"]), help="The image's format.")
@click.option("--force", is_flag=True, help="Overwrite an existing file or block device.")
@click.option(
    "--allow-damage",
    is_flag=True,
    help="Restore data even if it does not match its digest; what is damaged is reported (exit code 4).",
)
@click.option(
    "--thin",
    is_flag=True,
    help="Create qcow2 overlays backed by the repository (instant; the point must not be pruned).",
)
@click.option(
    "--only-changed",
    is_flag=True,
    help="Overwrite an existing image or device in place, without further confirmation: only what differs is "
    "written.",
)
@click.option(
    "--allow-image-feature",
    "allowed",
    type=click.Choice(FEATURES),
    multiple=True,
    help="Accept that the existing qcow2 image has a backing file, an external data file, or is encrypted.",
)
@click.option(
    "--with-definition",
    is_flag=True,
    help="Also restore the files that describe the VM, to DIR/definition/.",
)
@click.option(
    "--define",
    is_flag=True,
    help="Define the VM in libvirt, with the restored disks; it is not started.",
)
@click.option(
    "--keep-identity",
    is_flag=True,
    help="With --define: keep the UUID and the MAC addresses. Without: the VM gets new ones.",
)
@click.option(
    "--libvirt",
    type=param_types.LIBVIRT_URI,
    metavar="URI",
    help="With --define: libvirt.  [default: qemu:///system]",
)
@click.option("--domain", metavar="NAME", help="With --define: the new VM's name.  [default: the same]")
@common.json_option
@common.gathered(RestoreArguments)
def restore(target: Target, asked: RestoreArguments) -> None:
    """Restore a VM's disks as they were at POINT (default: `latest`).

    POINT is an id, the beginning of one (20261123T04), `latest`, or `latest~N`, the Nth point before it.

    --to: an existing directory, a name that ends in `/`, and a new name without a suffix are directories;
    each disk becomes DIR/<disk>.<format>. A name that ends in .qcow2, .raw or .img is a file of that format;
    a new file with another suffix needs --format. The directory above must exist.

    With --only-changed the format of the image is that of the disk in the VM (raw for a block device), unless
    --format says otherwise; it is never guessed from a name or from content.

    The VM is not touched, and the repository is only read.
    """
    directory = target.vm_directory()
    run = _way(asked, target)
    stop = Cancellation()
    with stop.on_signals():
        with reporters.reporter() as reporter:
            request = RestoreRequest(
                directory=directory,
                point=directory.point(asked.point).id,
                to=asked.to,
                disk=asked.disk,
                all_disks=asked.all_disks,
                image_format=asked.image_format,
                overwrite=asked.force,
                allow_damage=asked.allow_damage,
                allowed=asked.allowed,
            )
            if asked.with_definition:
                definition.refuse(request)
            tell = run(request, asked, reporter, stop)
            files = definition.restore(request, reporter) if asked.with_definition else ()
        output.done(f"the restore to {asked.to} is complete")
        tell(files)


Tell = Callable[[Sequence[RestoredFile]], None]
"""Prints the outcome. It is given the files of the definition that were restored as well."""
Run = Callable[[RestoreRequest, RestoreArguments, Reporter, Cancellation], Tell]
"""Restores; what it returns prints the outcome."""


def _way(asked: RestoreArguments, target: Target) -> Run:
    """Return what restores in the way that was asked for. Raises UsageError."""
    if asked.as_json and asked.to == STDOUT:
        raise UsageError("standard output cannot hold both an image and the document of --json")
    if asked.thin and asked.only_changed:
        raise UsageError("--thin and --only-changed are mutually exclusive")
    if asked.only_changed and asked.force:
        raise UsageError("--only-changed needs no --force: it changes an existing target in place")
    if asked.only_changed and asked.allow_damage:
        raise UsageError("--only-changed never writes damaged data: it cannot be used with --allow-damage")
    if asked.thin and asked.allow_damage:
        raise UsageError("--thin reads no data: it cannot be used with --allow-damage")
    _refuse_mixed(asked)
    if asked.define:
        return partial(_define, target)
    return _thin if asked.thin else _only_changed if asked.only_changed else _whole


def _refuse_mixed(asked: RestoreArguments) -> None:
    if asked.define and (asked.thin or asked.only_changed):
        other = "--thin" if asked.thin else "--only-changed"
        raise UsageError(f"--define restores whole disks: it cannot be used with {other}")
    if asked.keep_identity and not asked.define:
        raise UsageError("--keep-identity needs --define")


def _define(
    target: Target,
    request: RestoreRequest,
    asked: RestoreArguments,
    reporter: Reporter,
    stop: Cancellation,
) -> Tell:
    from backupctl.operations.restore import define  # noqa: PLC0415 - needed by few restores

    uri = target.libvirt or DEFAULT_URI
    if libvirt_uri.is_remote(uri):
        raise UsageError(
            "the images are restored on this machine, and libvirt is on another: a domain is defined here",
            hint="run the restore on that host, or name --libvirt qemu:///system",
        )
    wanted = define.DefineRequest(uri, target.domain or "", asked.keep_identity, target.timeouts)
    report = define.restore(request, wanted, reporter, stop)
    return partial(_tell, report.restored, asked, report)


def _whole(request: RestoreRequest, asked: RestoreArguments, reporter: Reporter, stop: Cancellation) -> Tell:
    return partial(_tell, whole.restore(request, reporter, stop), asked, None)


def _thin(request: RestoreRequest, asked: RestoreArguments, reporter: Reporter, _stop: Cancellation) -> Tell:
    return partial(_tell_thin, overlay.restore(request, reporter), as_json=asked.as_json)


def _only_changed(
    request: RestoreRequest, asked: RestoreArguments, reporter: Reporter, stop: Cancellation
) -> Tell:
    report = in_place.restore(request, reporter, stop)
    return partial(_tell_only_changed, report, as_json=asked.as_json)


def _tell_thin(report: OverlayReport, files: Sequence[RestoredFile], *, as_json: bool) -> None:
    if as_json:
        output.print_json(documents.with_definition(documents.overlay(report), files))
        return
    for one in report.images:
        output.print_line(
            f"{report.vm} {one.point} {one.name}: {one.path} ({units.size(one.size)}, on {one.backing})"
        )
    _tell_files(files)


def _tell_only_changed(report: InPlaceReport, files: Sequence[RestoredFile], *, as_json: bool) -> None:
    if as_json:
        output.print_json(documents.with_definition(documents.restore_in_place(report), files))
        return
    for one in report.images:
        output.print_line(
            f"{report.vm} {one.point} {one.name}: {one.path} ({one.format}), "
            f"{units.size(one.written_bytes)} written, {units.size(one.same_bytes)} already identical "
            f"({units.duration(one.seconds)})"
        )
    _tell_files(files)


def _tell(
    report: RestoreReport,
    asked: RestoreArguments,
    defined: "DefineReport | None",
    files: Sequence[RestoredFile],
) -> None:
    if asked.to != STDOUT and asked.as_json:
        document = documents.with_definition(documents.restore(report), files)
        output.print_json(documents.defined(document, defined) if defined else document)
    elif asked.to != STDOUT:
        _tell_whole(report)
        _tell_files(files)
        if defined is not None:
            output.print_line(
                f"domain {defined.domain} is defined (UUID {defined.uuid}) and not started: "
                f"virsh start {shlex.quote(defined.domain)}"
            )
    if any(one.damaged or one.unverified for one in report.images):
        # Everything that was asked for is there, but a script that relies on it must learn of the damage.
        sys.exit(DamageFound.exit_code)


def _tell_whole(report: RestoreReport) -> None:
    for one in report.images:
        output.print_line(
            f"{report.vm} {one.point} {one.name}: {one.path} ({one.format}, {units.size(one.size)}, "
            f"{units.duration(one.seconds)})"
        )


def _tell_files(files: Sequence[RestoredFile]) -> None:
    for one in files:
        output.print_line(f"{one.path} ({one.kind}{f', was {one.origin}' if one.origin else ''})")
