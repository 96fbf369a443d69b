# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl diff`."""

from collections.abc import Sequence

import click
from rich.console import Console
from rich.text import Text

from backupctl.cancel import Cancellation
from backupctl.cli import block_map, common, output, point_argument, units, vm_argument
from backupctl.cli.target import Target
from backupctl.digests.clusters import CLUSTER_BYTES
from backupctl.errors import UsageError
from backupctl.operations import diff as core
from backupctl.operations.diff import DiffReport, DiskDiff
from backupctl.outcome import documents
from backupctl.repository import point_names

_MOST_ROWS = 16
_LABEL = 12
_STYLES = ("dim", "yellow", "yellow", "red", "bold red")


@common.command(
    "diff",
    0,
    1,
    2,
    4,
    75,
    examples=(
        ("What changed since a point", "backupctl diff web 20261123T041500Z latest"),
        ("What changed since a time", 'backupctl diff web --at "2026-11-26 18:00"'),
        (
            "Every changed range of one disk, for a program",
            "backupctl diff web 20261123T041500Z latest --disk vda --json",
        ),
    ),
)
@vm_argument.Named(needs_vm=False)
@point_argument.point_argument("before", required=False)
@point_argument.point_argument("after", required=False)
@point_argument.at_option("In place of BEFORE: the newest point not later than this")
@click.option("--disk", metavar="D", help="Only this disk.")
@common.json_option
def diff(
    target: Target, *, before: str | None, after: str | None, at: str | None, disk: str | None, as_json: bool
) -> None:
    """Show which ranges of the disks changed from point BEFORE to point AFTER (default: `latest`).

    The points may belong to different chains. Only digests are compared; no data is read.
    """
    first, second = _chosen(before, after, at)
    directory = target.vm_directory()
    stop = Cancellation()
    with stop.on_signals():
        report = core.diff(directory, directory.point(first), directory.point(second), disk=disk, stop=stop)
        if as_json:
            output.print_json(documents.diff(report))
        else:
            _show(report)


def _chosen(before: str | None, after: str | None, at: str | None) -> tuple[str, str]:
    """Return the two points; with --at, the one that was typed is AFTER. Raises UsageError."""
    if at and after:
        raise UsageError("BEFORE and --at are mutually exclusive")
    first, second = (at, before) if at else (before, after)
    if first is None:
        raise UsageError("BEFORE is missing: name a point, or use --at")
    return first, second or point_names.LATEST


def _show(report: DiffReport) -> None:
    output.print_line(f"{report.vm}: what changed from {report.before} to {report.after}")
    for one in report.disks:
        _show_disk(one)
    for names, point in ((report.only_before, report.before), (report.only_after, report.after)):
        if names:
            output.print_line("")
            output.print_line(f"only in {point}: {', '.join(names)}")


def _show_disk(one: DiskDiff) -> None:
    share = 100 * one.changed_bytes / one.size if one.size else 0.0
    ranges = sum(1 for _ in one.ranges())
    resized = (
        f", was {units.size(one.size_before)} and is {units.size(one.size_after)}"
        if one.size_before != one.size_after
        else ""
    )
    output.print_line("")
    output.print_line(
        f"{one.name}: {units.size(one.changed_bytes)} of {units.size(one.size)} changed "
        f"({share:.1f} %) in {ranges} range{'' if ranges == 1 else 's'}{resized}"
    )
    shades = output.printable(block_map.BLOCKS, block_map.ASCII)
    drawn = block_map.draw(one.changed, output.columns(least=16, margin=_LABEL), _MOST_ROWS)
    for row in drawn.rows:
        label = units.size(row.first * CLUSTER_BYTES).rjust(_LABEL - 2)
        cells = [(shades[shade], _STYLES[shade]) for shade in row.shades]
        _print_styled([(f"{label}  ", ""), *cells])
    each = units.size(drawn.clusters_each * CLUSTER_BYTES)
    output.print_line(
        f"{'':>{_LABEL}}a character is {each}: {shades[0]} as before, {shades[1:]} the more of it changed"
    )


def _print_styled(parts: Sequence[tuple[str, str]]) -> None:
    """Write a line of texts, each with its style: to a terminal with colours, elsewhere without."""
    console = Console(highlight=False)
    with console.capture() as styled:
        console.print(Text.assemble(*((output.clean(text), style) for text, style in parts)), soft_wrap=True)
    output.print_styled(styled.get())
