# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run is doing, in the file of its lock: read only while the lock is held, and never half."""

import os
import subprocess
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from backupctl.errors import Locked
from backupctl.names import DiskName
from backupctl.operations import running
from backupctl.operations.backup.activity_log import ActivityLog
from backupctl.progress import Overall
from backupctl.repository import activity
from backupctl.repository.activity import Activity, DiskActivity
from tests.unit.points import P1

VDA, VDB = DiskName("vda"), DiskName("vdb")
STARTED = "2026-01-01T00:00:00Z"
ONE = Activity("full", os.getpid(), "copy", P1, STARTED, STARTED, (DiskActivity(VDA, 1, 2, True),), 1, 2)


def test_it_is_read_while_the_lock_is_held_and_not_afterwards(builder):
    with builder.directory.lock() as lock:
        assert activity.read(builder.directory) is None  # it does not tell yet
        activity.write(lock, ONE)
        assert activity.read(builder.directory) == ONE
        activity.write(lock, short := replace(ONE, disks=()))
        assert activity.read(builder.directory) == short
        with pytest.raises(Locked, match=f"process {os.getpid()}"), builder.directory.lock(0):
            pass
    assert activity.read(builder.directory) is None
    with builder.directory.lock():
        assert activity.read(builder.directory) is None  # of the run before


def test_a_guard_that_holds_the_lock_of_a_killed_run_is_not_a_run(builder):
    gone = subprocess.Popen(["true"])
    gone.wait()
    with builder.directory.lock() as lock:
        activity.write(lock, replace(ONE, pid=gone.pid))
        assert activity.read(builder.directory) is None


@pytest.mark.parametrize("spoil", ["cut", "changed", "other", "huge", "link"])
def test_what_was_not_written_whole_is_not_read(builder, spoil, monkeypatch, tmp_path):
    monkeypatch.setattr(activity, "_PAUSE_SECONDS", 0)
    path = builder.directory.path / "lock"
    with builder.directory.lock() as lock:
        activity.write(lock, ONE)
        content = path.read_bytes()
        if spoil == "link":
            path.rename(tmp_path / "lock")
            path.symlink_to(tmp_path / "lock")
        else:
            path.write_bytes(
                {
                    "cut": content[:-20],
                    "changed": content.replace(b'"copy"', b'"cope"'),
                    "other": content.replace(str(os.getpid()).encode(), b"1", 1),
                    "huge": content + b" " * activity.MAX_BYTES,
                }[spoil]
            )
        assert activity.read(builder.directory) is None


def test_a_full_disk_does_not_stop_the_run(builder, monkeypatch):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    with builder.directory.lock() as lock:
        monkeypatch.setattr(os, "pwrite", full)
        activity.write(lock, ONE)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_is_written_twice_a_second_at_most_and_each_step_at_once(builder, monkeypatch):
    clock, written = Clock(), []
    monkeypatch.setattr(activity, "write", lambda _lock, one: written.append(one))
    log = ActivityLog(0, "full", lambda: datetime(2026, 1, 1, tzinfo=UTC), clock)
    for name in ("prepare", "attach"):
        log.step(name, None)
    log.step("copy", P1)
    overall = Overall(clock)
    for tenth in range(1, 21):
        clock.now = tenth / 10
        overall.note("vda", int(clock.now * 1000), 10_000)
        log.progress({VDA: (int(clock.now * 1000), 10_000, False)}, overall)
    assert [one.step for one in written] == ["prepare", "attach", "copy", *["copy"] * 4]
    assert (written[-1].point, written[-1].total_bytes, written[-1].done_bytes) == (P1, 10_000, 2000)
    assert written[-1].rate_bytes == pytest.approx(1000, rel=0.1)
    assert written[-1].left_seconds == pytest.approx(8, abs=1)


def test_a_running_backup_is_told_in_words(builder):
    with builder.directory.lock() as lock:
        activity.write(lock, ONE)
        found = running.running(builder.directory, datetime(2026, 1, 1, 0, 1, 5, tzinfo=UTC))
    assert (found.number, found.steps, found.description, found.elapsed_seconds) == (7, 10, "copying", 65)
    assert running.running(builder.directory) is None
