# SPDX-License-Identifier: GPL-2.0-or-later
"""Backup jobs: their states, their events, and the filter that copies before the guest writes."""

import errno
import os
from dataclasses import dataclass, field

from backupctl.simulator.failure import CommandError
from backupctl.simulator.filters import CopyBeforeWrite
from backupctl.simulator.graph import Graph, is_id, refuse, shown
from backupctl.simulator.nodes import EventSink, Extent, Link, Node

BUSY = "block device is in use by block job: backup"


@dataclass(eq=False)
class Job:
    """A backup job.

    group: jobs that end together with it (completion-mode grouped). error: why it ended without success.
    """

    name: str
    sync: str
    source: Node
    target: Node
    filter: CopyBeforeWrite
    auto_dismiss: bool = True
    status: str = "created"
    error: str = ""
    done_bytes: int = 0
    length_bytes: int = 0
    links: list[Link] = field(default_factory=list)
    group: list["Job"] = field(default_factory=list)

    @property
    def progress_bytes(self) -> int:
        """Bytes copied so far."""
        return self.done_bytes + self.filter.copied_bytes

    def describe(self) -> dict[str, object]:
        """Return it as `query-jobs` does."""
        described: dict[str, object] = {"id": self.name, "type": "backup", "status": self.status}
        described |= {"current-progress": self.progress_bytes, "total-progress": self.length_bytes}
        return described | ({"error": self.error} if self.error else {})

    def describe_block(self) -> dict[str, object]:
        """Return it as `query-block-jobs` does."""
        described: dict[str, object] = {
            "device": self.name,
            "type": "backup",
            "status": self.status,
            "io-status": "ok",
        }
        described |= {"len": self.length_bytes, "offset": self.progress_bytes, "speed": 0, "busy": False}
        described |= {
            "auto-finalize": True,
            "auto-dismiss": self.auto_dismiss,
            "paused": False,
            "ready": False,
        }
        return described


class Jobs:
    """All jobs of a virtual machine."""

    def __init__(self, graph: Graph, emit_event: EventSink) -> None:
        self._graph = graph
        self._emit_event = emit_event
        self.jobs: dict[str, Job] = {}

    def create(self, name: str, source: Node, target: Node, sync: str, *, auto_dismiss: bool) -> Job:
        """Insert a job's filter, which starts the snapshot. Raises CommandError."""
        self._check(name, source, target)
        keeper = CopyBeforeWrite(
            self._graph.automatic_name(), "copy-before-write", self._emit_event, source.read_only, owned=False
        )
        self._graph.add(keeper)
        self._graph.link("file", keeper, keeper.name, source)
        self._graph.link("target", keeper, keeper.name, target)
        self._put_over(name, source, keeper)
        keeper.begin()
        job = Job(name, sync, source, target, keeper, auto_dismiss, length_bytes=source.size)
        job.links = [self._graph.link("job", None, name, node) for node in (keeper, target)]
        for node in (keeper, target):
            node.blockers.append(BUSY)
        self.jobs[name] = job
        self._set_status(job, "created")
        return job

    def start(self, job: Job) -> None:
        """Start a created job; a full copy is done at once and ends the job."""
        self._set_status(job, "running")
        if job.sync == "full":
            self._copy(job)

    def withdraw(self, job: Job) -> None:
        """Undo `create` in a transaction that failed."""
        self._set_status(job, "aborting")
        self._remove_filter(job)
        self._set_status(job, "concluded")
        self.dismiss(job)

    def cancel(self, job: Job) -> None:
        """Cancel a running job, and those of its group. Raises CommandError for one that has ended."""
        if job.status != "running":
            raise CommandError(
                f"Job '{job.name}' in state '{job.status}' cannot accept command verb 'cancel'"
            )
        together = [job, *(other for other in job.group if other is not job and other.status == "running")]
        for each in together:
            self._set_status(each, "aborting")
        for each in reversed(together):
            each.error = os.strerror(errno.ECANCELED)
            self._conclude(each, "BLOCK_JOB_CANCELLED")

    def dismiss(self, job: Job) -> None:
        """Forget a job that has ended. Raises CommandError for one that has not."""
        if job.status != "concluded":
            raise CommandError(
                f"Job '{job.name}' in state '{job.status}' cannot accept command verb 'dismiss'"
            )
        self._set_status(job, "null")
        del self.jobs[job.name]

    def _check(self, name: str, source: Node, target: Node) -> None:
        if source is target:
            raise CommandError("Source and target cannot be the same")
        for node in (source, target):
            if BUSY in node.blockers:
                raise CommandError(f"Node '{node.name}' is busy: {BUSY}")
        if source.size != target.size:
            raise CommandError("Source and target image have different sizes")
        if target.read_only:
            raise CommandError("Could not create node: Block node is read-only")
        if not is_id(name):
            raise CommandError(f"Invalid job ID '{name}'")
        if name in self.jobs:
            raise CommandError(f"Job ID '{name}' already in use")

    def _put_over(self, name: str, source: Node, keeper: CopyBeforeWrite) -> None:
        """Point all users of the source at the filter; a second filter beside it would miss writes."""
        stays = [link for link in source.parents if not self._graph.may_move(link, keeper)]
        for link in stays:
            other = link.user
            if isinstance(other, CopyBeforeWrite) and other is not keeper:
                refusal = refuse(source, "write", shown(keeper.children["file"]), shown(link))
                self._graph.drop(keeper)
                for status in ("created", "null"):
                    self._emit_event("JOB_STATUS_CHANGE", {"id": name, "status": status})
                raise refusal
        self._graph.replace(source, keeper)

    def _copy(self, job: Job) -> None:
        try:
            _copy_all(job)
        except OSError as err:
            self._emit_event(
                "BLOCK_JOB_ERROR", {"device": job.name, "operation": "write", "action": "report"}
            )
            self._set_status(job, "aborting")
            job.error = err.strerror or str(err)
        else:
            for status in ("waiting", "pending"):
                self._set_status(job, status)
        self._conclude(job, "BLOCK_JOB_COMPLETED")

    def _conclude(self, job: Job, event: str) -> None:
        data: dict[str, object] = {"device": job.name, "type": "backup", "len": job.length_bytes}
        data |= {"offset": job.progress_bytes, "speed": 0}
        if job.error and event == "BLOCK_JOB_COMPLETED":
            data["error"] = job.error
        self._remove_filter(job)
        self._emit_event(event, data)
        self._set_status(job, "concluded")
        if job.auto_dismiss:
            self.dismiss(job)

    def _remove_filter(self, job: Job) -> None:
        """Remove the filter: its users get the node below, the source or a later job's filter."""
        for node in (job.filter, job.target):
            node.blockers.remove(BUSY)
        for link in list(job.filter.parents):
            if link not in job.links:
                self._graph.move(link, job.filter.file)
        for link in job.links:
            self._graph.unlink(link)

    def _set_status(self, job: Job, status: str) -> None:
        job.status = status
        self._emit_event("JOB_STATUS_CHANGE", {"id": job.name, "status": status})


def _copy_all(job: Job) -> None:
    offset = 0
    for length, flags in job.source.extents(0, job.source.size):
        if flags == Extent.DATA:
            for start in range(offset, offset + length, 1 << 20):
                part = min(1 << 20, offset + length - start)
                job.target.write(start, job.source.read(start, part))
        else:
            job.target.zero(offset, length)
        offset += length
    job.done_bytes = job.length_bytes
