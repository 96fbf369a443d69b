# SPDX-License-Identifier: GPL-2.0-or-later
"""Every step at which a run, and the recovery after it, can be interrupted, and what must hold afterwards.

A case has one or two interruptions: one of the run, before or after a step, and one of the `recover` that
follows. A run that ends with 0 has made a point, one that ends with 1 has made none, and neither has left
anything. Then `recover` runs to its end, while the guest has kept writing, and:

- backupctl has left nothing but the committed set; the files of committed points are unchanged;
- no write of the guest has failed, and it is not frozen;
- the next incremental succeeds, and each of its disks equals the simulator's copy, byte for byte;
- its parent is the newest point, and it stores little more than what differs from it;
- no bitmap was lost: no disk is scanned (unless QEMU itself crashed).
"""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests import interrupted_cli
from tests.conftest import Lab

KEEP = ("--keep-checkpoints", "2")
SHAPES: dict[str, tuple[str, ...]] = {
    "full": ("full",),
    "incremental": ("incremental",),
    "two disks": ("incremental",),
    "differential": ("incremental", *KEEP),
    "snapshot access": ("incremental", "--view", "snapshot-access"),
}
WHEN = ("before", "after")
TERMINATIONS = ("quit", "crash", "restart")
CLUSTER_BYTES = 65536
TABLES_BYTES = 5 * CLUSTER_BYTES  # of a small qcow2
CODES = {"": (-9,), "term": (0, 1), "eio": (1,), "enospc": (1,)}
POINTS = 12  # more would only make the chains longer
SECONDS = 60


@dataclass(frozen=True)
class Interruption:
    """An interruption. action: "" for SIGKILL of backupctl, else one of `interrupted_cli`."""

    step: int
    when: str
    action: str = ""

    def __str__(self) -> str:
        return f"{self.step}:{self.when}" + (f":{self.action}" if self.action else "")

    @classmethod
    def parse(cls, text: str) -> "Interruption":
        step, when, *action = text.split(":")
        return cls(int(step), when, *action)


def _codes(interruption: Interruption, steps: list[str]) -> tuple[int, ...]:
    """Return how a call may end. After the commit an error of the disk need not fail the run."""
    codes = CODES.get(interruption.action, (0, 1, 3))
    commit = max((number for number, step in enumerate(steps) if step == "rename "), default=len(steps))
    return (
        (0, *codes)
        if interruption.step > commit and interrupted_cli.ERRORS.get(interruption.action)
        else codes
    )


