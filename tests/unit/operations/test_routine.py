# SPDX-License-Identifier: GPL-2.0-or-later
"""What is due for a VM, in which order it is done, and what one task's failure means for the next."""

import itertools
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backupctl.cancel import Cancellation
from backupctl.errors import (
    DamageFound,
    Failed,
    Interrupted,
    Locked,
    MonitorUnreachable,
    NeedsRecovery,
    Refused,
    RestoreTestFailed,
    VmIsOff,
)
from backupctl.events.routine import FullDue, TaskSkipped, WaitingForLock
from backupctl.names import BitmapName, DiskName, VmName
from backupctl.operations import status
from backupctl.operations.backup.outcome import RunReport
from backupctl.operations.prune.retention import Rules
from backupctl.operations.prune.run import PruneReport
from backupctl.operations.restore_test import RestoreTestReport
from backupctl.operations.routine import forecast
from backupctl.operations.routine import run as routine
from backupctl.operations.routine.policy import Policy, backup_kind, is_restore_test_due
from backupctl.operations.routine.run import Routine
from backupctl.operations.status import DiskStatus, Status
from backupctl.operations.verify.run import Damage, VerifyReport
from backupctl.options import QmpAccess, RunOptions, VmConfig
from backupctl.outcome import documents
from backupctl.progress import Silent
from backupctl.repository import tested
from backupctl.repository.repository import Repository
from backupctl.repository.tested import RestoreTests
from backupctl.system.address import Address
from tests.screens.test_screens import stored
from tests.unit.cli.test_all_vms import Points
from tests.unit.points import P1, P2, disk_entry

WEB = VmName("web")
MONTH = timedelta(days=30)
NOON = datetime(2026, 1, 10, 12, tzinfo=UTC)
ALL = Policy(None, Rules(last=1), 5.0)


def point(taken: datetime, kind: str = "full") -> Any:
    """Stand for a point, of which a policy looks at these two only."""
    return SimpleNamespace(manifest=SimpleNamespace(kind=kind, started=taken))


def test_without_a_policy_every_backup_is_an_incremental():
    assert backup_kind(WEB, [], None, NOON) == "incremental"
    assert backup_kind(WEB, [], timedelta(0), NOON) == "incremental"


def test_each_period_has_one_full_wherever_it_begins():
    """Whatever the hour of the runs: exactly one full a month, also if runs are missed."""
    for vm in (WEB, VmName("db"), VmName("shop")):
        points: list[Any] = []
        fulls = []
        for day in range(300):
            now = NOON + timedelta(days=day, minutes=day % 7)
            if day % 11 == 3:
                continue
            kind = backup_kind(vm, points, MONTH, now)
            points = [*points[-40:], point(now, kind)]
            fulls += [day] if kind == "full" else []
        assert len(fulls) in (10, 11)
        gaps = [later - before for before, later in itertools.pairwise(fulls)]
        assert all(28 <= gap <= 32 for gap in gaps[1:]), gaps


@pytest.mark.parametrize(
    ("days", "passed", "due"),
    [
        *((None, True, True), (0, True, False), (6.9, True, False), (6.98, True, True)),
        *((9, True, True), (1, False, True), (-3, True, True)),
    ],
)
def test_a_restore_test_is_due_once_in_its_time_and_after_each_failure(days, passed, due):
    tests = None
    if days is not None:
        time = f"{NOON - timedelta(days=days):%Y-%m-%dT%H:%M:%SZ}"
        tests = RestoreTests(P1, time, passed, time if passed else None)
    assert is_restore_test_due(tests, timedelta(days=7), NOON) == due


def test_not_all_vms_are_due_on_one_day():
    def first(vm: str) -> int:
        full = [point(NOON)]
        days = (NOON + timedelta(days=day) for day in range(60))
        return next(n for n, now in enumerate(days) if backup_kind(VmName(vm), full, MONTH, now) == "full")

    assert len({first(f"vm{number}") for number in range(20)}) > 5


def test_a_full_that_failed_is_tried_again_and_one_of_a_wrong_clock_does_not_count():
    late = NOON + timedelta(days=45)
    assert backup_kind(WEB, [point(NOON), point(late, "incremental")], MONTH, late) == "full"
    assert backup_kind(WEB, [point(NOON + timedelta(days=4000))], MONTH, NOON) == "full"
    assert backup_kind(WEB, [point(late)], MONTH, late) == "incremental"


