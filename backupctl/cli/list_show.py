# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl list` and `backupctl show`."""

from collections.abc import Sequence
from pathlib import Path

from backupctl.cli import common, output, reporters, units
from backupctl.cli.target import Target
from backupctl.errors import BackupctlError, DamageFound
from backupctl.events.repository import HistoryMismatch
from backupctl.names import VmName
from backupctl.outcome import documents
from backupctl.repository import audit
from backupctl.repository.point import Point
from backupctl.repository.repository import Repository
from backupctl.repository.vm_directory import ScannedPoints, VmDirectory


@common.command(
    "list",
    0,
    2,
    4,
    examples=(
        ("All VMs", "backupctl list"),
        ("One VM, for a program", "backupctl list web --json"),
    ),
)
@common.named(needs_vm=False, optional=True, several=True)
@common.json_option
def list_points(target: Target, *, as_json: bool) -> None:
    """List the recovery points of VMs, or of all VMs in every configured repository, newest last."""
    found: dict[Path, list[ScannedPoints]] = {}
    failures: list[BackupctlError] = []
    problems: list[HistoryMismatch] = []
    for path, names in target.by_repository().items():
        try:
            directories = _directories(target.open(path), names)
            found[path] = [directory.scan_points(tolerant=True) for directory in directories]
            problems += [
                HistoryMismatch(directory.name, one.point, one.message)
                for directory in directories
                for one in audit.problems(directory)
            ]
        except BackupctlError as err:
            failures.append(err)
    if not found:
        raise common.worst(failures)
    surveys = [survey for each in found.values() for survey in each]
    if as_json:
        output.print_json([documents.point(point) for survey in surveys for point in survey.points])
    else:
        for path, each in found.items():
            _tell(path, each, alone=len(found) == 1)
    with reporters.reporter(quiet=True) as reporter:
        for problem in problems:
            reporter.event(problem)
    damaged = [(path, err) for survey in surveys for path, err in survey.damaged]
    if damaged:
        failures.append(
            DamageFound(
                "; ".join(err.message for _, err in damaged),
                state="the points listed can be read; the damaged ones are not used",
            )
        )
    failures += [
        unread.add(state="the points listed can be read; this one may be whole")
        for survey in surveys
        for _, unread in survey.unreadable
    ]
    if failures:
        raise common.worst(failures)


def _directories(repository: Repository, names: Sequence[VmName | None]) -> list[VmDirectory]:
    return [repository.vm(vm) for name in names for vm in ([name] if name else repository.vms())]


def _tell(path: Path, surveys: list[ScannedPoints], *, alone: bool) -> None:
    """Show the points of one repository; with its name, if there are others."""
    points = [point for survey in surveys for point in survey.points]
    if not points:
        output.print_line(f"no recovery points in {path}")
        return
    if not alone:
        output.print_line(f"{path}:")
    columns = ("VM", "POINT", "KIND", "PARENT", "CONSISTENT", "DISKS", "STORED>", "PROTECTED")
    wide = len(columns) - (not any(point.protected for point in points))  # 80 columns are soon full
    output.print_table(columns[:wide], [row[:wide] for row in _rows(points)])


def _rows(points: list[Point]) -> list[tuple[object, ...]]:
    return [
        (
            point.manifest.vm,
            point.id,
            _kind(point),
            point.manifest.parent or "-",
            point.manifest.consistency,
            ",".join(entry.name for entry in point.manifest.disks),
            units.size(sum(entry.stored_bytes for entry in point.manifest.disks)),
            "yes" if point.protected else "",
        )
        for point in points
    ]


def _kind(point: Point) -> str:
    """Say what a point is by what its disks are: a point that builds on another may hold full ones."""
    full = sum(entry.kind == "full" for entry in point.manifest.disks)
    kind = documents.disks_kind(point)
    return f"incremental ({full} full)" if kind == "mixed" else kind


@common.command("show", 0, 2, 4, examples=(("The newest point", "backupctl show web latest"),))
@common.named(needs_vm=False)
@common.point()
@common.json_option
def show(target: Target, *, point: str, as_json: bool) -> None:
    """Show one recovery point: POINT is an id, or `latest`."""
    found = target.vm_directory().point(point)
    if as_json:
        output.print_json(documents.point(found))
    else:
        _show(found)


def _show(point: Point) -> None:
    manifest = point.manifest
    freeze = manifest.freeze
    frozen = f"{freeze.milliseconds} ms" if freeze.milliseconds is not None else "no"
    for name, value in (
        ("point", point.id),
        ("vm", manifest.vm),
        ("kind", _kind(point)),
        ("parent", manifest.parent or "none"),
        ("taken", f"{manifest.start} to {manifest.end}"),
        ("consistency", manifest.consistency),
        ("frozen", f"{frozen} (asked: {freeze.asked})"),
        ("made by", f"backupctl {manifest.backupctl}, QEMU {manifest.qemu}"),
        ("protected", "yes, prune never drops it" if point.protected else "no"),
        ("directory", point.path),
    ):
        output.print_line(f"{name:<12} {value}")
    output.print_line("")
    output.print_table(
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
            how = "read in full and compared" if entry.scanned else "taken full"
            output.print_line(f"{entry.name} was {how}: {entry.reason}")
