# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl serve`."""

from typing import Any

import click

from backupctl.cancel import Cancellation
from backupctl.cli import common, config, output, reporters, units
from backupctl.events import StepStarted
from backupctl.events.restore import OverlayKept, ServedToLocalUsers
from backupctl.names import vm_name
from backupctl.operations import serve as core
from backupctl.operations.serve import Export


@click.command(epilog=common.exit_help(0, 1, 2, 4, 75))
@common.named(needs_vm=False)
@click.argument("point")
@click.option("--disk", metavar="D", help="Only this disk.")
@click.option(
    "--socket",
    metavar="PATH",
    help="Serve on this unix socket, accessible to you and root only (default: one in a private folder).",
)
@click.option(
    "--tcp",
    metavar="[HOST:]PORT",
    help="Serve on TCP on this machine, where every local user can read the disks; port 0 is any free port. "
    "From another machine use ssh -L PORT:SOCKET instead.",
)
@click.option(
    "--writable-overlay",
    metavar="FILE",
    help="Make one disk writable: writes go to this qcow2 file, new or made by an earlier serve of POINT.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document when all disks are served.")
@click.pass_context
def serve(context: click.Context, /, **options: Any) -> None:
    """Serve the disks of POINT (an id, or `latest`) over NBD, read-only, until Ctrl-C or SIGTERM.

    Each disk is an export of its own. The repository is only read. From another machine:
    `ssh -L 10809:PATH HOST` leads to the unix socket PATH of --socket.
    """
    names = common.from_context(context, options)
    folder = names.repository().vm(vm_name(names.name or ""))
    point = folder.point(options["point"])

    def ready(exports: tuple[Export, ...]) -> None:
        if options["as_json"]:
            output.print_json(
                {
                    "vm": folder.name,
                    "point": point.id,
                    "exports": [
                        {"disk": one.disk, "uri": one.uri, "size": one.size, "writable": one.writable}
                        for one in exports
                    ],
                }
            )
            return
        output.print_table(
            ("DISK", "SIZE>", "ACCESS", "URI"),
            [
                (one.disk, units.size(one.size), "writable" if one.writable else "read-only", one.uri)
                for one in exports
            ],
        )

    stop = Cancellation()
    overlay = options["writable_overlay"]
    with stop.on_signals(), reporters.reporter() as reporter:
        reporter.event(StepStarted(f"serving {folder.name} {point.id}, until Ctrl-C"))
        if options["tcp"]:
            reporter.event(ServedToLocalUsers(options["disk"], overlay))
        core.serve(
            folder,
            point,
            disk=options["disk"],
            unix=config.absolute(options["socket"], "--socket") if options["socket"] else None,
            tcp=options["tcp"],
            writable_overlay=config.absolute(overlay, "--writable-overlay") if overlay else None,
            ready=ready,
            stop=stop,
        )
        if overlay:
            reporter.event(OverlayKept(overlay))
