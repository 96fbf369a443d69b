# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl files`."""

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import click

from backupctl.cancel import Cancellation
from backupctl.cli import common, output, param_types, point_argument, reporters, units, vm_argument
from backupctl.cli.target import Target
from backupctl.errors import UNTOUCHED, UsageError
from backupctl.events.restore import FilesSkipped, FileSystemIncomplete
from backupctl.filesystems import tree
from backupctl.filesystems.tree import Node
from backupctl.operations.files import extract as copying
from backupctl.operations.files import run as core
from backupctl.operations.files.extract import ExtractReport
from backupctl.operations.files.run import Found, Place, Selection
from backupctl.outcome import documents
from backupctl.progress import Reporter, counted

_TYPES = {
    "file": stat.S_IFREG,
    "directory": stat.S_IFDIR,
    "link": stat.S_IFLNK,
    "device": stat.S_IFBLK,
    "pipe": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
}


@dataclass(frozen=True)
class Arguments:
    """What is asked for."""

    paths: tuple[str, ...]
    to: Path | None
    recursive: bool
    as_json: bool


@common.command(
    "files",
    0,
    1,
    2,
    4,
    75,
    examples=(
        ("Which file systems the newest point holds", "backupctl files web"),
        ("List a directory", "backupctl files web latest /etc"),
        (
            "Copy a file and a directory out",
            "backupctl files web latest /etc/fstab /home/anna --to /srv/restored/",
        ),
        (
            "From one of several file systems that have it",
            "backupctl files web latest /a.txt --disk vdb --partition 2 --to /srv/a/",
        ),
    ),
)
@vm_argument.Named(needs_vm=False)
@point_argument.point_then_paths
@click.option("--to", type=param_types.PATH, metavar="DIR", help="Copy each PATH into this directory.")
@click.option("--disk", metavar="D", help="Only on this disk.")
@click.option(
    "--partition",
    type=click.IntRange(0, 1024),
    metavar="N",
    help="Only on the partition of this number; 0 for a disk without partitions.",
)
@click.option("--volume", metavar="VG/LV", help="Only on this logical volume of LVM.")
@click.option("--recursive", is_flag=True, help="List all that is below each PATH.")
@common.json_option
@common.gathered(Arguments)
@common.gathered(Selection)
def files(target: Target, asked: Arguments, selection: Selection, *, point: str) -> None:
    """List files of POINT (default: `latest`), or copy them out with --to.

    Without a PATH it shows the disks, their partitions and file systems. A PATH is looked for on each of
    them. ext2, ext3, ext4, XFS and FAT are read, on partitions (GPT, MBR), linear volumes of LVM, or whole
    disks. Nothing is mounted, and all that is read is compared with its digests.

    With --to directories are copied with all that is in them. Copies belong to you and have private modes;
    symbolic links and devices are skipped. Nothing is overwritten.
    """
    if asked.to is not None and not asked.paths:
        raise UsageError("--to needs a PATH; / is all of a file system", state=UNTOUCHED)
    directory = target.vm_directory()
    stop = Cancellation()
    with (
        stop.on_signals(),
        reporters.reporter() as reporter,
        core.open_places(directory, point, selection, stop) as places,
    ):
        if not asked.paths:
            _show_places(places, as_json=asked.as_json)
            return
        found = tuple(core.locate(places, os.fsencode(path)) for path in asked.paths)
        _warn(found, reporter)
        if asked.to is None:
            _list(found, recursive=asked.recursive, as_json=asked.as_json)
            return
        report = copying.extract(found, asked.to, directory.path.parent)
    _show_report(report, reporter, as_json=asked.as_json)


def _warn(found: tuple[Found, ...], reporter: Reporter) -> None:
    for place in dict.fromkeys(one.place for one in found):
        for warning in place.warnings:
            reporter.event(FileSystemIncomplete(place.name, warning))


def _show_places(places: tuple[Place, ...], *, as_json: bool) -> None:
    if as_json:
        output.print_json(documents.places(places))
        return
    rows = [(one.name, units.size(one.size), one.kind or "-", _state(one)) for one in places]
    output.print_table(("PLACE", "SIZE>", "HOLDS", "STATE"), rows)
    for kinds, text in core.advice(places):
        output.print_line(f"{kinds}: {text}")


def _state(one: Place) -> str:
    return one.problem or ("readable" if one.filesystem else "holds volumes")


def _list(found: tuple[Found, ...], *, recursive: bool, as_json: bool) -> None:
    if as_json:
        listed = [(one, core.listing(one, recursive=recursive)) for one in found]
        output.print_json(documents.guest_files(listed))
        return
    for one in found:
        if len(found) > 1:
            output.print_line(f"{tree.shown(one.path)}:")
        _print_entries(one, core.listing(one, recursive=recursive))


def _print_entries(found: Found, entries: Iterable[tuple[bytes, Node]]) -> None:
    for name, node in entries:
        mode = stat.filemode(_TYPES.get(node.kind, 0) | node.mode)
        when = _time(node.modified)
        line = f"{mode} {node.owner:>5} {node.group:>5} {node.size:>12} {when} {tree.shown(name)}"
        if node.kind == "link":
            line += f" -> {tree.shown(found.filesystem.target(node))}"
        output.print_line(line)


def _time(seconds: int) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"
    except (OverflowError, ValueError, OSError):
        return "-".ljust(16)


def _show_report(report: ExtractReport, reporter: Reporter, *, as_json: bool) -> None:
    if report.skipped:
        first = report.skipped[0]
        reporter.event(FilesSkipped(report.skipped_count, first.path, first.why))
    output.done(f"the files are in {report.target}")
    if as_json:
        output.print_json(documents.extracted(report))
        return
    output.print_line(
        f"{counted(report.files, 'file')} and {_directories(report.directories)} copied to {report.target} "
        f"({units.size(report.data_bytes)})"
    )


def _directories(number: int) -> str:
    return f"{number:,} {'directory' if number == 1 else 'directories'}"