class Told(Silent):
    """Keeps events."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def event(self, event: object) -> None:
        self.events.append(event)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Do a routine whose tasks end as they are told; returns what was called, and the report."""
    repository = Repository.create(tmp_path / "r")
    Points(repository).add(P1)
    taken = RunReport(WEB, P2, "incremental", P1, (disk_entry(),), None, "crash", 1.0)

    def do(policy: Policy = ALL, wait: float = 0.0, stop: Cancellation | None = None, **ends: object):
        called: list[str] = []

        def task(name: str, report: object):
            def run(*given):
                called.append(f"{name} {given[0].options.kind}" if name == "backup" else name)
                end = ends.get(name, report)
                end = end.pop(0) if isinstance(end, list) else end
                if isinstance(end, Exception):
                    raise end
                return end

            return run

        monkeypatch.setattr(routine.backup, "run", task("backup", taken))
        monkeypatch.setattr(routine.prune, "prune", task("prune", PruneReport(())))
        sound = VerifyReport((WEB,), 1, 1, 1, (), (), 1.0)
        monkeypatch.setattr(routine.verify, "verify", task("verify", sound))
        vm = VmConfig(WEB, QmpAccess(Address(path="/q")))
        asked = Routine(vm, repository, RunOptions("incremental"), policy, wait)
        told = Told()
        return called, routine.run(asked, told, stop or Cancellation()), told.events

    return do


def test_all_is_done_in_order(work):
    called, report, _ = work()
    assert called == ["backup incremental", "prune", "verify"]
    assert report.error is None
    assert [one.task for one in report.tasks] == ["backup", "prune", "verify"]


def test_without_rules_nothing_is_pruned_and_without_a_percentage_nothing_verified(work):
    called, report, _ = work(Policy())
    assert called == ["backup incremental"]
    assert ["no" in one.skipped for one in report.tasks] == [False, True, True]


def test_after_a_backup_that_failed_nothing_is_dropped_but_the_rest_is_verified(work):
    """The older points may be all that there is, and they rot while the VM is off, too."""
    for err in (MonitorUnreachable("off"), NeedsRecovery("left over"), Locked("busy")):
        called, report, _ = work(backup=err)
        assert called == ["backup incremental", "verify"]
        assert report.error is err


def test_after_a_backup_that_was_skipped_nothing_is_dropped(work):
    """Time alone must not drop the points of a VM that is off."""
    called, report, events = work(backup=VmIsOff("web is off"))
    assert called == ["backup incremental", "verify"]
    assert report.error is None
    assert [bool(one.skipped) for one in report.tasks] == [True, True, False]
    assert next(one.reason for one in events if isinstance(one, TaskSkipped)) == "web is off"


def test_after_damage_in_older_points_nothing_is_dropped(work):
    taken = RunReport(WEB, P2, "incremental", P1, (), None, "crash", 1.0, ((P1, DiskName("vda")),))
    called, report, _ = work(backup=taken)
    assert called == ["backup incremental", "verify"]
    assert isinstance(report.error, DamageFound)
    assert report.tasks[0].report is taken


def test_a_point_is_booted_when_that_is_due_whatever_became_of_the_backup(work, monkeypatch):
    booted = []

    def boot(asked, _reporter, _stop):
        booted.append(asked.point)
        error = RestoreTestFailed("no agent")
        return RestoreTestReport(WEB, P1, "agent", 9.0, "tcg", error, b"", b"")

    monkeypatch.setattr(routine.restore_test, "test", boot)
    assert [one.task for one in work()[1].tasks] == ["backup", "prune", "verify"]
    called, report, _ = work(
        replace(ALL, restore_test_every=timedelta(days=7)), backup=MonitorUnreachable("off")
    )
    assert (called, booted) == (["backup incremental", "verify"], ["latest"])
    assert report.tasks[3].task == "restore-test"
    assert isinstance(report.tasks[3].error, RestoreTestFailed)
    document = documents.routine("web", report, (), {})
    assert document["tasks"][3]["report"]["passed"] is False
    assert document["tasks"][3]["error"]["kind"] == "RestoreTestFailed"


def test_a_restore_test_that_passed_lately_is_not_repeated(work, tmp_path, monkeypatch):
    directory = Repository.open(tmp_path / "r").vm(WEB)
    tested.record(directory.path, P1, datetime.now(UTC), passed=True)
    monkeypatch.setattr(routine.restore_test, "test", None)
    _, report, _ = work(replace(ALL, restore_test_every=timedelta(days=7)))
    assert report.tasks[3].skipped == "it is not due yet"
    assert report.error is None


def test_after_a_stop_nothing_more_is_done(work):
    called, report, _ = work(backup=Interrupted("stopped by SIGTERM"))
    assert called == ["backup incremental"]
    assert isinstance(report.error, Interrupted)
    stop = Cancellation()
    stop.request("SIGTERM")
    assert work(stop=stop)[0] == []


def test_the_worst_error_decides(work):
    damage = Damage(WEB, "data", Path("/r"), "vda", "spoilt", (), ())
    found = VerifyReport((WEB,), 1, 1, 1, (damage,), (), 1.0)
    assert work(prune=Failed("full"), verify=found)[1].error.exit_code == 4
    assert work(backup=NeedsRecovery("x"), verify=found)[1].error.exit_code == 3
    assert work(prune=PruneReport((), damage=("spoilt",)))[1].error.exit_code == 4


