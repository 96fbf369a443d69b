# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl simulate`: a simulated QEMU virtual machine."""

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


@click.command("simulate", epilog=common.exit_help(0, 1, 2))
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
@click.option("--control", type=_PATH, help="A socket for tests to control the simulator.")
@click.option("--state", type=_PATH, help="The folder of the disks; default: a temporary one.")
@click.option(
    "--version", "version_text", default="7.2.22", show_default=True, help="The QEMU version to report."
)
@click.option("--seed", default=0, show_default=True, help="Seed for the simulated guest writes.")
@click.option(
    "--writes", default=0.0, type=click.FloatRange(min=0), metavar="PER_SECOND", help="Let the guest write."
)
@click.option(
    "--fault",
    "faults",
    multiple=True,
    metavar="SPEC",
    help="Inject a fault (docs/simulator.md); may be repeated.",
)
@click.option("--paused", is_flag=True, help="Start with stopped processors, as QEMU with -S.")
@click.option(
    "--keep-moments", is_flag=True, help="Copy the disks at the point in time of each backup, for comparison."
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
    """Simulate a QEMU virtual machine, until SIGTERM, SIGINT or the monitor's `quit`.

    It prints "ready" when all sockets listen.
    """
    # Imported here so that only this command takes the time to import numpy and the simulator.
    from backupctl.simulator.process import SimulatorOptions, serve  # noqa: PLC0415

    # A simulated abort must not leave a core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with ExitStack() as stack:
        folder = state or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="backupctl-simulate-")))
        folder.mkdir(parents=True, exist_ok=True)
        options = SimulatorOptions(
            folder, disks, cdroms, monitors, agent, control, _version(version_text), seed, writes
        )
        options = replace(options, faults=faults, paused=paused, keep_moments=keep_moments)
        try:
            asyncio.run(serve(options, lambda: click.echo("ready")))
        except ValueError as err:
            raise UsageError(str(err)) from err
        except OSError as err:
            raise click.ClickException(f"cannot start the simulator: {err}") from err


def _version(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    if match is None:
        raise UsageError(f"Invalid version {text!r}. Example: 7.2.22.")
    return int(match[1]), int(match[2]), int(match[3] or 0)
