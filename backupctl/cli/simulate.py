# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl simulate`: a stand-in for a QEMU virtual machine."""

import asyncio
import re
import resource
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import click

from backupctl.cli import common
from backupctl.errors import UsageError

_PATH = click.Path(path_type=Path)


@common.command("simulate", 0, 1, 2)
@click.option(
    "--disk",
    "disks",
    multiple=True,
    metavar="NAME=SIZE[,format=raw][,node=NODE][,iothread=on][,readonly=on]",
    help="A disk; may be repeated.",
)
@click.option("--cdrom", "cdroms", multiple=True, metavar="NAME", help="An empty CD drive.")
@click.option("--qmp", "monitors", multiple=True, required=True, type=_PATH, help="The monitor's socket.")
@click.option("--agent", type=_PATH, help="The guest agent's socket.")
@click.option("--control", type=_PATH, help="The socket by which tests steer the simulator.")
@click.option("--state", type=_PATH, help="Where the disks lie; a temporary folder if not given.")
@click.option(
    "--version", "version_text", default="7.2.22", show_default=True, help="QEMU's version to claim."
)
@click.option("--seed", default=0, show_default=True, help="Of the guest's writes.")
@click.option(
    "--writes", default=0.0, type=click.FloatRange(min=0), metavar="PER_SECOND", help="Let the guest write."
)
@click.option(
    "--fault", "faults", multiple=True, metavar="SPEC", help="What is to go wrong (docs/simulator.md)."
)
@click.option("--paused", is_flag=True, help="Start with stopped processors, as QEMU with -S.")
@click.option(
    "--keep-moments", is_flag=True, help="Copy the disks at each moment of a backup, for comparison."
)
def simulate(
    disks: tuple[str, ...],
    cdroms: tuple[str, ...],
    monitors: tuple[Path, ...],
    agent: Path | None,
    control: Path | None,
    state: Path | None,
    version_text: str,
    seed: int,
    writes: float,
    faults: tuple[str, ...],
    paused: bool,
    keep_moments: bool,
) -> None:
    """Pretend to be a QEMU virtual machine, until SIGTERM, SIGINT or the monitor's `quit`.

    A line on stdout says when the sockets listen.
    """
    # Only this command pays for numpy and all that stands behind the simulator.
    from backupctl.simulator.process import SimulatorOptions, serve  # noqa: PLC0415

    # A simulated abort must not leave a core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with ExitStack() as stack:
        folder = state or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="backupctl-simulate-")))
        folder.mkdir(parents=True, exist_ok=True)
        wishes = SimulatorOptions(
            folder, disks, cdroms, monitors, agent, control, _version(version_text), seed, writes
        )
        wishes = replace(wishes, faults=faults, paused=paused, keep_moments=keep_moments)
        try:
            asyncio.run(serve(wishes, lambda: click.echo("ready")))
        except ValueError as err:
            raise UsageError(str(err)) from err
        except OSError as err:
            raise click.ClickException(f"the simulator can't start: {err}") from err


def _version(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    if match is None:
        raise UsageError(f"{text!r} is no version: MAJOR.MINOR.MICRO is meant")
    return int(match[1]), int(match[2]), int(match[3] or 0)
