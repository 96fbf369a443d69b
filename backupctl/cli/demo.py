# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl demo`: backups, a failure and restores on the simulator, shown step by step in seconds."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from backupctl.cancel import Cancellation
from backupctl.cli import common, units
from backupctl.cli.output import clean
from backupctl.drills import demo as drill
from backupctl.drills.demo import Stage
from backupctl.errors import BackupctlError, DamageFound
from backupctl.events import Event
from backupctl.operations.backup.outcome import RunReport
from backupctl.options import Kind

FAULT = "nbd:sent@512k=drop"
_WRITING_SECONDS = 0.5
_STEPS = {"freeze": "freeze…thaw"}  # the transaction between them is too short to show


@common.command("demo", 0, 1, 2, 4, examples=(("All of it; takes seconds", "backupctl demo"),))
@click.option("--seed", default=1, show_default=True, help="Seed for the simulated guest writes.")
def demo(seed: int) -> None:
    """Show a full, incrementals, a run that fails, and restores, on a simulated VM; takes seconds.

    Nothing of yours is touched: VM and repository are in a temporary directory that is removed at the end.
    The demo needs qemu-img and qemu-storage-daemon, but no QEMU system emulator.
    """
    drill.check_tools()
    begun = time.monotonic()
    screen, stop = Screen(), Cancellation()
    with (
        stop.on_signals(),
        tempfile.TemporaryDirectory(prefix="backupctl-demo-") as name,
        Stage.machine_for(Path(name), seed) as machine,
    ):
        verdict = Story(Stage(Path(name), machine, screen, stop), screen).run()
    screen.end(f"{verdict} Nothing is left; {time.monotonic() - begun:.1f} s.")


