# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl restore`."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import click

from backupctl.cancel import Cancellation
from backupctl.cli import common, output, reporters, units
from backupctl.errors import DamageFound, UsageError
from backupctl.images.foreign_header import FEATURES
from backupctl.operations.restore import in_place, overlay
from backupctl.operations.restore import whole as core
from backupctl.operations.restore.destination import STDOUT
from backupctl.operations.restore.in_place import InPlaceReport
from backupctl.operations.restore.overlay import OverlayReport
from backupctl.operations.restore.whole import RestoreReport
from backupctl.progress import Reporter
from backupctl.repository.point import Point
from backupctl.repository.vm_folder import VmFolder


@common.command("restore", 0, 1, 2, 4, 75)
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
@click.option("--force", is_flag=True, help="Write over what is there, and let damaged data through.")
@click.option("--thin", is_flag=True, help="An overlay on the point, which must stay: done at once.")
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
def restore(target: common.Target, /, **options: Any) -> None:
    """Restore a VM's disks as they were at POINT (an id, or `latest`).

    --to: an existing folder, a name that ends in `/`, and a new name without a suffix are folders; each disk
    becomes DIR/<disk>.<format>. A name that ends in .qcow2, .raw or .img is a file of that format; a new file
    with another suffix needs --format. The folder above must exist.

    With --only-changed the image is taken for what the disk was in the VM (a device: raw), unless --format
    says otherwise. Names and contents are never asked what they are.

    The VM is not touched, and the repository is only read.
    """
    folder = target.vm_folder()
    way = _way(options)
    stop = Cancellation()
    with stop.on_signals():
        with reporters.reporter() as reporter:
            tell = way(folder, folder.point(options["point"]), options, reporter, stop)
        output.done(f"the restore to {options['to']} is complete")
        tell()


def _whole(
    folder: VmFolder, point: Point, options: dict[str, Any], reporter: Reporter, stop: Cancellation
) -> Callable[[], None]:
    report = core.restore(
        folder,
        point,
        to=options["to"],
        disk=options["disk"],
        image_format=options["image_format"],
        force=options["force"],
        reporter=reporter,
        stop=stop,
        all_disks=options["all_disks"],
        allowed=options["allowed"],
    )
    return partial(_tell, report, options)


def _way(options: dict[str, Any]) -> Callable[..., Callable[[], None]]:
    """Return what does it; what that returns tells the outcome."""
    if options["as_json"] and options["to"] == "-":
        raise UsageError("standard output can't hold an image and the document of --json: one of them")
    if options["thin"] and options["only_changed"]:
        raise UsageError("--thin makes a new image, --only-changed changes one that is there: one of them")
    if options["only_changed"] and options["force"]:
        raise UsageError("--only-changed changes what is there without --force, and lets no damage through")
    return _thin if options["thin"] else _only_changed if options["only_changed"] else _whole


def _thin(
    folder: VmFolder, point: Point, options: dict[str, Any], reporter: Reporter, _stop: Cancellation
) -> Callable[[], None]:
    report = overlay.restore(
        folder,
        point,
        to=options["to"],
        disk=options["disk"],
        image_format=options["image_format"],
        force=options["force"],
        reporter=reporter,
        all_disks=options["all_disks"],
        allowed=options["allowed"],
    )
    return partial(_tell_thin, report, as_json=options["as_json"])


def _tell_thin(report: OverlayReport, *, as_json: bool) -> None:
    if as_json:
        disks = [
            {
                "name": one.name,
                "point": one.point,
                "path": str(one.path),
                "size": one.size,
                "backing": str(one.backing),
            }
            for one in report.images
        ]
        _print_document(report, disks)
        return
    for one in report.images:
        output.print_line(
            f"{report.vm} {one.point} {one.name}: {one.path} ({units.size(one.size)}, on {one.backing})"
        )


def _only_changed(
    folder: VmFolder, point: Point, options: dict[str, Any], reporter: Reporter, stop: Cancellation
) -> Callable[[], None]:
    report = in_place.restore(
        folder,
        point,
        to=options["to"],
        disk=options["disk"],
        image_format=options["image_format"],
        reporter=reporter,
        stop=stop,
        all_disks=options["all_disks"],
        allowed=options["allowed"],
    )
    return partial(_tell_only_changed, report, as_json=options["as_json"])


def _tell_only_changed(report: InPlaceReport, *, as_json: bool) -> None:
    if as_json:
        disks = [
            {
                "name": one.name,
                "point": one.point,
                "path": str(one.path),
                "format": one.format,
                "size": one.size,
                "written_bytes": one.written_bytes,
                "same_bytes": one.same_bytes,
                "seconds": round(one.seconds, 3),
            }
            for one in report.images
        ]
        _print_document(report, disks)
        return
    for one in report.images:
        output.print_line(
            f"{report.vm} {one.point} {one.name}: {one.path} ({one.format}), "
            f"{units.size(one.written_bytes)} written, {units.size(one.same_bytes)} already identical "
            f"({units.duration(one.seconds)})"
        )


def _tell(report: RestoreReport, options: dict[str, Any]) -> None:
    if options["to"] != STDOUT:
        _tell_whole(report, as_json=options["as_json"])
    if any(one.damaged or one.unproven for one in report.images):
        # All that was asked for is there, and was told with its damage; who rests on it must know.
        sys.exit(DamageFound.exit_code)


def _tell_whole(report: RestoreReport, *, as_json: bool) -> None:
    if as_json:
        disks = [
            {
                "name": one.name,
                "point": one.point,
                "path": one.path,
                "format": one.format,
                "size": one.size,
                "seconds": round(one.seconds, 3),
                "damaged": [{"offset": offset, "length": length} for offset, length in one.damaged],
                "unproven": one.unproven or None,
            }
            for one in report.images
        ]
        _print_document(report, disks)
        return
    for one in report.images:
        output.print_line(
            f"{report.vm} {one.point} {one.name}: {one.path} ({one.format}, {units.size(one.size)}, "
            f"{units.duration(one.seconds)})"
        )


def _print_document(
    report: RestoreReport | OverlayReport | InPlaceReport, disks: list[dict[str, Any]]
) -> None:
    missing = [{"name": one.name, "point": one.point} for one in report.missing]
    output.print_json({"vm": report.vm, "point": report.point, "disks": disks, "missing": missing})
