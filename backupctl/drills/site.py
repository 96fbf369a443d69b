# SPDX-License-Identifier: GPL-2.0-or-later
"""The site of a drill: a throw-away VM, a repository, and the command line as users call it.

Nothing of the user's is touched: sockets, repository, scratch, configuration and home are in one temporary
directory. A drill is not judged by what backupctl reports: the expected bytes are the simulator's own copy of
the disks, or, on a real QEMU, a model of all writes; the VM itself is asked for what is left in it.
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
_FAULTY_CLI = "backupctl.cli.faulty:faulty_cli"
_ENDS_IN_TIME = f"backupctl ends within {_RUN_SECONDS:g} s"
_NOTABLE = (DiskScanned.code, DiskTakenFull.code)


class ExpectationFailed(Exception):
    """An expectation of a drill does not hold, so it has failed. The text is the expectation."""


def expect(truth: object, what: str) -> None:
    """Raise ExpectationFailed unless it is true. what: the expectation, as a statement."""
    if not truth:
        raise ExpectationFailed(what)


@dataclass(frozen=True)
class Result:
    """The result of one call of the command line. code: negative for a signal."""

    code: int
    document: Any
    stderr: str

    @property
    def message(self) -> str:
        """The error's message; of a run without an error, its most important note."""
        error = self.document.get("error") if isinstance(self.document, dict) else None
        if error:
            return str(error["message"])
        notable = [*self.events("warnings"), *self.events("notes", *_NOTABLE)]
        return str(notable[0]["message"]) if notable else ""

    def events(self, severity: str, *codes: str) -> list[dict[str, Any]]:
        """Return its "warnings" or "notes"; codes: only those with one of these."""
        found = self.document.get(severity, []) if isinstance(self.document, dict) else []
        return [one for one in found if not codes or one["code"] in codes]

    @property
    def step(self) -> str:
        """The step at which it failed, as reported."""
        error = self.document.get("error") if isinstance(self.document, dict) else None
        return str(error.get("step") or "") if error else ""


