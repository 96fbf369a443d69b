# SPDX-License-Identifier: GPL-2.0-or-later
"""An installed backupctl, called as a user calls it: with nothing of this tree in reach."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fixtures.machine import line_socket

PATIENCE_SECONDS = 120.0
SYSTEM_PYTHON = "/usr/bin/python3"
SITE = Path(sys.prefix) / f"lib/python3.{sys.version_info.minor}/site-packages"
"""The packages that backupctl needs, as they are pinned."""


def environment(directory: Path, *options: str) -> Path:
    """Make an empty virtual environment; return its directory of programs."""
    subprocess.run(
        [SYSTEM_PYTHON, "-m", "venv", "--without-pip", *options, directory], check=True, timeout=120
    )
    return directory / "bin"


def install(programs: Path, *what: str) -> None:
    """Install into an environment with our own pip, as it has none."""
    command = [sys.executable, "-m", "pip", "--python", programs / "python", "install", "-q", "--no-input"]
    subprocess.run([*command, "--disable-pip-version-check", "--no-compile", *what], check=True, timeout=600)


def with_dependencies(programs: Path) -> None:
    """Lend an environment the pinned packages of ours, as if pip had installed them."""
    (target,) = programs.parent.glob("lib/python3.*/site-packages")
    (target / "dependencies.pth").write_text(f"{SITE}\n")


class Installed:
    """One program. home: a directory of its own, which is also its HOME and its current directory."""

    def __init__(self, program: Sequence[str], home: Path) -> None:
        self.program = list(program)
        self.home = home
        self.environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(home), "LC_ALL": "C.UTF-8"}

    def call(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Call it and wait for it."""
        return subprocess.run(
            [*self.program, *arguments],
            cwd=self.home,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )

    def works(self, *arguments: str) -> str:
        """Call it, which must succeed; return what it printed."""
        done = self.call(*arguments)
        assert done.returncode == 0, (
            f"{arguments}: {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-2000:]}"
        )
        return done.stdout

    @contextmanager
    def simulated(self) -> Iterator[list[str]]:
        """Run `simulate` for a VM that writes all the time; give the options that say where it is."""
        qmp, control = self.home / "web.qmp", self.home / "control"
        command = ["simulate", "--disk", "vda=4M", "--qmp", str(qmp), "--control", str(control)]
        process = subprocess.Popen(
            [
                *self.program,
                *command,
                "--state",
                str(self.home / "state"),
                "--writes",
                "50",
                "--keep-moments",
            ],
            cwd=self.home,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            with process.stdout:
                assert process.stdout.readline(), "the simulator did not start"
                yield ["--qmp", f"unix:{qmp}", "--repository", str(self.home / "repository")]
        finally:
            process.terminate()
            process.wait(PATIENCE_SECONDS)

    def moment(self, disk: str) -> bytes:
        """Return what a disk held at the point in time of the newest backup, by the simulator's own copy."""
        with line_socket(self.home / "control", 30.0) as control:
            control.write(json.dumps({"do": "moment"}) + "\n")
            control.flush()
            return Path(json.loads(control.readline())["return"]["disks"][disk]).read_bytes()


def backs_up_and_restores(installed: Installed) -> None:
    """A full, an incremental and a restore, whose image holds what the disk held at that point in time."""
    with installed.simulated() as options:
        full = json.loads(installed.works("full", "web", "--json", *options))
        time.sleep(0.3)
        incremental = json.loads(installed.works("incremental", "web", "--json", *options))
        assert (full["kind"], incremental["kind"], incremental["parent"]) == (
            "full",
            "incremental",
            full["point"],
        )
        assert 0 < incremental["disks"][0]["copied_bytes"] < full["disks"][0]["size"]
        image = installed.home / "vda.raw"
        repository = options[2:]
        installed.works("restore", "web", "latest", "--disk", "vda", "--to", str(image), *repository)
        installed.works("verify", "web", *repository)
        assert image.read_bytes() == installed.moment("vda")
