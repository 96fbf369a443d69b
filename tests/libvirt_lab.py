# SPDX-License-Identifier: GPL-2.0-or-later
"""A domain of a libvirtd of the tests' own, a writer to its disks, and the command line for it."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fixtures.libvirtd import Domain, Libvirtd
from fixtures.writer import Writer
from tests.conftest import MIB, ROOT, Cli


@dataclass
class Lab:
    """A domain, its writer, and the command line for it."""

    domain: Domain
    writer: Writer
    cli: Cli
    directory: Path

    def backup(self, kind: str, *options: str, code: int = 0) -> Any:
        return self.cli.json(kind, "web", *options, code=code)

    def assert_point(self, point: str, moment: dict[str, bytes]) -> None:
        for disk, content in moment.items():
            assert self.cli.raw(point, disk, self.directory) == content, f"{disk} of {point}"

    def assert_clean(self, checkpoints: int = 1) -> None:
        """Nothing of ours is left in the domain but checkpoints, and nothing on the disk but points."""
        assert not self.domain.has_job()
        assert self.domain.is_running()
        ours = [one for one in self.domain.checkpoints() if one.startswith("backupctl-")]
        assert len(ours) == checkpoints, ours
        assert list(self.cli.scratch.iterdir()) == []
        partial = [one for one in os.listdir(self.cli.repository / "web") if one.endswith(".partial")]
        assert partial == []

    def next_is_right(self) -> None:
        """After whatever happened: an incremental is byte-equal, and nothing is left."""
        self.writer.write(5)
        self.writer.remember()
        report = self.backup("incremental")
        self.assert_point(report["point"], self.writer.moment)
        self.assert_clean()
        scanned = {name for name, kind in kinds(report).items() if kind == "scan"}
        assert scanned <= {"vdc"}, "a checkpoint was lost"  # vdc is raw, where there is one


Make = Callable[..., Lab]


def maker(daemon: Libvirtd, directory: Path, held: ExitStack, test: str) -> Make:
    """Return what makes a lab for a test of this name: `make({"vda": size})`."""

    def make(
        sizes: dict[str, int] | None = None, *, formats: dict[str, str] | None = None, driver: str = ""
    ) -> Lab:
        sizes = sizes or {"vda": 8 * MIB, "vdb": 4 * MIB}
        disks = []
        for name, size in sizes.items():
            kind = (formats or {}).get(name, "qcow2")
            path = directory / f"{name}.{kind}"
            subprocess.run(["qemu-img", "create", "-q", "-f", kind, path, str(size)], check=True, timeout=30)
            disks.append({"target": name, "path": path, "format": kind, "driver": driver})
        domain = Domain(daemon, f"d{os.getpid()}-{abs(hash(test)) % 10**8}", disks)
        held.callback(domain.close)
        domain.start()
        scratch = Path(tempfile.mkdtemp(prefix="s-", dir=daemon.directory))  # short: it holds a socket
        cli = Cli(
            repository=directory / "repository",
            environment={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
            scratch=scratch,
            vm=domain.arguments,
        )
        writer = Writer(sizes, domain.io, 1)
        held.callback(writer.stop)
        return Lab(domain, writer, cli, directory)

    return make


def begun(make_lab: Make, **options: Any) -> Lab:
    """Return a lab with a full, and something written since."""
    lab = make_lab(**options)
    lab.writer.write(10)
    lab.backup("full")
    lab.writer.write(5)
    return lab


def kinds(report: Any) -> dict[str, str]:
    return {disk["name"]: "scan" if disk["scanned"] else disk["kind"] for disk in report["disks"]}


def plain(lab: Lab, *words: str) -> str:
    """Call a command that knows no repository; return what it prints."""
    command = [sys.executable, "-m", "backupctl", *words]
    around = lab.cli.environment
    done = subprocess.run(
        command, env=around, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(what: Callable[[], Any], run: "subprocess.Popen[str] | None" = None) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        assert run is None or run.poll() is None, run.communicate()
        time.sleep(0.02)


def guard_of(run: int) -> int:
    """Return the guard of a run: its child that holds a socket pair."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            pid, parent = int(path.parent.name), int(path.read_text().rpartition(")")[2].split()[1])
            if parent == run and b"guard_process" in (path.parent / "cmdline").read_bytes():
                return pid
    raise AssertionError("the run has no guard")