def test_a_full_that_is_due_is_taken_and_told(work):
    called, _, events = work(replace(ALL, full_every=MONTH))  # the only point is of long ago
    assert called[0] == "backup full"
    assert FullDue(WEB) in events


def test_a_vm_without_points_has_a_full_by_itself(work, tmp_path):
    """An incremental creates no repository, and knows what to do in an empty one."""
    for path in (tmp_path / "r" / "web" / P1).iterdir():
        path.unlink()
    (tmp_path / "r" / "web" / P1).rmdir()
    called, report, _ = work(replace(ALL, full_every=MONTH))
    assert called == ["backup incremental", "prune"]
    assert "no recovery points" in report.tasks[2].skipped


def test_a_lock_is_waited_for_as_long_as_was_said(work, tmp_path, monkeypatch):
    monkeypatch.setattr(routine, "_LOOK_SECONDS", 0.02)
    directory = Repository.open(tmp_path / "r").vm(WEB)
    holding, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with directory.lock():
            holding.set()
            leave.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    holding.wait(60)
    threading.Timer(0.3, leave.set).start()
    begun = time.monotonic()
    taken = RunReport(WEB, P2, "incremental", P1, (), None, "crash", 1.0)
    called, report, events = work(wait=30.0, backup=[Locked("busy"), taken])
    other.join()
    assert called == ["backup incremental", "backup incremental", "prune", "verify"]
    assert time.monotonic() - begun > 0.2
    assert report.error is None
    assert sum(isinstance(one, WaitingForLock) for one in events) == 1


def test_nobody_waits_longer_than_was_said(work, monkeypatch):
    monkeypatch.setattr(routine, "_LOOK_SECONDS", 0.02)
    called, report, _ = work(wait=0.0, backup=Locked("busy"))
    assert (called[0], type(report.error)) == ("backup incremental", Locked)
    assert called.count("backup incremental") == 1


def foresee(monkeypatch, tmp_path, found: Status, policy: Policy = ALL):
    repository = Repository.open(tmp_path / "r")
    monkeypatch.setattr(status, "look", lambda *_: found)
    vm = VmConfig(WEB, QmpAccess(Address(path="/q")))
    return forecast.look(Routine(vm, repository, RunOptions("incremental"), policy))


def disk(name: str, how: str, bitmap: str | None = None) -> DiskStatus:
    return DiskStatus(DiskName(name), "node", 1 << 30, bitmap, "recording", how, "")


def test_what_would_be_stored_is_told_by_the_bitmaps(work, monkeypatch, tmp_path):
    work()
    name = BitmapName(f"backupctl-1-{P1}-vda")
    bitmap = replace(stored(name, "live", ""), node="node", dirty_bytes=65536)
    disks = (disk("vda", "incremental", name), disk("vdb", "scan"))
    found = Status(WEB, (P1,), (), "10.0", "", disks, (), "", bitmaps=(bitmap,))
    seen = foresee(monkeypatch, tmp_path, found)
    assert [(one.how, one.most_bytes) for one in seen.disks] == [("incremental", 65536), ("scan", 1 << 30)]
    assert (seen.kind, seen.dropped) == ("incremental", (P1,))  # keep_last = 1, and one more is coming
    seen = foresee(monkeypatch, tmp_path, found, Policy(MONTH))
    assert (seen.kind, seen.dropped, seen.most_bytes) == ("full", None, 2 << 30)


def test_a_restore_test_is_foretold_if_it_is_due(work, monkeypatch, tmp_path):
    work()
    found = Status(WEB, (P1,), (), "10.0", "", (disk("vda", "scan"),), (), "")
    assert foresee(monkeypatch, tmp_path, found).restore_test_due is None
    tests_it = replace(ALL, restore_test_every=MONTH)
    assert foresee(monkeypatch, tmp_path, found, tests_it).restore_test_due is True
    directory = Repository.open(tmp_path / "r").vm(WEB).path
    tested.record(directory, P1, datetime.now(UTC), passed=True)
    assert foresee(monkeypatch, tmp_path, found, tests_it).restore_test_due is False
    tested.record(directory, P1, datetime.now(UTC), passed=False)
    assert foresee(monkeypatch, tmp_path, found, tests_it).restore_test_due is True


def test_a_run_that_would_fail_is_foretold_as_failing(work, monkeypatch, tmp_path):
    work()
    off = Status(WEB, (P1,), (), None, "no monitor", (), (), "")
    for found, error in ((off, Failed), (replace(off, qemu="10.0", refusal="busy"), Refused)):
        with pytest.raises(error):
            foresee(monkeypatch, tmp_path, found)
    with Repository.open(tmp_path / "r").vm(WEB).lock(), pytest.raises(Locked):
        foresee(monkeypatch, tmp_path, off)
