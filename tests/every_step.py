# SPDX-License-Identifier: GPL-2.0-or-later
"""Interruptions at the steps of a run, the same for each way to a VM, and what must hold after each.

A case: some writes, an incremental that is interrupted before or after a step, some more writes, and after
every other step a `recover`. Then:

- a run that ended with 0 has made a point, one that ended with 1 has made none;
- nothing that it started is left: no job, no guard, no program on another host, no daemon on an image;
- the files of committed points are unchanged;
- the next incremental succeeds, and its disks equal the model of all writes, byte for byte;
- no bitmap was lost, unless a kill left images open for writing (`Subject.reopens`).
"""

import os
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fixtures.writer import Writer
from tests import interrupted_cli
from tests.conftest import Cli

WHEN = ("before", "after")
SECONDS = 60
CODES = {"": (-signal.SIGKILL,)}
ENDED = (0, 1, 3)
"""How a run may end that was not killed itself."""


def nothing() -> None:
    """Wait for nothing."""


@dataclass
class Subject:
    """A VM with a full, as one driver reaches it.

    writer: writes to its disks, however that is done. environment: of a call that is interrupted, such as the
    process that is to end. settle: waits until an interruption has had all its effects. clean: fails unless
    only what was committed is left. finish: checks at the end what takes too long after each case. reopens:
    the step that opens images for writing, and then read-only again: a kill between two of them leaves
    bitmaps in use, which are lost. scans: the steps at which one was.
    """

    cli: Cli
    writer: Writer
    directory: Path
    clean: Callable[[], None]
    environment: Callable[[], dict[str, str]] = dict
    settle: Callable[[], None] = nothing
    finish: Callable[[], None] = nothing
    reopens: str = ""
    scans: list[str] = field(default_factory=list)

    def steps(self) -> list[str]:
        """Run once to the end, and return the names of the steps."""
        self.writer.write(3)
        done = self._run()
        assert done.returncode == 0, done.stderr
        self.settle()
        return self._names()

    def explore(self, cases: Iterable[tuple[int, str]], action: str) -> int:
        """Interrupt incrementals before or after steps. Returns how many were interrupted."""
        played = sum(self._play(number, when, action) for number, when in cases)
        self.finish()
        return played

    def _play(self, number: int, when: str, action: str) -> bool:
        case = f"KILL_AT={number} KILL_WHEN={when} ACTION={action}"
        words = ""
        try:
            before = self._committed()
            self.writer.write(2)
            done = self._run(KILL_AT=str(number), KILL_WHEN=when, ACTION=action, **self.environment())
            words, step = done.stderr, self._step(number)
            case += f" ({step})"
            written = self._names()[: number + WHEN.index(when)].count(self.reopens) % 2 == 1
            self._check_end(done.returncode, words, action if step else None, before)
            if number % 2:
                self.cli.run("recover", "web")
            self.writer.write(2)
            self._check_next(before, step, may_scan=written)
        except BaseException as err:
            err.add_note(f"{case}: {words}")
            raise
        return bool(step)

    def _check_end(self, code: int, words: str, action: str | None, before: dict[str, Any]) -> None:
        """Check how a run ended. action: that interrupted it; None if it had fewer steps this time."""
        assert code in ((0,) if action is None else CODES.get(action, ENDED)), f"exit {code}"
        assert not interrupted_cli.BUG.search(words)
        self.settle()
        if code in (0, 1):
            assert (self._committed() == before) == bool(code), f"exit {code} is a lie"

    def _check_next(self, before: dict[str, Any], step: str, *, may_scan: bool) -> None:
        self.writer.remember()
        report = self.cli.json("incremental", "web")
        scanned = [disk["name"] for disk in report["disks"] if disk["scanned"]]
        assert not scanned or may_scan, f"the bitmap of {scanned} was lost"
        self.scans += [step] if scanned else []
        for disk, content in self.writer.moment.items():
            assert self._content(report["point"], disk) == content, f"{disk} is not what the guest wrote"
        assert before.items() <= self._committed().items(), "a committed point was changed"
        self.clean()

    def _run(self, **environment: str) -> "subprocess.CompletedProcess[str]":
        self._log.unlink(missing_ok=True)
        environment["STEPS"] = str(self._log)
        return self.cli.call("incremental", "web", entry=interrupted_cli.ENTRY, **environment)

    def _step(self, number: int) -> str:
        """Return the name of a step of the last run; "" if it had fewer."""
        steps = self._names()
        return steps[number] if number < len(steps) else ""

    def _names(self) -> list[str]:
        return [line.strip() for line in self._log.read_text().splitlines()]

    @property
    def _log(self) -> Path:
        return self.directory / "steps"

    def _committed(self) -> dict[str, Any]:
        """Return inode, size and time of each file of each committed point."""
        found = {}
        for path in (self.cli.repository / "web").glob("*Z/**/*"):
            stat = path.stat()
            if path.is_file():
                found[str(path)] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        return found

    def _content(self, point: str, disk: str) -> bytes:
        """Return a disk's bytes at a point, as QEMU's own tools read them."""
        raw = self.directory / "compared.raw"
        image = self.cli.repository / "web" / point / f"{disk}.qcow2"
        tool = self.cli.environment.get("QEMU_IMG", "qemu-img")
        subprocess.run([tool, "convert", "-O", "raw", image, raw], check=True, timeout=SECONDS)
        return raw.read_bytes()


def sample(steps: Sequence[str], wanted: Mapping[str, Sequence[str]]) -> list[tuple[int, str]]:
    """Return cases at the first step of each name. wanted: by name, whether before it, after it, or both."""
    return [(steps.index(name), when) for name, whens in wanted.items() for when in whens]


def image_writer(images: dict[str, Path], writer: Writer, tool: str = "qemu-io") -> Writer:
    """Return a writer to images that no QEMU has open, with the model of the one that wrote before.

    As any program that opens them with QEMU's block layer, it records what it writes in their bitmaps.
    """

    def io(disk: str, command: str) -> None:
        call = [tool, "-f", "qcow2", "-c", command, str(images[disk])]
        subprocess.run(call, check=True, timeout=SECONDS, stdout=subprocess.DEVNULL)

    made = Writer({disk: len(content) for disk, content in writer.model.items()}, io, 2)
    made.model = writer.model
    return made


def storage_daemons(images: Iterable[Path]) -> list[int]:
    """Return the storage daemons that have one of these images open."""
    ids = {(stat.st_dev, stat.st_ino) for stat in map(os.stat, images)}
    return [
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if b"qemu-storage-daemon" in _command(process) and ids & _open_files(process)
    ]


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def _open_files(process: Path) -> set[tuple[int, int]]:
    try:
        return {(stat.st_dev, stat.st_ino) for stat in (one.stat() for one in (process / "fd").iterdir())}
    except OSError:
        return set()
