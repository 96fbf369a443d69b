# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl list` and `backupctl show`."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import click

from backupctl.cli import common, output, point_argument, reporters, times, units, vm_argument
from backupctl.cli.target import Target
from backupctl.errors import BackupctlError, DamageFound, UsageError
from backupctl.events.repository import HistoryMismatch
from backupctl.names import VmName, point_time
from backupctl.operations import usage
from backupctl.outcome import documents
from backupctl.progress import counted
from backupctl.repository import audit, summary
from backupctl.repository.point import Point
from backupctl.repository.repository import Repository
from backupctl.repository.summary import Listing, PointSummary
from backupctl.repository.vm_directory import ScannedPoints, VmDirectory

if TYPE_CHECKING:
    from pathlib import Path

_UTC = click.option("--utc", is_flag=True, help="Show times in UTC, not in local time.")


@common.command(
    "list",
    0,
    2,
    4,
    examples=(
        ("All VMs", "backupctl list"),
        ("How many points each VM has", "backupctl list --totals"),
        ("One VM, for a program", "backupctl list web --json"),
    ),
)
@vm_argument.Named(needs_vm=False, optional=True, several=True)
@_UTC
@click.option("--totals", is_flag=True, help="One line for each VM: how many points, the newest, their size.")
@common.json_option
def list_points(target: Target, *, utc: bool, totals: bool, as_json: bool) -> None:
    """List the recovery points of VMs, or of all VMs in every configured repository, newest last.

    STORED is what the images of a point take; CHAIN is what a restore reads: its images and those below. A
    narrow terminal shows fewer columns.
    """
    if totals and as_json:
        raise UsageError("--totals and --json are mutually exclusive")
    looked = _Look(target)
    if as_json:
        looked.print_json()
    else:
        looked.print_table(_totals_of if totals else _rows_of, _TOTALS if totals else _COLUMNS, utc=utc)
    looked.tell()


_COLUMNS = ("VM", "POINT", "TIME", "AGE", "KIND", "STORED>", "CHAIN>", "CONSISTENT", "DISKS", "PROTECTED")
_SPARE = ("TIME", "CHAIN", "DISKS")
_TOTALS = ("VM", "POINTS>", "NEWEST", "AGE", "STORED>", "OF DROPPED>")
Row = tuple[str, ...]


class _Look:
    """A look at all VMs that are meant, one after the other: of many not all fit into memory.

    Raises what is wrong with all repositories.
    """

    def __init__(self, target: Target) -> None:
        self.failures: list[BackupctlError] = []
        self.problems: list[HistoryMismatch] = []
        self.damaged: list[BackupctlError] = []
        self.unreadable: list[BackupctlError] = []
        self.directories: dict[Path, list[VmDirectory]] = {}
        for path, names in target.by_repository().items():
            try:
                self.directories[path] = _directories(target.open(path), names)
            except BackupctlError as err:
                self.failures.append(err)
        if not self.directories:
            raise common.worst(self.failures)

    def print_json(self) -> None:
        """Print the manifests of all points. They are read: no summary has all that is in them."""
        output.print_json_list(self._documents())

    def _documents(self) -> Iterator[documents.Document]:
        for each in self.directories.values():
            with self._noting_failure():
                for directory in each:
                    points = directory.scan_some(directory.all_points())
                    self._note(directory, points.committed, audit.problems(directory))
                    current = points.committed.points
                    chains = usage.chain_bytes((*current, *points.retired.points))
                    for one in current:
                        yield documents.point(one, chains[one.id])

    def print_table(self, rows_of: "RowsOf", columns: Sequence[str], *, utc: bool) -> None:
        """Print a table for each repository; with its name, if there are others."""
        for path, each in self.directories.items():
            total = _Total()
            rows = itertools.chain.from_iterable(
                rows_of(directory.name, listing, utc=utc)
                for directory, listing in self._listings(each, total)
            )
            first = next(rows, None)
            if first is None:
                output.print_line(f"no recovery points in {path}")
                continue
            if len(self.directories) > 1:
                output.print_line(f"{path}:")
            output.print_table(columns, itertools.chain([first], rows), spare=_SPARE, narrow=True)
            output.print_line(total.text())

    def tell(self) -> None:
        """Report what is wrong. Raises the worst of it."""
        with reporters.reporter(quiet=True) as reporter:
            for problem in self.problems:
                reporter.event(problem)
        if self.damaged:
            text = "; ".join(err.message for err in self.damaged)
            state = "the points listed can be read; the damaged ones are not used"
            self.failures.append(DamageFound(text, state=state))
        for err in self.unreadable:
            self.failures.append(err.add(state="the points listed can be read; this one may be whole"))
        if self.failures:
            raise common.worst(self.failures)

    def _listings(
        self, directories: Iterable[VmDirectory], total: "_Total"
    ) -> Iterator[tuple[VmDirectory, Listing]]:
        with self._noting_failure():
            for directory in directories:
                listing = summary.look(directory)
                self._note(directory, listing, listing.problems)
                total.add(listing)
                yield directory, listing

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except BackupctlError as err:
            self.failures.append(err)

    def _note(
        self, directory: VmDirectory, found: ScannedPoints | Listing, problems: Iterable[audit.Problem]
    ) -> None:
        self.problems += [HistoryMismatch(directory.name, one.point, one.message) for one in problems]
        self.damaged += [err for _, err in found.damaged]
        self.unreadable += [err for _, err in found.unreadable]


