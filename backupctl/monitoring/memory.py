# SPDX-License-Identifier: GPL-2.0-or-later
"""What is remembered of a VM from one command to the next: the last results, and the last notice.

One JSON file for each VM in a directory of ours. It is not part of the repository: a repository that cannot
be reached is what a notice is about. Nothing depends on it but metrics, notices and `check`, so a file that
cannot be read counts as a VM of which nothing is known yet.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from backupctl.errors import RepositoryUnreadable
from backupctl.monitoring.result import Kind, Result
from backupctl.system import durable, locks, safe_directory, safe_open

_MAX_BYTES = 1 << 16
_PATIENCE_SECONDS = 5.0
_SYSTEM_DIRECTORY = Path("/var/lib/backupctl")


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one command.

    ended: seconds since the epoch. reason: the code of its error, "" for none. copied_bytes, stored_bytes:
    of all disks; None if there was no point. damage: how often a verify found it. partial: a verify that did
    not read all of the VM.
    """

    command: str
    ended: float
    seconds: float
    exit_code: int
    reason: str = ""
    point: str = ""
    copied_bytes: int | None = None
    stored_bytes: int | None = None
    frozen_ms: int | None = None
    damage: int | None = None
    partial: bool = False

    @classmethod
    def of(cls, result: Result, *, partial: bool = False) -> "Record":
        """Return what is remembered of a result."""
        report = result.report or {}
        disks = report.get("disks")
        damage = report.get("damage")
        return cls(
            command=result.command,
            ended=round(result.began + result.seconds, 3),
            seconds=round(result.seconds, 3),
            exit_code=result.exit_code,
            reason=result.reason,
            point=result.point,
            copied_bytes=None if disks is None else sum(one["copied_bytes"] for one in disks),
            stored_bytes=None if disks is None else sum(one["stored_bytes"] for one in disks),
            frozen_ms=report.get("frozen_ms"),
            damage=None if damage is None else sum(one["vm"] == result.vm for one in damage),
            partial=partial,
        )


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """The last notice of a failure that has not ended. at: seconds since the epoch."""

    reason: str
    at: float


class Past(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the commands of one kind on a VM. success: the last one without an error."""

    last: Record | None = None
    success: Record | None = None
    told: Told | None = None

    def after(self, record: Record) -> "Past":
        """Return what is known after one command more."""
        if self.hides(record):
            return self
        return Past(last=record, success=self.success if record.reason else record, told=self.told)

    def hides(self, record: Record) -> bool:
        """Whether a verify that found nothing has not read what an earlier one found damaged."""
        return record.partial and not record.reason and self.last is not None and self.last.reason != ""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a VM. repository: the path of the one that all of it is about."""

    repository: str = ""
    backup: Past = Past()
    prune: Past = Past()
    verify: Past = Past()
    restore_test: Past = Past()

    def of(self, kind: Kind) -> Past:
        """Return what is known of one kind of command."""
        found: Past = getattr(self, _field(kind))
        return found

    def with_past(self, kind: Kind, past: Past) -> "Memory":
        """Return the same with something else for one kind."""
        return msgspec.structs.replace(self, **{_field(kind): past})


def _field(kind: Kind) -> str:
    return kind.replace("-", "_")


def default_directory() -> Path:
    """Return where it is kept if the configuration does not say: for root /var/lib/backupctl.

    In a unit of systemd it is the first directory of StateDirectory= (systemd.exec(5)). For others than root
    it is the directory of the XDG Base Directory Specification for a program's state.
    """
    if of_unit := os.environ.get("STATE_DIRECTORY", "").partition(":")[0]:
        return Path(of_unit)
    if os.geteuid() == 0:
        return _SYSTEM_DIRECTORY
    named = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state")
    with suppress(RuntimeError):  # there is no home
        named = named.expanduser()
    return named / "backupctl"


def read(directory: Path, vm: str, repository: str) -> Memory:
    """Return what is known of a VM; nothing if the file is missing, damaged, or of another repository."""
    empty = Memory(repository=repository)
    try:
        content = safe_open.read(_file(directory, vm), _MAX_BYTES)
        found = msgspec.json.decode(content, type=Memory)
    except (safe_open.NotThere, RepositoryUnreadable, msgspec.DecodeError, RecursionError):
        return empty
    return found if found.repository == repository else empty


def write(directory: Path, vm: str, memory: Memory) -> None:
    """Write down what is known of a VM. The caller holds its lock. Raises OSError."""
    durable.replace(_file(directory, vm), msgspec.json.encode(memory) + b"\n")


@contextmanager
def locked(directory: Path, vm: str) -> Iterator[None]:
    """Make the directory if it is missing, and keep other commands on this VM out for as long as the block.

    Raises OSError, UsageError if root must not write there.
    """
    where = safe_directory.resolve(directory)
    durable.make_directories(where)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(where / f"{vm}.lock", flags, 0o600)
    try:
        if not locks.acquire(descriptor, _PATIENCE_SECONDS):
            raise TimeoutError(None, "another command keeps it locked")
        yield
    finally:
        os.close(descriptor)


def _file(directory: Path, vm: str) -> Path:
    return directory / f"{vm}.json"
