# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl list` and `backupctl show`."""

from typing import Any

import click

from backupctl.cli import common, screen, units
from backupctl.errors import DamageFound
from backupctl.names import VmName, vm_name
from backupctl.repository.layout import Repository
from backupctl.repository.vm_folder import Point


@click.command("list", epilog=common.exit_help(0, 2, 4))
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@common.named(needs_vm=False, optional=True)
@click.pass_context
def list_points(context: click.Context, /, **options: Any) -> None:
    """List the recovery points of a VM, or of all, newest last."""
    names = common.take(context, options)
    repository = names.repository()
    vms = [vm_name(names.name)] if names.name else repository.vms()
    surveys = [repository.vm(vm).survey(bear=True) for vm in vms]
    points = [point for survey in surveys for point in survey.points]
    if options["as_json"]:
        screen.print_json([point_document(point) for point in points])
    elif points:
        columns = ("VM", "POINT", "KIND", "PARENT", "CONSISTENT", "DISKS", "STORED>", "PROTECTED")
        wide = len(columns) - (not any(point.protected for point in points))  # 80 columns are soon full
        screen.print_table(columns[:wide], [row[:wide] for row in _rows(points)])
    else:
        screen.print_line(f"no recovery points in {repository.path}")
    damaged = [(path, err) for survey in surveys for path, err in survey.damaged]
    if damaged:
        raise DamageFound(
            "; ".join(err.message for _, err in damaged),
            state="the points listed can be read; the damaged ones are not used",
        )
    for survey in surveys:
        for _, unread in survey.unreadable:
            raise unread.add(state="the points listed can be read; this one may be whole")


def _rows(points: list[Point]) -> list[tuple[object, ...]]:
    return [
        (
            point.manifest.vm,
            point.id,
            point.manifest.kind,
            point.manifest.parent or "-",
            point.manifest.consistency,
            ",".join(entry.name for entry in point.manifest.disks),
            units.size(sum(entry.stored_bytes for entry in point.manifest.disks)),
            "yes" if point.protected else "",
        )
        for point in points
    ]


def point_document(point: Point) -> dict[str, Any]:
    """Return a point for programs: its manifest under the names of the reports."""
    manifest = point.manifest.to_dict()
    return {
        "vm": manifest["vm"],
        "point": manifest["point"],
        "kind": manifest["kind"],
        "parent": manifest["parent"],
        "consistency": manifest["consistency"],
        "frozen_ms": manifest["freeze"]["milliseconds"],
        "start": manifest["start"],
        "end": manifest["end"],
        "qemu": manifest["qemu"],
        "backupctl": manifest["backupctl"],
        "freeze": manifest["freeze"],
        "disks": manifest["disks"],
        "protected": point.protected,
        "path": str(point.path),
    }


@click.command(epilog=common.exit_help(0, 2, 4))
@common.named(needs_vm=False)
@click.argument("point")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.pass_context
def show(context: click.Context, /, **options: Any) -> None:
    """Show one recovery point: POINT is an id, or `latest`."""
    names = common.take(context, options)
    repository = names.repository()
    point = _folder_point(repository, vm_name(names.name or ""), options["point"])
    if options["as_json"]:
        screen.print_json(point_document(point))
        return
    manifest = point.manifest
    freeze = manifest.freeze
    frozen = f"{freeze.milliseconds} ms" if freeze.milliseconds is not None else "no"
    for name, value in (
        ("point", point.id),
        ("vm", manifest.vm),
        ("kind", manifest.kind),
        ("parent", manifest.parent or "none"),
        ("taken", f"{manifest.start} to {manifest.end}"),
        ("consistency", manifest.consistency),
        ("frozen", f"{frozen} (asked: {freeze.asked})"),
        ("made by", f"backupctl {manifest.backupctl}, QEMU {manifest.qemu}"),
        ("protected", "yes, no prune drops it" if point.protected else "no"),
        ("folder", point.path),
    ):
        screen.print_line(f"{name:<12} {value}")
    screen.print_line("")
    screen.print_table(
        ("DISK", "KIND", "PARENT", "SIZE>", "COPIED>", "ZEROES>", "STORED>", "NODE", "FORMAT"),
        [
            (
                entry.name,
                "scan" if entry.scanned else entry.kind,
                entry.parent or "-",
                units.size(entry.size),
                units.size(entry.copied_bytes),
                units.size(entry.zero_bytes),
                units.size(entry.stored_bytes),
                entry.node,
                entry.format,
            )
            for entry in manifest.disks
        ],
    )
    for entry in manifest.disks:
        if entry.reason:
            how = "read whole and compared" if entry.scanned else "taken full"
            screen.print_line(f"{entry.name} was {how}: {entry.reason}")


def _folder_point(repository: Repository, vm: VmName, wanted: str) -> Point:
    return repository.vm(vm).point(wanted)
