# SPDX-License-Identifier: GPL-2.0-or-later
"""What Prometheus is told of a VM: from what is remembered, and from the repository as it is now.

Names and units follow https://prometheus.io/docs/practices/naming/. What is not known is left out.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from backupctl.errors import BackupctlError
from backupctl.monitoring.exposition import Gauge
from backupctl.monitoring.memory import Memory, Past
from backupctl.repository import summary
from backupctl.repository.summary import PointSummary
from backupctl.repository.summary_chains import Chains
from backupctl.repository.vm_directory import VmDirectory


@dataclass(frozen=True)
class Stored:
    """What the repository holds of a VM. newest: the newest point. layers: of the longest of its chains."""

    points: int
    newest: PointSummary | None = None
    layers: int | None = None


def look(directory: VmDirectory) -> Stored | None:
    """Return what the repository holds of a VM; None if it cannot be read."""
    try:
        listing = summary.look(directory)
    except BackupctlError:
        return None
    if not listing.points:
        return Stored(0)
    newest = listing.points[-1]
    return Stored(len(listing.points), newest, Chains(listing.by_id).most_layers(newest))


def gauges(vm: str, memory: Memory, repository: Path, stored: Stored | None) -> Iterator[Gauge]:
    """Yield the metrics of a VM."""
    labels = {"vm": vm, "repository": str(repository)}

    def gauge(name: str, text: str, value: float, **more: str) -> Gauge:
        return Gauge(f"backupctl_{name}", text, {**labels, **more}, value)

    yield from (gauge(*one) for one in _backups(memory.backup, stored))
    if last := memory.backup.last:
        text = "Always 1. The last full or incremental, with the code of its error as reason."
        yield gauge("last_run_info", text, 1, command=last.command, reason=last.reason)
    if stored is not None:
        yield from (gauge(*one) for one in _points(stored))
    yield from (gauge(*one) for one in _upkeep("verify", memory.verify))
    yield from (gauge(*one) for one in _upkeep("prune", memory.prune))
    yield from (gauge(*one) for one in _upkeep("restore_test", memory.restore_test))
    with suppress(OSError):
        space = os.statvfs(repository)
        yield gauge(
            "repository_free_bytes",
            "Free space of the repository's file system.",
            space.f_bavail * space.f_frsize,
        )
        yield gauge(
            "repository_size_bytes",
            "Size of the repository's file system.",
            space.f_blocks * space.f_frsize,
        )


_Sample = tuple[str, str, float]


def _backups(past: Past, stored: Stored | None) -> Iterator[_Sample]:
    success = past.success.ended if past.success else None
    if stored is not None and stored.newest is not None:
        # A run that ended after the commit with an error, or one before metrics were configured, counts too.
        success = max(success or 0.0, stored.newest.ended)
    if success is not None:
        yield "last_success_timestamp_seconds", "When the last recovery point was completed.", success
    if last := past.last:
        yield "last_run_timestamp_seconds", "When the last full or incremental ended.", last.ended
        yield "last_run_success", "Whether the last full or incremental had no error.", not last.reason
        yield "last_run_exit_code", "The exit code of the last full or incremental.", last.exit_code
        yield "last_run_duration_seconds", "How long the last full or incremental took.", last.seconds
    if made := past.success:
        yield from _made(made.copied_bytes, made.stored_bytes, made.frozen_ms)


def _made(copied: int | None, stored: int | None, frozen_ms: int | None) -> Iterator[_Sample]:
    if copied is not None:
        yield "last_success_copied_bytes", "Bytes that the last successful run read from the VM.", copied
    if stored is not None:
        yield "last_success_stored_bytes", "Bytes that the last successful run stored.", stored
    if frozen_ms is not None:
        text = "How long the last successful run kept the guest's file systems frozen."
        yield "last_success_frozen_seconds", text, frozen_ms / 1000


def _points(stored: Stored) -> Iterator[_Sample]:
    yield "points", "Number of recovery points.", stored.points
    if stored.newest is not None:
        taken = stored.newest.started
        yield "newest_point_timestamp_seconds", "The point in time of the newest recovery point.", taken
    if stored.layers is not None:
        yield "chain_layers", "Layers of the longest chain of the newest recovery point.", stored.layers


def _upkeep(kind: str, past: Past) -> Iterator[_Sample]:
    if last := past.last:
        yield f"last_{kind}_timestamp_seconds", f"When the last {kind} ended.", last.ended
        yield f"last_{kind}_success", f"Whether the last {kind} had no error.", not last.reason
        if last.damage is not None:
            yield f"last_{kind}_damage", f"How often the last {kind} found damage.", last.damage
