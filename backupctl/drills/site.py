# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a drill takes place: a throw-away VM, a repository, and the command line as users call it.

Nothing of the user's is in reach: sockets, repository, scratch, configuration and home lie in one temporary
folder. What a drill is judged by does not come from backupctl: the bytes of a moment are the simulator's
own copy, or, on a real QEMU, the model of all that was written; what is left in the VM is asked of the VM.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from backupctl.drills.demo import first_difference
from backupctl.drills.fork_server import CLI, CallSpec, ForkServer
from backupctl.errors import Failed
from backupctl.events.backup import DiskScanned, DiskTakenFull, RecoveredFromEarlierRun
from backupctl.system import qemu_tools

VM = "drilled"
_RUN_SECONDS = 120.0
_THAW_SECONDS = 5.0  # less than the freeze budget: it is the kill that the guard must answer to
_OURS = "backupctl-"
_DOOMED = "backupctl.cli.faulty:faulty_cli"
_ENDS = f"backupctl ends within {_RUN_SECONDS:g} s"
_WORTH_TELLING = (DiskScanned.code, DiskTakenFull.code)


class ExpectationFailed(Exception):
    """What a drill expects did not come true: its verdict."""


def expect(truth: object, what: str) -> None:
    """Raise Unmet unless it is true; `what` is what should have been."""
    if not truth:
        raise ExpectationFailed(what)


@dataclass(frozen=True)
class Result:
    """What one call of the command line came to. words: all of stderr. code: negative for a signal."""

    code: int
    document: Any
    words: str

    @property
    def message(self) -> str:
        """The error's own words; of a run without one, what it found worth telling."""
        error = self.document.get("error") if isinstance(self.document, dict) else None
        if error:
            return str(error["message"])
        told = [*self.events("warnings"), *self.events("notes", *_WORTH_TELLING)]
        return str(told[0]["message"]) if told else ""

    def events(self, severity: str, *codes: str) -> list[dict[str, Any]]:
        """Return its "warnings" or "notes", those with one of the codes if there are any."""
        found = self.document.get(severity, []) if isinstance(self.document, dict) else []
        return [one for one in found if not codes or one["code"] in codes]

    @property
    def step(self) -> str:
        """Where it failed, as it was told."""
        error = self.document.get("error") if isinstance(self.document, dict) else None
        return str(error.get("step") or "") if error else ""