class Screen:
    """Prints the demo; it is also the Reporter of the runs, and prints their steps on one line."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._under_way = False

    def title(self, text: str, more: str) -> None:
        """Print the title."""
        self._console.print(Text.assemble((text, "bold"), more))

    def act(self, text: str, *why: str) -> None:
        """Print the heading of an act, and its explanation."""
        self._console.print()
        self._console.print(Text.assemble(("● ", "bold cyan"), (text, "bold")))
        for line in why:
            self._console.print(Text(f"  {line}", style="dim"))

    @contextmanager
    def command(self, text: str) -> Iterator[None]:
        """Print a command as it would be typed, and then the steps of the run in the block."""
        self._console.print(Text.assemble("  ", ("$ ", "dim"), (text, "cyan")))
        try:
            yield
        finally:
            self._console.print()
            self._under_way = False

    def good(self, text: str) -> None:
        """Print a check that succeeded."""
        self._console.print(Text.assemble("  ", ("✓ ", "green"), clean(text)))

    def bad(self, text: str) -> None:
        """Print an error."""
        self._console.print(Text.assemble("  ", ("✗ ", "red"), clean(text)))

    def more(self, label: str, text: str) -> None:
        """Print a detail of the last line."""
        grid = Table.grid(padding=(0, 1))
        grid.add_row(Text(f"{label:<5}", "dim"), Text(clean(text)))
        self._console.print(Padding(grid, (0, 0, 0, 4)))

    def table(self, table: Table) -> None:
        """Show a table."""
        self._console.print(Padding(table, (0, 0, 0, 2)))

    def end(self, text: str) -> None:
        """Print the last line."""
        self._console.print()
        self._console.print(Text(text, style="bold"))

    def event(self, event: Event) -> None:
        """Print a step of a run. The demo prints the rest from the report of the run."""
        if event.severity == "step":
            self._step(event.text)

    def _step(self, text: str) -> None:
        arrow = " → " if self._under_way else "  "
        style = "yellow" if text == "roll back" else ""
        self._under_way = True
        line = Text.assemble((arrow, "dim"), (_STEPS.get(text, clean(text)), style))
        self._console.print(line, end="")

    def progress(self, disk: str, done_bytes: int, total_bytes: int) -> None:
        """Ignore it: a copy is done before it could be read."""


class Story:
    """The acts, in order. Every ✓ is the result of a check; a check that fails raises."""

    def __init__(self, stage: Stage, screen: Screen) -> None:
        self._stage = stage
        self._screen = screen

    def run(self) -> str:
        """Run all acts, and return the verdict. Raises what a run raises, Failed, DamageFound."""
        for act in (self._begin, self._full, self._incremental, self._failure, self._next, self._list):
            self._stage.stop.check()
            act()
        return self._restore()

    def _begin(self) -> None:
        disks = " and ".join(f"{name} ({form})" for name, form in drill.FORMATS.items())
        self._screen.title("backupctl", ": incremental backups of a running VM, here of a simulated one")
        self._screen.act(
            f"A VM starts: {drill.VM}, with the disks {disks}",
            "Its guest keeps writing to both. Monitor, guest agent and NBD server speak",
            "QEMU's protocols; backupctl itself is real, and cannot tell the difference.",
        )
        self._stage.guest_writes(300)
        self._screen.good(f"the guest has made {self._stage.changes()} changes, and keeps writing")

    def _full(self) -> None:
        self._screen.act(
            "A full backup, while the guest writes",
            "The agent freezes the file systems, one transaction starts the backup of all disks",
            "at the same point in time, and the agent thaws them. Then the data are copied.",
        )
        self._backup("full")

    def _incremental(self) -> None:
        self._screen.act(
            "An incremental",
            "A dirty bitmap records what has changed since the last point. Only that is read.",
        )
        self._write_on()
        self._backup("incremental")

    def _next(self) -> None:
        self._screen.act(
            "The next incremental",
            "It contains all changes since the last point, including those of the failed run.",
        )
        self._write_on()
        self._backup("incremental")

    def _write_on(self) -> None:
        before = self._stage.changes()
        time.sleep(_WRITING_SECONDS)
        self._screen.good(f"the guest has made {self._stage.changes() - before} more changes")

    def _backup(self, kind: Kind) -> None:
        with self._screen.command(f"backupctl {kind} {drill.VM} --freeze require"):
            report = self._stage.backup(kind)
        self._screen.good(_outcome(report))

    def _failure(self) -> None:
        self._screen.act(
            "A run that fails: the connection breaks in mid-copy",
            f"The fault {FAULT} makes the simulator hang up after 512 KiB.",
        )
        self._stage.guest_writes(40)
        before = self._stage.dirty_bytes()
        with self._screen.command(f"backupctl incremental {drill.VM} --freeze require"):
            err = self._stage.failing("incremental", FAULT)
        self._show_error(err)
        self._stage.check_clean()
        self._screen.good("no job, export, NBD server or node is left; the guest is not frozen")
        after = self._stage.dirty_bytes()
        for disk, was in before.items():
            if after[disk] < was:
                raise DamageFound(f"{disk}: only {after[disk]} of {was} dirty bytes are still marked")
            self._screen.good(
                f"{disk}: one recording bitmap; dirty: {units.size(was)} before, "
                f"{units.size(after[disk])} now"
            )

    def _show_error(self, err: BackupctlError) -> None:
        self._screen.bad(f"exit code {err.exit_code}: {err.message}")
        for label, text in (("step", err.step), ("state", err.state), ("next", err.next_command)):
            if text:
                self._screen.more(label, text)

    def _list(self) -> None:
        self._screen.act("The recovery points")
        table = _table("POINT", "KIND", "PARENT", "FROZEN>", "STORED>")
        for point in self._stage.points():
            manifest = point.manifest
            stored = units.size(sum(disk.stored_bytes for disk in manifest.disks))
            frozen = f"{manifest.freeze.milliseconds} ms"
            table.add_row(*map(clean, (point.id, manifest.kind, manifest.parent or "-", frozen, stored)))
        self._screen.table(table)

    def _restore(self) -> str:
        self._screen.act(
            "Every point restored, and each byte compared with the original",
            "The original is the simulator's own copy of the disks, made in the transaction.",
        )
        self._stage.guest_rests()
        self._stage.check_clean()
        changes = self._stage.changes()
        found = [one for point in self._stage.points() for one in self._stage.compare(point.id)]
        table = _table("POINT", "DISK", "BYTES COMPARED>", "VERDICT")
        for one in found:
            table.add_row(one.point, one.disk, f"{one.size:,}", _verdict(one.differs_at))
        self._screen.table(table)
        wrong = [f"{one.disk} of {one.point}" for one in found if one.differs_at is not None]
        if wrong:
            raise DamageFound(f"the restored disks differ from the originals: {', '.join(wrong)}")
        self._screen.good(f"the guest made {changes} changes in all, and none of them failed")
        return f"{len(found)} disks restored, all identical to the originals."


def _verdict(differs_at: int | None) -> Text:
    return (
        Text("equal", "green") if differs_at is None else Text(f"differs at byte {differs_at:,}", "bold red")
    )


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
    for column in columns:
        table.add_column(column.removesuffix(">"), justify="right" if column.endswith(">") else "left")
    return table


def _outcome(report: RunReport) -> str:
    copied = units.size(sum(disk.copied_bytes for disk in report.disks))
    return (
        f"{report.point}: {copied} in {units.duration(report.seconds)}, "
        f"frozen {report.frozen_ms} ms, {report.consistency}-consistent"
    )
