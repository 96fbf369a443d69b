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
from backupctl.names import vm_name
from backupctl.operations.restore import in_place, overlay, whole
from backupctl.operations.restore.destination import STDOUT
from backupctl.operations.restore.in_place import InPlaceReport
from backupctl.operations.restore.overlay import OverlayReport
from backupctl.operations.restore.request import RestoreRequest
from backupctl.operations.restore.whole import RestoreReport
from backupctl.progress import Reporter


@click.command(epilog=common.exit_help(0, 1, 2, 4, 75))
@common.named(needs_vm=False)
@click.argument("point", default="latest")
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
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.pass_context
def restore(context: click.Context, /, **options: Any) -> None:
    """Restore a VM's disks as they were at POINT (an id, or `latest`).

    --to: an existing folder, a name that ends in `/`, and a new name without a suffix are folders; each disk
    becomes DIR/<disk>.<format>. A name that ends in .qcow2, .raw or .img is a file of that format; a new file
    with another suffix needs --format. The folder above must exist.

    With --only-changed the format of the image is that of the disk in the VM (raw for a block device), unless
    --format says otherwise; it is never guessed from a name or from content.

    The VM is not touched, and the repository is only read.
    """
    names = common.from_context(context, options)
    folder = names.repository().vm(vm_name(names.name or ""))
    run = _way(options)
    stop = Cancellation()
    with stop.on_signals():
        with reporters.reporter() as reporter:
            request = RestoreRequest(
                folder=folder,
                point=folder.point(options["point"]).id,
                to=options["to"],
                disk=options["disk"],
                all_disks=options["all_disks"],
                image_format=options["image_format"],
                overwrite=options["force"],
                allow_damage=options["allow_damage"],
                allowed=options["allowed"],
            )
            tell = run(request, options, reporter, stop)
        output.done(f"the restore to {options['to']} is complete")
        tell()


Run = Callable[[RestoreRequest, dict[str, Any], Reporter, Cancellation], Callable[[], None]]
"""Restores; what it returns prints the outcome."""


def _way(options: dict[str, Any]) -> Run:
    """Return what restores in the way that was asked for. Raises UsageError."""
    if options["as_json"] and options["to"] == STDOUT:
        raise UsageError("standard output cannot hold both an image and the document of --json")
    if options["thin"] and options["only_changed"]:
        raise UsageError("--thin and --only-changed are mutually exclusive")
    if options["only_changed"] and options["force"]:
        raise UsageError("--only-changed needs no --force: it changes an existing target in place")
    if options["only_changed"] and options["allow_damage"]:
        raise UsageError("--only-changed never writes damaged data: it cannot be used with --allow-damage")
    if options["thin"] and options["allow_damage"]:
        raise UsageError("--thin reads no data: it cannot be used with --allow-damage")
    return _thin if options["thin"] else _only_changed if options["only_changed"] else _whole


def _whole(
    request: RestoreRequest, options: dict[str, Any], reporter: Reporter, stop: Cancellation
) -> Callable[[], None]:
    return partial(_tell, whole.restore(request, reporter, stop), options)


def _thin(
    request: RestoreRequest, options: dict[str, Any], reporter: Reporter, _stop: Cancellation
) -> Callable[[], None]:
    return partial(_tell_thin, overlay.restore(request, reporter), as_json=options["as_json"])


def _only_changed(
    request: RestoreRequest, options: dict[str, Any], reporter: Reporter, stop: Cancellation
) -> Callable[[], None]:
    report = in_place.restore(request, reporter, stop)
    return partial(_tell_only_changed, report, as_json=options["as_json"])


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
    if any(one.damaged or one.unverified for one in report.images):
        # Everything that was asked for is there, but a script that relies on it must learn of the damage.
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
                "unproven": one.unverified or None,
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
