# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl serve`."""

from dataclasses import dataclass
from pathlib import Path

import click

from backupctl.cancel import Cancellation
from backupctl.cli import common, output, param_types, point_argument, reporters, units, vm_argument
from backupctl.cli.target import Target
from backupctl.events import StepStarted
from backupctl.events.restore import OverlayKept, ServedToLocalUsers
from backupctl.operations import serve as core
from backupctl.operations.serve import Export
from backupctl.outcome import documents


@dataclass(frozen=True)
class Where:
    """The options that say where disks are served."""

    socket: Path | None
    tcp: str | None
    tls: Path | None


@common.command(
    "serve",
    0,
    1,
    2,
    4,
    75,
    examples=(
        ("Every disk, on a private socket; prints the URIs", "backupctl serve web latest"),
        (
            "One disk, with writes kept in a file of their own",
            "backupctl serve web latest --disk vda --writable-overlay /srv/try.qcow2",
        ),
        (
            "To another machine, encrypted, with a pre-shared key",
            "backupctl serve web latest --tcp 0.0.0.0:10809 --tls /etc/backupctl/tls",
        ),
    ),
)
@vm_argument.Named(needs_vm=False)
@point_argument.point()
@click.option("--disk", metavar="D", help="Only this disk.")
@click.option(
    "--socket",
    type=param_types.PATH,
    metavar="PATH",
    help="Serve on this unix socket, accessible to you and root only (default: one in a private directory).",
)
@click.option(
    "--tcp",
    metavar="[HOST:]PORT",
    help="Serve on TCP on this machine, where every local user can read the disks; port 0 is any free port. "
    "From another machine use ssh -L PORT:SOCKET instead.",
)
@click.option(
    "--tls",
    type=param_types.PATH,
    metavar="DIR",
    help="Require TLS, and allow --tcp on any address. DIR has keys.psk, or ca-cert.pem, server-cert.pem and "
    "server-key.pem; a client then needs a certificate of the same CA.",
)
@click.option(
    "--writable-overlay",
    type=param_types.PATH,
    metavar="FILE",
    help="Make one disk writable: writes go to this qcow2 file, new or made by an earlier serve of POINT.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document when all disks are served.")
@common.gathered(Where)
def serve(
    target: Target,
    where: Where,
    *,
    point: str,
    disk: str | None,
    writable_overlay: Path | None,
    as_json: bool,
) -> None:
    """Serve the disks of POINT over NBD, read-only, until Ctrl-C or SIGTERM.

    POINT is an id, the beginning of one, `latest`, or `latest~N`, the Nth point before it.

    Each disk is an export of its own. The repository is only read. From another machine:
    `ssh -L 10809:PATH HOST` leads to the unix socket PATH of --socket.
    """
    directory = target.vm_directory()
    found = directory.point(point)

    def ready(exports: tuple[Export, ...]) -> None:
        if as_json:
            output.print_json(documents.served(directory.name, found.id, exports))
            return
        output.print_table(
            ("DISK", "SIZE>", "ACCESS", "URI"),
            [
                (one.disk, units.size(one.size), "writable" if one.writable else "read-only", one.uri)
                for one in exports
            ],
        )

    stop = Cancellation()
    with stop.on_signals(), reporters.reporter() as reporter:
        reporter.event(StepStarted(f"serving {directory.name} {found.id}, until Ctrl-C"))
        if where.tcp and not where.tls:
            reporter.event(ServedToLocalUsers(disk, writable_overlay))
        request = core.ServeRequest(found, disk, where.socket, where.tcp, where.tls, writable_overlay)
        core.serve(directory, request, ready=ready, stop=stop)
        if writable_overlay:
            reporter.event(OverlayKept(writable_overlay))
