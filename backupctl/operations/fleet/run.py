# SPDX-License-Identifier: GPL-2.0-or-later
"""Work on several VMs at once, each in a process of its own.

A run owns the signals, the sockets and the guard of its process. So what happens to one VM, a crash of its
process included, cannot reach another. How such a process ends::

    by itself        its document is on its stdout
    we are stopped   it gets SIGTERM, and rolls back; so it does when we are killed (see parent_death)
    it hangs         it gets SIGTERM, then SIGKILL; its guard thaws the guest, and the next run recovers
    it hangs in the  it is left alone: nobody can end it
    kernel
"""

import os
import select
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

import backupctl
from backupctl.cancel import Cancellation
from backupctl.names import VmName
from backupctl.operations.fleet.limits import Job, Limits, next_job
from backupctl.system import parent_death

_LOOK_SECONDS = 0.5
_MAX_DOCUMENT_BYTES = 64 << 20
_MAX_LINE_BYTES = 64 << 10
_READ_BYTES = 64 << 10


@dataclass(frozen=True)
class Patience:
    """How long to wait for a process, in seconds.

    work: before it is asked to end; None for ever. end: after that, before it is killed: as long as a guard
    tries to thaw a guest, and a little more. dead: after that, before it is left alone.
    """

    work: float | None = None
    end: float = 330.0
    dead: float = 10.0


@dataclass(frozen=True)
class JobResult:
    """How a process ended. code: None if it did not start, or could not be ended; negative for a signal.

    document: what it wrote to stdout. why: why it was asked to end or was not started; "" if it was not.
    """

    vm: VmName
    code: int | None
    document: bytes
    seconds: float
    why: str = ""


class Watcher(Protocol):
    """Who is told what happens meanwhile."""

    def started(self, job: Job) -> None:
        """A process has started."""

    def line(self, vm: VmName, line: str) -> None:
        """A process wrote a line to stderr."""

    def ended(self, result: JobResult) -> None:
        """A process has ended."""


def run(
    jobs: Sequence[Job], limits: Limits, patience: Patience, watcher: Watcher, stop: Cancellation
) -> list[JobResult]:
    """Do the jobs, as many at once as the limits allow; returns how each ended, in the order of the jobs.

    Call it in the main thread. When `stop` is requested no further job is started.
    """
    waiting, running = list(jobs), list[_Process]()
    results: dict[VmName, JobResult] = {}

    def ended(result: JobResult) -> None:
        results[result.vm] = result
        watcher.ended(result)

    with selectors.DefaultSelector() as selector:
        while waiting or running:
            if stop.requested:
                for job in waiting:
                    ended(JobResult(job.vm, None, b"", 0.0, "the run was stopped before it was started"))
                waiting.clear()
            while found := next_job(waiting, [one.job for one in running], limits):
                waiting.remove(found)
                watcher.started(found)
                try:
                    running.append(_Process.start(found, patience, selector))
                except OSError as err:
                    ended(JobResult(found.vm, None, b"", 0.0, f"its process cannot start: {err.strerror}"))
            for key, _ in selector.select(_LOOK_SECONDS):
                key.data(watcher)
            for process in list(running):
                process.look(stop)
                if result := process.result():
                    running.remove(process)
                    process.close(watcher)
                    ended(result)
    return [results[job.vm] for job in jobs]


@dataclass
class _Process:
    """A running job. lines: the end of the pipe that is its stderr. asked, killed: when it was."""

    job: Job
    patience: Patience
    child: "subprocess.Popen[bytes]"
    selector: selectors.BaseSelector
    output: IO[bytes]
    lines: int
    pidfd: int
    begun: float = field(default_factory=time.monotonic)
    why: str = ""
    asked: float | None = None
    killed: float | None = None
    unread: bytes = b""

    @classmethod
    def start(cls, job: Job, patience: Patience, selector: selectors.BaseSelector) -> "_Process":
        """Start it. Raises OSError."""
        with ExitStack() as held:
            output = held.enter_context(tempfile.TemporaryFile())
            lines, theirs = os.pipe()
            held.callback(os.close, lines)
            try:
                child = subprocess.Popen(
                    job.command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=theirs,
                    env=_environment(),
                    start_new_session=True,  # a Ctrl-C in the terminal is ours to hand on
                    preexec_fn=parent_death.signalled(signal.SIGTERM),  # noqa: PLW1509 - no lock is taken in it
                )
            finally:
                os.close(theirs)
            try:
                pidfd = os.pidfd_open(child.pid)
            except OSError:  # too many open files: nobody would see how it ends
                child.terminate()
                child.wait()
                raise
            held.pop_all()
        made = cls(job, patience, child, selector, output, lines, pidfd)
        selector.register(made.lines, selectors.EVENT_READ, made.read)
        selector.register(made.pidfd, selectors.EVENT_READ, made.has_ended)
        return made

    def read(self, watcher: Watcher) -> None:
        """Hand on the lines that there are."""
        content = os.read(self.lines, _READ_BYTES)
        if not content:
            self.selector.unregister(self.lines)
            return
        *lines, self.unread = (self.unread + content).split(b"\n")
        if len(self.unread) > _MAX_LINE_BYTES:
            lines, self.unread = [*lines, self.unread], b""
        for line in lines:
            watcher.line(self.job.vm, line.decode(errors="replace"))

    def has_ended(self, _watcher: Watcher) -> None:
        """Wake up the loop: `result` finds it."""

    def look(self, stop: Cancellation) -> None:
        """Ask it to end if it has to, and kill it if it does not."""
        now, work = time.monotonic(), self.patience.work
        if self.asked is None and (stop.requested or (work is not None and now - self.begun > work)):
            self.why = "the run was stopped" if stop.requested else f"it took longer than {work:g} s"
            self.asked = now
            self.child.terminate()
        elif self.asked is not None and self.killed is None and now - self.asked > self.patience.end:
            self.killed = now
            self.child.kill()

    def result(self) -> JobResult | None:
        """Return how it ended; None while it works."""
        code = self.child.poll()
        now = time.monotonic()
        if code is None and (self.killed is None or now - self.killed <= self.patience.dead):
            return None
        document = os.pread(self.output.fileno(), _MAX_DOCUMENT_BYTES, 0)
        return JobResult(self.job.vm, code, document, now - self.begun, self.why)

    def close(self, watcher: Watcher) -> None:
        """Hand on what it wrote last; leave it."""
        while self.lines in self.selector.get_map() and select.select([self.lines], [], [], 0)[0]:
            self.read(watcher)
        if self.unread:
            watcher.line(self.job.vm, self.unread.decode(errors="replace"))
        for descriptor in (self.lines, self.pidfd):
            if descriptor in self.selector.get_map():
                self.selector.unregister(descriptor)
            os.close(descriptor)
        self.output.close()
        # One that could not be ended is nobody's child to wait for: Python must not warn of it.
        self.child.returncode = -signal.SIGKILL if self.child.returncode is None else self.child.returncode


def _environment() -> Mapping[str, str]:
    """Return the environment of a child that is to import this very package."""
    return {**os.environ, "PYTHONPATH": str(Path(backupctl.__file__).parent.parent)}
