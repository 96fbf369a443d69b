# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl restore`."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import click

from backupctl.cancel import Cancellation
from backupctl.cli import common, output, reporters, units
from backupctl.cli.target import Target
from backupctl.errors import DamageFound, UsageError
from backupctl.images.create import ImageFormat
from backupctl.images.foreign_header import FEATURES, ImageFeature
from backupctl.operations.restore import in_place, overlay, whole
from backupctl.operations.restore.destination import STDOUT
from backupctl.operations.restore.in_place import InPlaceReport
from backupctl.operations.restore.overlay import OverlayReport
from backupctl.operations.restore.request import RestoreRequest
from backupctl.operations.restore.whole import RestoreReport
from backupctl.outcome import documents
from backupctl.progress import Reporter


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
    ),
)
@common.named(needs_vm=False)
@common.point(default="latest")
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
    run = _way(asked)
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
            tell = run(request, asked, reporter, stop)
        output.done(f"the restore to {asked.to} is complete")
        tell()


Run = Callable[[RestoreRequest, RestoreArguments, Reporter, Cancellation], Callable[[], None]]
"""Restores; what it returns prints the outcome."""


def _way(asked: RestoreArguments) -> Run:
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
    return _thin if asked.thin else _only_changed if asked.only_changed else _whole


def _whole(
    request: RestoreRequest, asked: RestoreArguments, reporter: Reporter, stop: Cancellation
) -> Callable[[], None]:
    return partial(_tell, whole.restore(request, reporter, stop), asked)


def _thin(
    request: RestoreRequest, asked: RestoreArguments, reporter: Reporter, _stop: Cancellation
) -> Callable[[], None]:
    return partial(_tell_thin, overlay.restore(request, reporter), as_json=asked.as_json)


def _only_changed(
    request: RestoreRequest, asked: RestoreArguments, reporter: Reporter, stop: Cancellation
) -> Callable[[], None]:
    report = in_place.restore(request, reporter, stop)
    return partial(_tell_only_changed, report, as_json=asked.as_json)


def _tell_thin(report: OverlayReport, *, as_json: bool) -> None:
    if as_json:
        output.print_json(documents.overlay(report))
        return
    for one in report.images:
        output.print_line(
            f"{report.vm} {one.point} {one.name}: {one.path} ({units.size(one.size)}, on {one.backing})"
        )


def _tell_only_changed(report: InPlaceReport, *, as_json: bool) -> None:
    if as_json:
        output.print_json(documents.restore_in_place(report))
        return
    for one in report.images:
        output.print_line(
            f"{report.vm} {one.point} {one.name}: {one.path} ({one.format}), "
            f"{units.size(one.written_bytes)} written, {units.size(one.same_bytes)} already identical "
            f"({units.duration(one.seconds)})"
        )


def _tell(report: RestoreReport, asked: RestoreArguments) -> None:
    if asked.to != STDOUT:
        _tell_whole(report, as_json=asked.as_json)
    if any(one.damaged or one.unverified for one in report.images):
        # Everything that was asked for is there, but a script that relies on it must learn of the damage.
        sys.exit(DamageFound.exit_code)


def _tell_whole(report: RestoreReport, *, as_json: bool) -> None:
    if as_json:
        output.print_json(documents.restore(report))
        return
    for one in report.images:
        output.print_line(
            f"{report.vm} {one.point} {one.name}: {one.path} ({one.format}, {units.size(one.size)}, "
            f"{units.duration(one.seconds)})"
        )