class Explorer:
    """Runs cases of one shape on one lab."""

    def __init__(self, lab: Lab, shape: str) -> None:
        self.lab = lab
        self.shape = shape
        self.cases = 0
        self._keep = KEEP if shape == "differential" else ()
        self._begin()

    def steps(self) -> list[str]:
        """Run once to the end, and return the names of the steps."""
        code, words = self._run()
        assert code == 0, words
        steps = self._log.read_text().splitlines()
        self._right(committed=self._committed(), crashed=False)
        return steps

    def play(self, first: Interruption, again: Interruption | None = None) -> bool:
        """Run one case. Returns whether `again` took place: it does not if the recovery has fewer steps."""
        self.lab.writer.write(2)
        before = self._committed()
        code, came = self._interrupted(first, self._run)
        assert came, "the run had fewer steps this time"
        if code in (0, 1):
            self.lab.assert_at_rest(bitmaps_each=None)
            assert (self._committed() == before) == bool(code), f"exit {code} is a lie"
        self.lab.writer.write(1)
        if again is not None:
            _, came = self._interrupted(
                again, lambda interruption: self._call("recover", "web", interruption=interruption)
            )
        code, words = self._call("recover", "web")
        assert code == 0, f"recovery: exit {code}: {words}"
        self.lab.writer.write(2)
        crashed = "crash" in (first.action, again and again.action)
        self._right(before, crashed=crashed)
        self.cases += 1
        if crashed or len(list(self._directory.glob("*Z"))) > POINTS:
            self._begin()  # a crash loses the checkpoints, too
        return came

    def _interrupted(
        self, interruption: Interruption, call: Callable[[Interruption], tuple[int, str]]
    ) -> tuple[int, bool]:
        """Make a call with an interruption; return its exit code and whether the interruption took place."""
        if interruption.action in TERMINATIONS:
            self.lab.machine._hang_up()  # it will end
        code, words = call(interruption)
        steps = self._log.read_text().splitlines()
        came = len(steps) > interruption.step
        assert code in (_codes(interruption, steps) if came else (0,)), f"exit {code}: {words}"
        assert not interrupted_cli.BUG.search(words), words
        if interruption.action == "quit" and came:
            self._start_again()
        self.lab.machine.control("clear-faults")
        return code, came

    @property
    def _log(self) -> Path:
        """The file with the steps of the last call."""
        return self.lab.directory / "steps"

    @property
    def _directory(self) -> Path:
        return self.lab.cli.repository / "web"

    def _start_again(self) -> None:
        """Start the machine again, once it has ended and removed its sockets."""
        machine = self.lab.machine
        assert machine.process is not None
        machine.process.wait(SECONDS)
        machine.start()

    def _begin(self) -> None:
        """Start a new chain, and delete the old one."""
        old = list(self._directory.glob("*Z")) if self._directory.exists() else []
        for kind in ("full", *["incremental"] * len(self._keep)):
            self.lab.writer.write(5)
            code, words = self._call(kind, "web", *self._keep)
            assert code == 0, words
        for directory in old:
            shutil.rmtree(directory)

    def _run(self, interruption: Interruption | None = None) -> tuple[int, str]:
        kind, *options = SHAPES[self.shape]
        if self.shape == "differential":
            options += ["--since", sorted(path.name for path in self._directory.glob("*Z"))[-2]]
        return self._call(kind, "web", *options, interruption=interruption)

    def _right(self, committed: dict[str, tuple[int, ...]], *, crashed: bool) -> None:
        assert committed.items() <= self._committed().items(), "a committed point was changed"
        self.lab.assert_at_rest(bitmaps_each=None)
        assert self.lab.machine.control("status")["failed-writes"] == 0, "a write of the guest failed"
        newest = max(path.name for path in self._directory.glob("*Z"))
        code, words = self._call("incremental", "web", "--json", *self._keep)
        assert code == 0, words
        report = json.loads(self._last.stdout)
        assert report["parent"] == newest
        for disk in report["disks"]:
            name = disk["name"]
            content, parent = self._content(report["point"], name), self._content(newest, name)
            assert content == self.lab.writer.moment[name], (
                f"{name} differs from the disk at its point in time"
            )
            assert disk["kind"] == "incremental", f"the chain of {name} was lost"
            assert crashed or not disk["scanned"], f"the bitmap of {name} was lost"
            changed = sum(
                content[at : at + CLUSTER_BYTES] != parent[at : at + CLUSTER_BYTES]
                for at in range(0, len(content), CLUSTER_BYTES)
            )
            assert disk["stored_bytes"] <= changed * CLUSTER_BYTES + TABLES_BYTES, f"{changed} changed"
        assert len(report["disks"]) == len(self.lab.writer.moment)
        self.lab.assert_at_rest(bitmaps_each=None if crashed else len(self._keep) + 1)

    def _content(self, point: str, disk: str) -> bytes:
        """Return a disk's bytes at a point, as QEMU's own tools read them."""
        raw = self.lab.directory / "compared.raw"
        image = self._directory / point / f"{disk}.qcow2"
        command = [self.lab.machine.build.tool("qemu-img"), "convert", "-O", "raw", image, raw]
        subprocess.run(command, check=True, timeout=SECONDS)
        return raw.read_bytes()

    def _committed(self) -> dict[str, tuple[int, ...]]:
        """Return inode, size and time of each file of each committed point, to notice changes."""
        found = {}
        for path in self._directory.glob("*Z/*"):
            stat = path.stat()
            found[str(path)] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        return found

    def _call(self, *arguments: str, interruption: Interruption | None = None) -> tuple[int, str]:
        """Make a call, interrupted if asked for; return its exit code and stderr."""
        self._log.unlink(missing_ok=True)
        environment = {"STEPS": str(self._log), "CONTROL": str(self.lab.machine.directory / "control")}
        if interruption is not None:
            environment |= {
                "KILL_AT": str(interruption.step),
                "KILL_WHEN": interruption.when,
                "ACTION": interruption.action,
            }
        self._last = self.lab.cli.call(*arguments, entry=interrupted_cli.ENTRY, **environment)
        return self._last.returncode, self._last.stderr