def _directories(repository: Repository, names: Sequence[VmName | None]) -> list[VmDirectory]:
    return [repository.vm(vm) for name in names for vm in ([name] if name else repository.vms())]


@dataclass
class _Total:
    """What a table comes to. kept_bytes: of dropped points that others depend on."""

    points: int = 0
    vms: int = 0
    stored_bytes: int = 0
    kept_bytes: int = 0

    def add(self, listing: Listing) -> None:
        """Add a VM."""
        self.points += len(listing.points)
        self.vms += bool(listing.points)
        self.stored_bytes += _stored_bytes(listing.points)
        self.kept_bytes += _stored_bytes(listing.retired)

    def text(self) -> str:
        """Return the line below the table."""
        text = f"{counted(self.points, 'point')} of {counted(self.vms, 'VM')}, "
        text += f"{units.size(self.stored_bytes)} stored"
        kept = self.kept_bytes
        return f"{text}; {units.size(kept)} more of dropped points that others depend on" if kept else text


def _stored_bytes(points: Iterable[PointSummary]) -> int:
    return sum([disk.stored_bytes for point in points for disk in point.disks])


class RowsOf(Protocol):
    """What makes the rows of a table about one VM."""

    def __call__(self, vm: VmName, listing: Listing, *, utc: bool) -> Iterator[Row]:
        """Yield the rows."""


def _rows_of(vm: VmName, listing: Listing, *, utc: bool) -> Iterator[Row]:
    """Yield a row for each point."""
    chains = usage.chain_bytes((*listing.points, *listing.retired))
    now, size, time_and_age = int(times.now().timestamp()), units.size, times.of_point_with_age
    for point in listing.points:
        taken, age = time_and_age(point.id, now, utc=utc)
        kind, stored_bytes, disks = _of_disks(point)
        chain = chains[point.id]
        yield (
            vm,
            point.id,
            taken,
            age,
            kind,
            size(stored_bytes),
            "?" if chain is None else size(chain),
            point.consistency,
            disks,
            "yes" if point.protected else "",
        )


def _of_disks(point: PointSummary) -> tuple[str, int, str]:
    """Return what a point is by what its disks are, what they store, and their names."""
    disks = point.disks
    if len(disks) == 1:  # most have one, and there may be very many
        return disks[0].kind, disks[0].stored_bytes, disks[0].name
    return _kind(point), point.stored_bytes, ",".join([disk.name for disk in disks])


def _totals_of(vm: VmName, listing: Listing, *, utc: bool) -> Iterator[Row]:
    """Yield one row, if there is a point."""
    if not listing.points:
        return
    newest = listing.points[-1].id
    kept = _stored_bytes(listing.retired)
    yield (
        vm,
        str(len(listing.points)),
        times.of_point(newest, utc=utc),
        times.age(point_time(newest), times.now()),
        units.size(_stored_bytes(listing.points)),
        units.size(kept) if kept else "",
    )


def _kind(point: Point | PointSummary) -> str:
    """Say what a point is by what its disks are: a point that builds on another may hold full ones."""
    kind = documents.disks_kind(point)
    return (
        f"incremental ({sum(disk.kind == 'full' for disk in point.disks)} full)" if kind == "mixed" else kind
    )


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
@vm_argument.Named(needs_vm=False)
@point_argument.point(default="latest")
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
        from backupctl.operations.restore import definition  # noqa: PLC0415 - `list` must load quickly

        output.print_content(definition.main_file(directory, found))
        return
    every = directory.scan_some(directory.all_points())
    chain = usage.chain_bytes((*every.committed.points, *every.retired.points)).get(found.id)
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
        ("stored", units.size(sum(entry.stored_bytes for entry in manifest.disks))),
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
            ("FILE", "KIND", "FROM"),
            [(one.name, one.kind, one.origin or "-") for one in manifest.definition],
        )
    for entry in manifest.disks:
        if entry.reason:
            how = "read in full and compared" if entry.scanned else "taken full"
            output.print_line(f"{entry.name} was {how}: {entry.reason}")
