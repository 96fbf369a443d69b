# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl list` and `backupctl show`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from backupctl.cli import common, output, reporters, times, units
from backupctl.cli.target import Target
from backupctl.errors import BackupctlError, DamageFound, UsageError
from backupctl.events.repository import HistoryMismatch
from backupctl.names import PointId, VmName, point_time
from backupctl.operations import usage
from backupctl.operations.restore import definition
from backupctl.outcome import documents
from backupctl.progress import counted
from backupctl.repository import audit
from backupctl.repository.point import Point
from backupctl.repository.repository import Repository
from backupctl.repository.vm_directory import ScannedPoints, VmDirectory

_UTC = click.option("--utc", is_flag=True, help="Show times in UTC, not in local time.")


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
@_UTC
@common.json_option
def list_points(target: Target, *, utc: bool, as_json: bool) -> None:
    """List the recovery points of VMs, or of all VMs in every configured repository, newest last.

    STORED is what the images of a point take; CHAIN is what a restore reads: its images and those below. A
    narrow terminal shows fewer columns.
    """
    found: dict[Path, list[_Listed]] = {}
    failures: list[BackupctlError] = []
    problems: list[HistoryMismatch] = []
    for path, names in target.by_repository().items():
        try:
            directories = _directories(target.open(path), names)
            found[path] = [_Listed.of(directory) for directory in directories]
            problems += [
                HistoryMismatch(directory.name, one.point, one.message)
                for directory in directories
                for one in audit.problems(directory)
            ]
        except BackupctlError as err:
            failures.append(err)
    if not found:
        raise common.worst(failures)
    listed = [one for each in found.values() for one in each]
    surveys = [one.scanned for one in listed]
    if as_json:
        output.print_json(
            [documents.point(point, one.chains[point.id]) for one in listed for point in one.scanned.points]
        )
    else:
        for path, each in found.items():
            _tell(path, each, utc=utc, alone=len(found) == 1)
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


@dataclass(frozen=True)
class _Listed:
    """The points of one VM. chains: what a restore of each reads. kept_bytes: of dropped points."""

    vm: VmName
    scanned: ScannedPoints
    chains: dict[PointId, int | None]
    kept_bytes: int

    @classmethod
    def of(cls, directory: VmDirectory) -> "_Listed":
        """Look at a VM. Raises RepositoryError."""
        scanned, retired = directory.scan_points(tolerant=True), directory.retired(tolerant=True).points
        chains = usage.chain_bytes((*scanned.points, *retired))
        return cls(directory.name, scanned, chains, sum(map(_stored_bytes, retired)))


def _tell(path: Path, listed: list[_Listed], *, utc: bool, alone: bool) -> None:
    """Show the points of one repository; with its name, if there are others."""
    rows = [_row(one, point, utc=utc) for one in listed for point in one.scanned.points]
    if not rows:
        output.print_line(f"no recovery points in {path}")
        return
    if not alone:
        output.print_line(f"{path}:")
    columns = ("VM", "POINT", "TIME", "AGE", "KIND", "STORED>", "CHAIN>", "CONSISTENT", "DISKS", "PROTECTED")
    wide = len(columns) - (not any(row[-1] for row in rows))  # 80 columns are soon full
    output.print_table(columns[:wide], [row[:wide] for row in rows], spare=("TIME", "CHAIN", "DISKS"))
    output.print_line(_total(listed))


def _row(one: _Listed, point: Point, *, utc: bool) -> tuple[object, ...]:
    taken, chain = point_time(point.id), one.chains[point.id]
    return (
        one.vm,
        point.id,
        times.local(taken, utc=utc),
        times.age(taken, times.now()),
        _kind(point),
        units.size(_stored_bytes(point)),
        "?" if chain is None else units.size(chain),
        point.manifest.consistency,
        ",".join(entry.name for entry in point.manifest.disks),
        "yes" if point.protected else "",
    )


def _total(listed: list[_Listed]) -> str:
    points = [point for one in listed for point in one.scanned.points]
    vms = sum(bool(one.scanned.points) for one in listed)
    kept = sum(one.kept_bytes for one in listed)
    text = f"{counted(len(points), 'point')} of {counted(vms, 'VM')}, "
    text += f"{units.size(sum(map(_stored_bytes, points)))} stored"
    return f"{text}; {units.size(kept)} more of dropped points that others depend on" if kept else text


def _stored_bytes(point: Point) -> int:
    return sum(entry.stored_bytes for entry in point.manifest.disks)


def _kind(point: Point) -> str:
    """Say what a point is by what its disks are: a point that builds on another may hold full ones."""
    full = sum(entry.kind == "full" for entry in point.manifest.disks)
    kind = documents.disks_kind(point)
    return f"incremental ({full} full)" if kind == "mixed" else kind


_CONSISTENCIES = {
    "filesystem": "file systems frozen",
    "crash": "crash-consistent: not frozen",
    "offline": "the VM was off",
}


@common.command(
    "show",
    0,
    2,
    4,
    examples=(
        ("The newest point", "backupctl show web"),
        ("The one before it", "backupctl show web latest~1"),
        ("The XML of its domain, or what QEMU told of it", "backupctl show web latest --definition"),
    ),
)
@common.named(needs_vm=False)
@common.point(default="latest")
@_UTC
@click.option(
    "--definition",
    "wants_definition",
    is_flag=True,
    help="Print the XML of libvirt's domain, or what QEMU told of the VM, as the point holds it.",
)
@common.json_option
def show(target: Target, *, point: str, utc: bool, wants_definition: bool, as_json: bool) -> None:
    """Show one recovery point. POINT is an id, the beginning of one, `latest` (default), or `latest~N`."""
    directory = target.vm_directory()
    found = directory.point(point)
    if wants_definition:
        if as_json:
            raise UsageError("--definition and --json are mutually exclusive")
        output.print_content(definition.main_file(directory, found))
        return
    chain = _Listed.of(directory).chains.get(found.id)
    if as_json:
        output.print_json(documents.point(found, chain))
    else:
        _show(directory.name, found, chain, utc=utc)


def _show(vm: VmName, point: Point, chain: int | None, *, utc: bool) -> None:
    manifest = point.manifest
    freeze, taken = manifest.freeze, point_time(point.id)
    frozen = f"{freeze.milliseconds} ms" if freeze.milliseconds is not None else "no"
    for name, value in (
        ("point", point.id),
        ("vm", vm),
        ("kind", _kind(point)),
        ("parent", manifest.parent or "none"),
        ("time", f"{times.local(taken, utc=utc)}, {times.age(taken, times.now())}"),
        ("run", f"{times.stamp(manifest.start, utc=utc)} to {times.stamp(manifest.end, utc=utc)}"),
        ("consistency", _CONSISTENCIES[manifest.consistency]),
        ("frozen", f"{frozen} (--freeze {freeze.asked})"),
        ("made by", f"backupctl {manifest.backupctl}, QEMU {manifest.qemu}"),
        ("stored", units.size(_stored_bytes(point))),
        ("chain", "unknown" if chain is None else f"{units.size(chain)}, which a restore reads"),
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
        spare=("FORMAT", "NODE", "PARENT"),
    )
    if manifest.definition:
        output.print_line("")
        output.print_table(
            ("FILE", "SIZE>", "KIND", "FROM"),
            [(one.name, units.size(one.size), one.kind, one.origin or "-") for one in manifest.definition],
        )
    for entry in manifest.disks:
        if entry.reason:
            how = "read in full and compared" if entry.scanned else "taken full"
            output.print_line(f"{entry.name} was {how}: {entry.reason}")
