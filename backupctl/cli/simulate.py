# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl simulate`: a stand-in for a QEMU virtual machine."""

import asyncio
import re
import resource
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import click

from backupctl.cli import common
from backupctl.errors import UsageError

_PATH = click.Path(path_type=Path)


@dataclass(frozen=True)
class SimulatorArguments:
    """What is asked of the simulator. directory: None for a temporary one. version: major, minor, micro."""

    directory: Path | None
    disks: tuple[str, ...]
    cdroms: tuple[str, ...]
    monitors: tuple[Path, ...]
    agent: Path | None
    control: Path | None
    version: tuple[int, int, int]
    seed: int
    writes_per_second: float
    faults: tuple[str, ...]
    paused: bool
    keep_moments: bool


class _Version(click.ParamType[tuple[int, int, int]]):
    """A version of QEMU: 7.2 or 7.2.22."""

    name = "version"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int, int]:
        match = re.fullmatch(r"(\d+)\.(\d+)(?:\.(\d+))?", value)
        if match is None:
            self.fail(f"{value!r} is not a version; it has the form MAJOR.MINOR.MICRO", param, ctx)
        return int(match[1]), int(match[2]), int(match[3] or 0)


@common.command(
    "simulate",
    0,
    1,
    2,
    examples=(
        (
            "A VM with one disk that changes all the time",
            "backupctl simulate --disk vda=1G --qmp /tmp/web.qmp --writes 100",
        ),
        ("A QEMU of another version", "backupctl simulate --disk vda=1G --qmp /tmp/web.qmp --version 10.0"),
    ),
)
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
@click.option("--control", type=_PATH, help="The socket for controlling the simulator from tests.")
@click.option("--state", "directory", type=_PATH, help="Directory for the disks. Default: a temporary one.")
@click.option(
    "--version",
    type=_Version(),
    metavar="TEXT",
    default="7.2.22",
    show_default=True,
    help="The QEMU version to report.",
)
@click.option("--seed", default=0, show_default=True, help="Seed for the simulated guest writes.")
@click.option(
    "--writes",
    "writes_per_second",
    default=0.0,
    type=click.FloatRange(min=0),
    metavar="PER_SECOND",
    help="Guest writes per second.",
)
@click.option(
    "--fault", "faults", multiple=True, metavar="SPEC", help="A fault to inject (docs/simulator.md)."
)
@click.option("--paused", is_flag=True, help="Start with stopped processors, like QEMU with -S.")
@click.option(
    "--keep-moments", is_flag=True, help="Copy the disks at each point in time of a backup, for comparison."
)
@common.gathered(SimulatorArguments)
def simulate(asked: SimulatorArguments) -> None:
    """Simulate a QEMU virtual machine, until SIGTERM, SIGINT or the monitor's `quit`.

    A line on stdout says when the sockets are ready.
    """
    # Only this command should take the time to load numpy and the simulator.
    from backupctl.simulator.process import SimulatorOptions, serve  # noqa: PLC0415

    # A simulated abort must not leave a core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with ExitStack() as stack:
        directory = asked.directory or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="backupctl-simulate-"))
        )
        directory.mkdir(parents=True, exist_ok=True)
        options = SimulatorOptions(**{**vars(asked), "directory": directory})
        try:
            asyncio.run(serve(options, lambda: click.echo("ready")))
        except ValueError as err:
            raise UsageError(str(err)) from err
        except OSError as err:
            raise click.ClickException(f"cannot start the simulator: {err}") from err
