# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl drill`: break a throw-away VM's backups in named ways, and show the results."""

import time

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from backupctl.cancel import Cancellation
from backupctl.cli import common, output, units
from backupctl.cli.output import clean
from backupctl.drills import runner
from backupctl.drills.catalog import DRILLS, Drill
from backupctl.drills.demo import check_tools
from backupctl.drills.runner import DrillVm, Outcome
from backupctl.errors import DamageFound, UsageError
from backupctl.names import did_you_mean

_MAX_MESSAGE = 100
_WIDE = 130  # columns; a narrower table shows the fault and the message below the drill's name
_STYLES = {"passed": "green", "FAILED": "bold red", "simulator only": "dim"}


@common.command(
    "drill",
    0,
    1,
    2,
    4,
    examples=(
        ("All drills, on the simulator", "backupctl drill"),
        ("One of them, on a throw-away real QEMU", "backupctl drill sigterm --on qemu"),
        ("The names of all drills", "backupctl drill --list"),
    ),
)
@click.argument("names", nargs=-1)
@click.option("--list", "listing", is_flag=True, help="List the drills instead of running them.")
@click.option(
    "--on",
    "vm",
    type=click.Choice(["simulator", "qemu"]),
    default="simulator",
    show_default=True,
    help="The bundled simulator, or a throw-away real QEMU without a guest.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def drill(names: tuple[str, ...], vm: DrillVm, *, listing: bool, as_json: bool) -> None:
    """Drill failures: break backups of a throw-away VM, and check that nothing is lost.

    NAMES are drills (default: all). Your own VMs, repositories and configuration are not touched.
    """
    chosen = _chosen(names)
    if listing:
        _list(chosen, as_json=as_json)
        return
    check_tools()
    begun, stop = time.monotonic(), Cancellation()
    outcomes = []
    with stop.on_signals():
        for outcome in runner.run(chosen, vm, stop):
            stop.check()  # on Ctrl-C the drill's children are interrupted, too: its outcome means nothing
            outcomes.append(outcome)
            _tell(outcome, len(outcomes), len(chosen))
    order = {one.name: number for number, one in enumerate(chosen)}
    outcomes.sort(key=lambda one: order[one.name])
    seconds = time.monotonic() - begun
    if as_json:
        output.print_json(
            {"on": vm, "seconds": round(seconds, 1), "drills": [one.document() for one in outcomes]}
        )
    else:
        _table(outcomes, vm, seconds)
    failed = [one.name for one in outcomes if one.verdict == "FAILED"]
    if failed:
        raise DamageFound(
            f"{len(failed)} of {len(outcomes)} drills failed: {', '.join(failed)}",
            state="only throw-away VMs were changed",
            next_command=f"backupctl drill {failed[0]} --on {vm}",
        )


def _chosen(names: tuple[str, ...]) -> list[Drill]:
    known = {one.name for one in DRILLS}
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise UsageError(f"unknown drill {name!r:.60}", hint=hint, next_command="backupctl drill --list")
    return [one for one in DRILLS if not names or one.name in names]


def _list(chosen: list[Drill], *, as_json: bool) -> None:
    if as_json:
        output.print_json(
            [{"name": one.name, "breaks": one.breaks, "simulator_only": one.simulator_only} for one in chosen]
        )
        return
    rows = [
        (one.name, one.breaks, "simulator" if one.simulator_only else "simulator, qemu") for one in chosen
    ]
    output.print_table(("DRILL", "FAULT", "ON"), rows)


def _tell(outcome: Outcome, done: int, total: int) -> None:
    """Show the progress on stderr: a drill takes seconds, all of them a minute."""
    problem = f": {outcome.problem}" if outcome.problem else ""
    click.echo(clean(f"[{done}/{total}] {outcome.name} {outcome.verdict}{problem}"), err=True)


def _table(outcomes: list[Outcome], vm: DrillVm, seconds: float) -> None:
    console = Console(highlight=False)
    wide = console.width >= _WIDE
    table = Table(box=None, pad_edge=False, header_style="bold", leading=0 if wide else 1)
    table.add_column("DRILL", no_wrap=wide)
    if wide:
        table.add_column("FAULT")
        table.add_column("MESSAGE")
    table.add_column("STEP", no_wrap=True)
    table.add_column("EXIT", justify="right", no_wrap=True)
    table.add_column("COMPARED", justify="right", no_wrap=True)
    table.add_column("VERDICT", no_wrap=True)
    for one in outcomes:
        words = (
            Text(one.name, "bold"),
            Text(one.breaks),
            Text(_short(clean(one.problem or one.message)), "dim"),
        )
        table.add_row(
            *(words if wide else [Text("\n").join(word for word in words if word)]),
            one.step,
            "" if one.exit_code is None else _exit(one.exit_code),
            units.size(one.compared_bytes) if one.compared_bytes else "",
            Text(one.verdict, _STYLES[one.verdict]),
        )
    console.print(table)
    passed = sum(one.verdict == "passed" for one in outcomes)
    elsewhere = sum(one.verdict == "simulator only" for one in outcomes)
    failed = len(outcomes) - passed - elsewhere
    more = f", {elsewhere} run only on the simulator" if elsewhere else ""
    console.print(f"\n{passed} passed, {failed} failed{more}; on {vm}, {seconds:.0f} s. Nothing is left.")


def _short(text: str) -> str:
    """Shorten a message that would make its row too high; --json has all of it."""
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}…"


def _exit(code: int) -> str:
    return "killed" if code == -9 else str(code)