@dataclass
class Site(ABC):
    """A VM with two disks and a repository.

    folder: all of it. warm: what calls are made by. moments: of each point, raw files by disk. last: the
    call that met what was broken. aftermath: what the next run had to clear up, as it told. committed:
    hashes of the files of points that must not change.
    """

    folder: Path
    warm: ForkServer
    qmp: str = ""
    agent: str | None = None
    options: tuple[str, ...] = ()
    compared_bytes: int = 0
    moments: dict[str, dict[str, Path]] = field(default_factory=dict)
    last: Result | None = None
    aftermath: str = ""
    committed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.repository = self.folder / "repository"
        self.scratch = self.folder / "scratch"
        self.home = self.folder / "home"
        for path in (self.scratch, self.home):
            path.mkdir(exist_ok=True)

    @abstractmethod
    def write(self, changes: int) -> None:
        """Let the guest make so many changes at once. Raises Failed if one of them failed."""

    @abstractmethod
    def moment(self) -> dict[str, Path]:
        """Return raw files of the disks at the moment of the newest point."""

    @abstractmethod
    def query(self, command: str, **arguments: Any) -> Any:
        """Ask the VM past backupctl."""

    @abstractmethod
    def restart(self) -> None:
        """Start the VM again if it has ended."""

    @abstractmethod
    def end(self, how: str) -> None:
        """End the VM: "kill", or "quit" cleanly."""

    def add_disk(self, name: str, size: int) -> None:
        """Plug an empty disk in. Raises Failed."""
        path = self._image(name, size)
        self.query("blockdev-add", **_node(f"node-{name}", path))
        self.query("device_add", driver="virtio-blk-pci", id=name, drive=f"node-{name}", bus="rp1")

    def resize(self, disk: str, size: int) -> None:
        """Resize a disk; what is new reads as zeroes."""
        self.query("block_resize", **{"node-name": f"node-{disk}", "size": size})

    def snapshot(self, disk: str, size: int) -> None:
        """Take an external snapshot, as somebody else might between two backups."""
        path = self._image(f"over-{disk}", size)
        self.query("blockdev-add", **_node(f"over-{disk}", path), backing=None)
        self.query("blockdev-snapshot", node=f"node-{disk}", overlay=f"over-{disk}")

    def harmed(self) -> str:
        """Say what harm the guest came to; "" for none."""
        return ""

    def frozen(self) -> bool:
        """Whether the guest's file systems are frozen; a VM without a guest never is."""
        return False

    def await_thaw(self) -> None:
        """Wait for the guard of a run that was killed to let the guest go on. Raises Unmet."""
        deadline = time.monotonic() + _THAW_SECONDS
        while self.frozen():
            expect(time.monotonic() < deadline, f"the guest is thawed within {_THAW_SECONDS:g} s of the kill")
            time.sleep(0.02)

    def commit_known(self) -> None:
        """Keep what the committed points are made of now, for `next_is_right` to compare."""
        self.committed = self.fingerprint()

    def arguments(self, *arguments: str) -> list[str]:
        """Return the arguments of a call, for JSON, with what every call needs."""
        # Their failures are wanted: what they leave behind must not take the place of a real one's log.
        found = [*arguments, "--repository", str(self.repository), "--json"]
        found += ["--log-file", str(self.folder / "log")]
        if arguments[0] in ("full", "incremental", "recover", "status"):
            found += ["--qmp", self.qmp, "--scratch", str(self.scratch)]
            found += ["--agent", self.agent] if self.agent else []
        return found

    def environment(self) -> dict[str, str]:
        """Return an environment in which no configuration of the user's is found."""
        hidden = ("BACKUPCTL_CONFIG", "XDG_CONFIG_HOME")
        kept = {name: text for name, text in os.environ.items() if name not in hidden}
        ours = str(Path(__file__).resolve().parents[2])
        packages = os.pathsep.join(dict.fromkeys([ours, *kept.get("PYTHONPATH", "").split(os.pathsep)]))
        return {**kept, "HOME": str(self.home), "PYTHONPATH": packages.rstrip(os.pathsep)}

    def run(self, *arguments: str, doomed: str = "") -> Result:
        """Call backupctl and wait for it. doomed: how it comes to harm (see cli/faulty.py)."""
        called, entry = self.arguments(*arguments), CLI
        if doomed:
            called, entry = [doomed, *called], _DOOMED
        try:
            done = self.warm.run(CallSpec(called, self.environment(), str(self.home), entry), _RUN_SECONDS)
        except subprocess.TimeoutExpired as err:
            raise ExpectationFailed(_ENDS) from err
        return _said(done.returncode, done.stdout, done.stderr)

    @contextmanager
    def start(self, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
        """Start backupctl; it is killed if it has not ended with the block."""
        process = subprocess.Popen(
            [sys.executable, "-m", "backupctl", *self.arguments(*arguments)],
            cwd=self.home,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            process.communicate()

    def wait(self, process: "subprocess.Popen[str]") -> Result:
        """Wait for a run that was started. Raises Unmet if it does not end."""
        try:
            out, words = process.communicate(timeout=_RUN_SECONDS)
        except subprocess.TimeoutExpired as err:
            raise ExpectationFailed(_ENDS) from err
        return _said(process.returncode, out, words)

    def backup(self, kind: str, *options: str, code: int = 0) -> str:
        """Make a point that must succeed, with this exit code; its moment is kept. Returns its id."""
        said = self.run(kind, VM, *self.options, *options)
        expect(
            said.code == code, f"{kind} succeeds, with {code} (it said: {said.message or said.words[-200:]})"
        )
        if kind == "incremental" and self.last is None:
            self.last = said
        if kind == "incremental" and not self.aftermath:
            undone = [one["action"] for one in said.events("notes", RecoveredFromEarlierRun.code)]
            self.aftermath = f"next run: {'; '.join(undone)}" if undone else "next run: nothing to undo"
        point = str(said.document["point"])
        self.moments[point] = self._kept(point, self.moment())
        return point

    def fails(self, kind: str, *options: str, codes: tuple[int, ...] = (1,), doomed: str = "") -> Result:
        """Make a run that must end with one of these codes."""
        said = self.last = self.run(kind, VM, *self.options, *options, doomed=doomed)
        expect(said.code in codes, f"it ends with {' or '.join(map(str, codes))}, not {said.code}")
        return said

    def compare(self, point: str) -> None:
        """Restore a point and compare each disk, byte by byte, with its moment. Raises Unmet."""
        restored = self.folder / "restored"
        said = self.run("restore", VM, point, "--format", "raw", "--to", f"{restored}/")
        expect(said.code == 0, f"{point} can be restored (it said: {said.message})")
        for disk, moment in self.moments[point].items():
            at = first_difference(restored / f"{disk}.raw", moment)
            expect(at is None, f"{disk} of {point} is what it was at its moment (byte {at} is not)")
            self.compared_bytes += moment.stat().st_size
        shutil.rmtree(restored)

    def compare_all(self) -> None:
        """Compare every point whose moment is known."""
        for point in self.moments:
            self.compare(point)

    def at_rest(self) -> None:
        """Nothing of ours is left but one bitmap a disk and points. Raises Unmet."""
        left = [job["id"] for job in self.query("query-jobs") if job["id"].startswith(_OURS)]
        left += [one["id"] for one in self.query("query-block-exports") if one["id"].startswith(_OURS)]
        nodes = self.query("query-named-block-nodes", flat=True)
        left += [node["node-name"] for node in nodes if node["node-name"].startswith(_OURS)]
        left += [path.name for path in (self.repository / VM).glob("*.partial")]
        left += [path.name for path in self.scratch.iterdir()]
        expect(not left, f"nothing of backupctl's is left (found: {', '.join(left)})")
        for node in nodes:
            ours = [b["name"] for b in node.get("dirty-bitmaps", []) if str(b.get("name")).startswith(_OURS)]
            expect(len(ours) <= 1, f"one bitmap of ours at most is on {node['node-name']} (found: {ours})")

    def fingerprint(self) -> dict[str, str]:
        """Return a hash of every file of every committed point."""
        found = {}
        for path in sorted((self.repository / VM).glob("*Z/*")):
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def next_is_right(self, code: int = 0) -> None:
        """The next incremental succeeds, every point is what it was, nothing is left. Raises Unmet.

        code: its exit code, 4 where older points are damaged.
        """
        self.write(10)
        self.backup("incremental", code=code)
        expect(self.committed.items() <= self.fingerprint().items(), "committed points are as they were")
        self.at_rest()
        self.compare_all()
        expect(not self.harmed(), f"no write of the guest failed ({self.harmed()})")

    def _image(self, name: str, size: int) -> Path:
        path = self.folder / f"{name}.qcow2"
        made = qemu_tools.img(["create", "-q", "-f", "qcow2", str(path), str(size)])
        if made.returncode:
            raise Failed(f"{path} can't be made: {made.stderr.strip():.300}")
        return path

    def _kept(self, point: str, moment: dict[str, Path]) -> dict[str, Path]:
        return {disk: path.rename(self.folder / f"{point}-{disk}.moment") for disk, path in moment.items()}


def _said(code: int, out: str, words: str) -> Result:
    """Look at what a call came to. Raises Unmet if that is not what one comes to, whatever happened."""
    try:
        document = json.loads(out) if out.strip() else {}
    except ValueError as err:
        raise ExpectationFailed("with --json there is one JSON document on stdout, and nothing else") from err
    expect("Traceback" not in words, "an error is told in words, not as a traceback")
    return Result(code, document, words)


def _node(name: str, path: Path) -> dict[str, Any]:
    return {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": str(path)}}


def await_line(stream: IO[str], word: str, seconds: float = 30.0) -> None:
    """Read a run's words until one line has this in it. Raises Failed."""
    deadline = time.monotonic() + seconds
    for line in stream:
        if word in line:
            return
        if time.monotonic() > deadline:
            break
    raise Failed(f"the run did not come to {word!r}")