@dataclass
class Site(ABC):
    """A VM with two disks and a repository.

    directory: of everything. fork_server: makes the calls. qmp, agent: addresses, as on the command line.
    options: of every backup. moments: by point, the expected disks as raw files. last: the result of the call
    that met the fault. next_run_notes: what the next run cleaned up, as it reported. committed: hashes of the
    files of points that must not change.
    """

    directory: Path
    fork_server: ForkServer
    qmp: str = ""
    agent: str | None = None
    options: tuple[str, ...] = ()
    compared_bytes: int = 0
    moments: dict[str, dict[str, Path]] = field(default_factory=dict)
    last: Result | None = None
    next_run_notes: str = ""
    committed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.repository = self.directory / "repository"
        self.scratch = self.directory / "scratch"
        self.home = self.directory / "home"
        for path in (self.scratch, self.home):
            path.mkdir(exist_ok=True)

    @abstractmethod
    def write(self, changes: int) -> None:
        """Let the guest make this many changes now. Raises Failed if one of them failed."""

    @abstractmethod
    def moment(self) -> dict[str, Path]:
        """Return raw files of the disks at the point in time of the newest point."""

    @abstractmethod
    def query(self, command: str, **arguments: Any) -> Any:
        """Run a monitor command on the VM, without backupctl."""

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
        """Resize a disk; new space reads as zeroes."""
        self.query("block_resize", **{"node-name": f"node-{disk}", "size": size})

    def snapshot(self, disk: str, size: int) -> None:
        """Take an external snapshot, as another tool might between two backups."""
        path = self._image(f"over-{disk}", size)
        self.query("blockdev-add", **_node(f"over-{disk}", path), backing=None)
        self.query("blockdev-snapshot", node=f"node-{disk}", overlay=f"over-{disk}")

    def guest_failure(self) -> str:
        """Return how the guest failed; "" if it did not."""
        return ""

    def frozen(self) -> bool:
        """Whether the guest's file systems are frozen; a VM without a guest never is."""
        return False

    def await_thaw(self) -> None:
        """Wait until the guard of a run that was killed has thawed the guest. Raises ExpectationFailed."""
        deadline = time.monotonic() + _THAW_SECONDS
        while self.frozen():
            expect(time.monotonic() < deadline, f"the guest is thawed within {_THAW_SECONDS:g} s of the kill")
            time.sleep(0.02)

    def commit_known(self) -> None:
        """Remember the files of the committed points, for `check_next_run` to compare."""
        self.committed = self.fingerprint()

    def arguments(self, *arguments: str) -> list[str]:
        """Return the arguments of a call with JSON output, including those that every call needs."""
        # Without --log-file each failure here would leave a log in the place of a real one's.
        found = [*arguments, "--repository", str(self.repository), "--json"]
        found += ["--log-file", str(self.directory / "log")]
        if arguments[0] in ("full", "incremental", "recover", "status"):
            found += [*self.vm_arguments(), "--scratch", str(self.scratch)]
        return found

    def vm_arguments(self) -> list[str]:
        """Return the arguments by which a call finds the VM."""
        return ["--qmp", self.qmp, *(["--agent", self.agent] if self.agent else [])]

    def environment(self) -> dict[str, str]:
        """Return an environment in which no configuration of the user is found."""
        hidden = ("BACKUPCTL_CONFIG", "XDG_CONFIG_HOME")
        kept = {name: text for name, text in os.environ.items() if name not in hidden}
        ours = str(Path(__file__).resolve().parents[2])
        packages = os.pathsep.join(dict.fromkeys([ours, *kept.get("PYTHONPATH", "").split(os.pathsep)]))
        return {**kept, "HOME": str(self.home), "PYTHONPATH": packages.rstrip(os.pathsep)}

    def run(self, *arguments: str, fault: str = "") -> Result:
        """Call backupctl and wait for it. fault: the first argument of `cli.faulty`, "" for none."""
        called, entry = self.arguments(*arguments), CLI
        if fault:
            called, entry = [fault, *called], _FAULTY_CLI
        try:
            done = self.fork_server.run(
                CallSpec(called, self.environment(), str(self.home), entry), _RUN_SECONDS
            )
        except subprocess.TimeoutExpired as err:
            raise ExpectationFailed(_ENDS_IN_TIME) from err
        return _result(done.returncode, done.stdout, done.stderr)

    @contextmanager
    def start(self, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
        """Start backupctl; it is killed if it still runs at the end of the block."""
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
        """Wait for a run that was started. Raises ExpectationFailed if it does not end."""
        try:
            out, stderr = process.communicate(timeout=_RUN_SECONDS)
        except subprocess.TimeoutExpired as err:
            raise ExpectationFailed(_ENDS_IN_TIME) from err
        return _result(process.returncode, out, stderr)

    def backup(self, kind: str, *options: str, code: int = 0) -> str:
        """Make a backup that must end with this exit code; keep the expected disks. Returns the point."""
        result = self.run(kind, VM, *self.options, *options)
        expect(
            result.code == code,
            f"{kind} ends with {code} (its message: {result.message or result.stderr[-200:]})",
        )
        if kind == "incremental" and self.last is None:
            self.last = result
        if kind == "incremental" and not self.next_run_notes:
            undone = [one["action"] for one in result.events("notes", RecoveredFromEarlierRun.code)]
            self.next_run_notes = f"next run: {'; '.join(undone)}" if undone else "next run: nothing to undo"
        point = str(result.document["point"])
        self.moments[point] = self._kept(point, self.moment())
        return point

    def fails(self, kind: str, *options: str, codes: tuple[int, ...] = (1,), fault: str = "") -> Result:
        """Make a backup, which must end with one of these exit codes."""
        result = self.last = self.run(kind, VM, *self.options, *options, fault=fault)
        expect(result.code in codes, f"the run ends with {' or '.join(map(str, codes))}, not {result.code}")
        return result

    def compare(self, point: str) -> None:
        """Restore a point and compare each disk with the expected one. Raises ExpectationFailed."""
        restored = self.directory / "restored"
        result = self.run("restore", VM, point, "--format", "raw", "--to", f"{restored}/")
        expect(result.code == 0, f"{point} can be restored (its message: {result.message})")
        for disk, moment in self.moments[point].items():
            at = first_difference(restored / f"{disk}.raw", moment)
            expect(at is None, f"{disk} of {point} equals the disk at its point in time (byte {at} differs)")
            self.compared_bytes += moment.stat().st_size
        shutil.rmtree(restored)

    def compare_all(self) -> None:
        """Compare every point whose disks are known."""
        for point in self.moments:
            self.compare(point)

    def check_clean(self) -> None:
        """Check that backupctl left nothing but points and one bitmap per disk. Raises ExpectationFailed."""
        left = [job["id"] for job in self.query("query-jobs") if job["id"].startswith(_OURS)]
        left += [one["id"] for one in self.query("query-block-exports") if one["id"].startswith(_OURS)]
        nodes = self.query("query-named-block-nodes", flat=True)
        left += [node["node-name"] for node in nodes if node["node-name"].startswith(_OURS)]
        left += [path.name for path in (self.repository / VM).glob("*.partial")]
        left += [path.name for path in self.scratch.iterdir()]
        expect(not left, f"backupctl left nothing behind (found: {', '.join(left)})")
        for node in nodes:
            ours = [b["name"] for b in node.get("dirty-bitmaps", []) if str(b.get("name")).startswith(_OURS)]
            expect(len(ours) <= 1, f"backupctl has at most one bitmap on {node['node-name']} (found: {ours})")

    def fingerprint(self) -> dict[str, str]:
        """Return a hash of every file of every committed point."""
        found = {}
        for path in sorted((self.repository / VM).glob("*Z/**/*")):
            if path.is_file():
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def check_next_run(self, code: int = 0) -> None:
        """Check that the next incremental succeeds, all points are unchanged, and nothing is left.

        code: its exit code, 4 if older points are damaged. Raises ExpectationFailed.
        """
        self.write(10)
        self.backup("incremental", code=code)
        expect(self.committed.items() <= self.fingerprint().items(), "committed points are unchanged")
        self.check_clean()
        self.compare_all()
        expect(not self.guest_failure(), f"no write of the guest failed ({self.guest_failure()})")

    def _image(self, name: str, size: int) -> Path:
        path = self.directory / f"{name}.qcow2"
        made = qemu_tools.img(["create", "-q", "-f", "qcow2", str(path), str(size)])
        if made.returncode:
            raise Failed(f"cannot create {path}: {made.stderr.strip():.300}")
        return path

    def _kept(self, point: str, moment: dict[str, Path]) -> dict[str, Path]:
        return {disk: path.rename(self.directory / f"{point}-{disk}.moment") for disk, path in moment.items()}


def _result(code: int, out: str, stderr: str) -> Result:
    """Check what every call must keep to, whatever happened. Raises ExpectationFailed."""
    try:
        document = json.loads(out) if out.strip() else {}
    except ValueError as err:
        raise ExpectationFailed("--json prints one JSON document on stdout, and nothing else") from err
    expect("Traceback" not in stderr, "an error is reported as a message, not as a traceback")
    return Result(code, document, stderr)


def _node(name: str, path: Path) -> dict[str, Any]:
    return {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": str(path)}}


def await_line(stream: IO[str], word: str, seconds: float = 30.0) -> None:
    """Read a run's output until a line contains this word. Raises Failed."""
    deadline = time.monotonic() + seconds
    for line in stream:
        if word in line:
            return
        if time.monotonic() > deadline:
            break
    raise Failed(f"the run did not reach {word!r}")
