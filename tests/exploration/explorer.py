# SPDX-License-Identifier: GPL-2.0-or-later
"""Every place at which a run, and the recovery after it, can be interrupted; and what must be true then.

A case is two interruptions at the most: one of the run, at a step, before or after it, and one of the
`recover` that follows. After it `recover` runs to its end, the guest having written all the while, and then:

- nothing of ours is left but the committed set; the files of committed points are as they were;
- the next incremental succeeds, and each of its disks is byte-equal to the simulator's copy of the moment;
- no bitmap was lost: it is no scan (unless QEMU itself crashed).
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import Lab

KEEP = ("--keep-checkpoints", "2")
SHAPES: dict[str, tuple[str, ...]] = {
    "full": ("full",),
    "incremental": ("incremental",),
    "two disks": ("incremental",),
    "differential": ("incremental", *KEEP),
}
WHEN = ("before", "after")
POINTS = 12  # more of them would only make chains long
SECONDS = 60


@dataclass(frozen=True)
class Cut:
    """An interruption. deed: "" for SIGKILL of backupctl, else how QEMU ends: quit, crash or restart."""

    step: int
    when: str
    deed: str = ""

    def __str__(self) -> str:
        return f"{self.step}:{self.when}" + (f":{self.deed}" if self.deed else "")

    @classmethod
    def parse(cls, text: str) -> "Cut":
        step, when, *deed = text.split(":")
        return cls(int(step), when, *deed)


class Explorer:
    """Plays cases of one shape on one lab."""

    def __init__(self, lab: Lab, shape: str, zygote: "subprocess.Popen[str]") -> None:
        self.lab = lab
        self.shape = shape
        self.cases = 0
        self._zygote = zygote
        self._keep = KEEP if shape == "differential" else ()
        self._begin()

    def steps(self) -> list[str]:
        """Play the run once to its end; returns the names of its steps."""
        log = self.lab.folder / "steps"
        log.unlink(missing_ok=True)
        code, words = self._run(STEPS=str(log))
        assert code == 0, words
        self._right(committed=self._committed(), crashed=False)
        return log.read_text().splitlines()

    def play(self, first: Cut, again: Cut | None = None) -> bool:
        """Play one case; whether `again` came to pass (a recovery has so many steps and no more)."""
        if len(list(self._folder.glob("*Z"))) > POINTS:
            self._begin()
        self.lab.writer.write(2)
        before = self._committed()
        if first.deed:
            self.lab.machine._hang_up()  # it will end
        code, words = self._run(first)
        assert code in ((-9,) if not first.deed else (0, 1, 3)), f"exit {code}: {words}"
        assert "Traceback" not in words, words
        came = True
        if first.deed == "quit":
            self._start_again()
        if again is not None:
            self.lab.writer.write(1)
            code, words = self._call("recover", "web", cut=again)
            assert code in (-9, 0), f"recovery: exit {code}: {words}"
            came = code == -9
        code, words = self._call("recover", "web")
        assert code == 0, f"recovery: exit {code}: {words}"
        self.lab.writer.write(2)
        self._right(before, crashed=first.deed == "crash")
        self.cases += 1
        return came

    @property
    def _folder(self) -> Path:
        return self.lab.cli.repository / "web"

    def _start_again(self) -> None:
        """Start the machine that has ended; it takes the names of its sockets with it, so not before."""
        machine = self.lab.machine
        assert machine.process is not None
        machine.process.wait(SECONDS)
        machine.start()

    def _begin(self) -> None:
        """Make a new chain, and forget the old one."""
        old = list(self._folder.glob("*Z")) if self._folder.exists() else []
        for kind in ("full", *["incremental"] * len(self._keep)):
            self.lab.writer.write(5)
            code, words = self._call(kind, "web", *self._keep)
            assert code == 0, words
        for folder in old:
            shutil.rmtree(folder)

    def _run(self, cut: Cut | None = None, **environment: str) -> tuple[int, str]:
        kind, *options = SHAPES[self.shape]
        if self.shape == "differential":
            options += ["--since", sorted(path.name for path in self._folder.glob("*Z"))[-2]]
        return self._call(kind, "web", *options, cut=cut, **environment)

    def _right(self, committed: dict[str, tuple[int, ...]], *, crashed: bool) -> None:
        assert committed.items() <= self._committed().items(), "a committed point was touched"
        self.lab.assert_at_rest(bitmaps_each=None)
        code, words = self._call("incremental", "web", "--json", *self._keep)
        assert code == 0, words
        report = json.loads((self.lab.folder / "out").read_text())
        for disk, content in self.lab.writer.moment.items():
            raw = self.lab.folder / "compared.raw"
            image = self._folder / report["point"] / f"{disk}.qcow2"
            command = [self.lab.machine.build.tool("qemu-img"), "convert", "-O", "raw", image, raw]
            subprocess.run(command, check=True, timeout=SECONDS)
            assert raw.read_bytes() == content, f"{disk} is not what it was at its moment"
        scanned = [disk["name"] for disk in report["disks"] if disk["scanned"]]
        assert crashed or not scanned, f"the bitmap of {scanned} was lost"
        self.lab.assert_at_rest(bitmaps_each=None if crashed else len(self._keep) + 1)

    def _committed(self) -> dict[str, tuple[int, ...]]:
        """Return what tells of each file of each committed point whether it was touched."""
        found = {}
        for path in self._folder.glob("*Z/*"):
            stat = path.stat()
            found[str(path)] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        return found

    def _call(self, *arguments: str, cut: Cut | None = None, **environment: str) -> tuple[int, str]:
        """Call the command line in a child of the zygote; returns its exit code and what it said."""
        if cut is not None:
            environment |= {"KILL_AT": str(cut.step), "KILL_WHEN": cut.when, "DEED": cut.deed}
            environment["CONTROL"] = str(self.lab.machine.folder / "control")
        words = self.lab.folder / "words"
        request: dict[str, Any] = {
            "arguments": self.lab.cli.command(*arguments)[3:],
            "environment": environment,
            "out": str(self.lab.folder / "out"),
            "words": str(words),
        }
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._zygote.stdin.write(json.dumps(request) + "\n")
        self._zygote.stdin.flush()
        return int(self._zygote.stdout.readline()), words.read_text()


@contextmanager
def zygote(environment: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    """Start one; it dies with us, or with the block."""
    command = ["setpriv", "--pdeathsig=KILL", sys.executable, "-m", "tests.exploration.zygote"]
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
