# SPDX-License-Identifier: GPL-2.0-or-later
"""How far all disks are together, at which rate, and when they end."""

import pytest

from backupctl.cancel import Cancellation
from backupctl.cli.output import progress_text
from backupctl.names import DiskName
from backupctl.operations.backup.disk import DiskProgress
from backupctl.operations.restore import whole
from backupctl.operations.restore.request import RestoreRequest
from backupctl.progress import Overall, Silent
from tests.unit.points import P1, disk_entry

VDA, VDB, VDC = (DiskName(name) for name in ("vda", "vdb", "vdc"))
MIB = 1 << 20


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Told(Silent):
    def __init__(self) -> None:
        self.parts: dict[str, tuple[int, int]] = {}

    def progress(self, label: str, done_bytes: int, total_bytes: int) -> None:
        self.parts[label] = (done_bytes, total_bytes)


def test_the_time_left_is_that_of_all_disks():
    clock = Clock()
    overall = Overall(clock)
    assert (overall.rate, overall.left_seconds) == (None, None)
    for second in range(11):
        clock.now = second
        overall.note("vda", second * MIB, 10 * MIB)
        overall.note("vdb", second * MIB, 50 * MIB)
    assert (overall.done_bytes, overall.total_bytes) == (20 * MIB, 60 * MIB)
    assert overall.rate == pytest.approx(2 * MIB, rel=0.1)
    assert overall.left_seconds == pytest.approx(20, rel=0.1)
    assert progress_text(overall).startswith("2 disks: 33 % of 60.0 MiB, ")
    overall.step()
    assert overall.labels == ("vda", "vdb")  # vdb is not at its end: the next step is of the same restore
    overall.note("vdb", 50 * MIB, 50 * MIB)
    overall.step()
    assert (overall.labels, overall.left_seconds) == ((), None)


def test_a_label_that_begins_anew_begins_a_new_count():
    overall = Overall(Clock())
    overall.note("vda", 10, 10)
    overall.note("vda", 2, 40)
    assert (overall.done_bytes, overall.total_bytes) == (2, 40)


def test_a_restore_tells_of_all_disks_before_it_begins_with_the_first(builder, tmp_path):
    builder.point(P1, (disk_entry("vda"), [(0, b"x")]), (disk_entry("vdb"), [(0, b"y")]))
    told: list[tuple[str, int]] = []

    class Noting(Silent):
        def progress(self, label: str, done_bytes: int, _total_bytes: int) -> None:
            told.append((label, done_bytes))

    wanted = RestoreRequest(directory=builder.directory, point=P1, to=f"{tmp_path}/restored/")
    whole.restore(wanted, Noting(), Cancellation())
    assert told[:2] == [("vda", 0), ("vdb", 0)]


def test_the_rate_is_that_of_the_last_half_minute():
    clock = Clock()
    overall = Overall(clock)
    for second in range(200):
        clock.now = second
        overall.note("vda", min(second, 100) * 10 * MIB + max(0, second - 100) * MIB, 5000 * MIB)
    assert overall.rate == pytest.approx(MIB, rel=0.1)


def test_a_disk_whose_copy_is_not_begun_counts_for_as_much_as_the_others():
    told = Told()
    progress = DiskProgress(told, {VDA: 100, VDB: 300, VDC: 1000})
    progress.report()
    assert told.parts == {}  # nothing is known yet
    progress.note(VDA, 5, 50)
    progress.note(VDB, 0, 50)
    progress.report()
    assert told.parts == {VDA: (5, 50), VDB: (0, 50), VDC: (0, 250)}
    progress.note(VDC, 1, 20)
    progress.report()
    assert told.parts[VDC] == (1, 20)
