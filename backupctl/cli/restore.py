# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl restore`."""

import sys
from typing import Any

import click

from backupctl import restore as core
from backupctl.cli import common, screen, units
from backupctl.errors import DamageFound
from backupctl.names import vm_name
from backupctl.report import Stop
from backupctl.restore import RestoreReport


@click.command(epilog=common.exit_help(0, 1, 2, 4))
@common.named(needs_vm=False)
@click.argument("point", default="latest")
@click.option(
    "--to", required=True, metavar="DIR|FILE|DEVICE|-", help="Where to; `-` is standard output (raw)."
)
@click.option("--disk", metavar="D", help="Only this disk.")
@click.option("--format", "image_format", type=click.Choice(["qcow2", "raw"]), help="The image's format.")
@click.option("--force", is_flag=True, help="Write over what is there, and let damaged data through.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.pass_context
def restore(context: click.Context, /, **options: Any) -> None:
    """Restore a VM's disks as they were at POINT (an id, or `latest`).

    A folder gets DIR/<disk>.<format>. The VM is not touched, and the repository is only read.
    """
    names = common.take(context, options)
    folder = names.repository().vm(vm_name(names.name or ""))
    stop = Stop()
    with stop.on_signals(), screen.reporter() as reporter:
        report = core.restore(
            folder,
            folder.point(options["point"]),
            to=options["to"],
            disk=options["disk"],
            image_format=options["image_format"],
            force=options["force"],
            reporter=reporter,
            stop=stop,
        )
    damaged = [one.name for one in report.images if one.damaged or one.unproven]
    if options["to"] != "-":
        _tell(report, as_json=options["as_json"])
    if damaged:
        # All that was asked for is there, and was told with its damage; who rests on it must know.
        sys.exit(DamageFound.exit_code)


def _tell(report: RestoreReport, *, as_json: bool) -> None:
    if as_json:
        disks = [
            {
                "name": one.name,
                "path": one.path,
                "format": one.format,
                "size": one.size,
                "seconds": round(one.seconds, 3),
                "damaged": [{"offset": offset, "length": length} for offset, length in one.damaged],
                "unproven": one.unproven or None,
            }
            for one in report.images
        ]
        screen.print_json({"vm": report.vm, "point": report.point, "disks": disks})
        return
    for one in report.images:
        screen.print_line(
            f"{report.vm} {report.point} {one.name}: {one.path} ({one.format}, {units.size(one.size)}, "
            f"{units.duration(one.seconds)})"
        )
