# SPDX-License-Identifier: GPL-2.0-or-later
"""Every screen is as it is kept in `golden/`. After a change: `make screens`, then read the difference."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import click
import pytest

from backupctl.cli import check, times, units
from backupctl.cli.main import cli
from backupctl.errors import (
    AgentUnavailable,
    BackupctlError,
    DamageFound,
    Locked,
    MonitorUnreachable,
    NeedsRecovery,
    RestoreTestFailed,
    WriteFailed,
)
from backupctl.events import StepStarted
from backupctl.events.backup import CrashConsistent, DiskSkipped, RecoveredFromEarlierRun
from backupctl.names import BitmapName, DiskName, NodeName, VmName
from backupctl.operations import bitmaps, discover, restore_test, status, usage
from backupctl.operations import recover as recovery
from backupctl.operations.backup import run as backup
from backupctl.operations.backup.outcome import RunReport
from backupctl.operations.backup.plan import MissingDisk
from backupctl.operations.bitmaps import Removal, StoredBitmap
from backupctl.operations.discover import FoundDomain
from backupctl.operations.doctor import run as doctor
from backupctl.operations.doctor.run import Diagnosis, Finding
from backupctl.operations.fleet import run as fleet
from backupctl.operations.fleet.run import JobResult
from backupctl.operations.prune.run import PruneReport
from backupctl.operations.recover import Recovered
from backupctl.operations.restore_test import RestoreTestReport
from backupctl.operations.routine import forecast
from backupctl.operations.routine import run as routine
from backupctl.operations.routine.forecast import DiskForecast, Forecast
from backupctl.operations.routine.run import RoutineReport, TaskResult
from backupctl.operations.running import Running
from backupctl.operations.status import DiskStatus, Status
from backupctl.operations.verify import run as verify
from backupctl.operations.verify.layer import VerifyScope
from backupctl.operations.verify.run import VerifyReport
from backupctl.outcome import documents
from backupctl.repository.activity import DiskActivity
from backupctl.repository.repository import Repository
from tests.screens.terminal import every_look, look_at
from tests.unit.points import P1, P2, P3, Builder, disk_entry

SHOWN = "/backups/machine"  # as long as what stands there
GOLDEN = Path(__file__).parent / "golden"
RENEW = bool(os.environ.get("BACKUPCTL_RENEW_SCREENS"))
COMMANDS = sorted(cli.list_commands(click.Context(cli)))
IN = ("--repository", "repository")
VM = ("--qmp", "unix:web.qmp", "--agent", "unix:web.agent", *IN)
SIZE = 40 * 65536 + 512
LONG = "the agent of a virtual machine whose name is long did not answer in five seconds, as it should have"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Give a directory whose path is always as long: where lines are wrapped depends on it."""
    with tempfile.TemporaryDirectory(prefix="bs-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Compare a screen with the one that is kept. What takes no ten minutes takes half a second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(times, "now", lambda: datetime(2026, 1, 10, 12, tzinfo=UTC))
    monkeypatch.setattr(times, "local", lambda time, *, utc=False, real=times.local: real(time, utc=True))
    monkeypatch.setattr(usage, "tree_bytes", size_on_any_file_system)
    monkeypatch.setattr(
        units, "duration", lambda seconds, real=units.duration: real(seconds if seconds > 600 else 0.5)
    )
    monkeypatch.setattr(
        verify, "verify", lambda *given, real=verify.verify: replace(real(*given), seconds=0.5)
    )

    def show(name: str, *arguments: str) -> None:
        path = GOLDEN / f"{name}.txt"
        seen = every_look(lambda look: look_at(arguments, look, monkeypatch).replace(str(tmp_path), SHOWN))
        seen = f"SPDX-License-Identifier: GPL-2.0-or-later\n$ backupctl {' '.join(arguments)}\n\n{seen}"
        if RENEW:
            path.write_text(seen)
        assert seen == path.read_text()

    return show


def size_on_any_file_system(path: Path) -> int:
    """Stand for the allocated bytes, which depend on the file system."""
    sizes = {".qcow2": 5 << 17, ".digests": 4096, "": 3 << 19}
    return sizes.get(path.suffix, 4096) * (4 if path.name == "vm1" else 1)


def points(tmp_path: Path) -> Builder:
    """Make a repository with a full and two incrementals of one VM."""
    builder = Builder(Repository.create(tmp_path / "repository"))
    entry = disk_entry(size=SIZE)
    builder.point(P1, (entry, [(0, b"a" * 300_000)]), (disk_entry("vdb"), [(0, b"b" * 65536)]))
    builder.point(
        P2, (replace(entry, kind="incremental", parent=P1), [(65536, b"c" * 65536), (SIZE - 512, b"t" * 512)])
    )
    scanned = replace(
        entry,
        kind="incremental",
        parent=P2,
        scanned=True,
        reason="its bitmap is inconsistent: QEMU did not close the image (it crashed, or was killed)",
    )
    builder.point(P3, (scanned, [(131072, b"d" * 65536)]))
    return builder


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(show, name):
    show(f"help-{name}", name, "--help")


def test_help_of_all(show):
    show("help", "--help")


def test_no_points(show, tmp_path):
    Repository.create(tmp_path / "repository")
    show("list-empty", "list", *IN)


def test_points(show, tmp_path):
    points(tmp_path)
    show("list", "list", *IN)
    show("show", "show", "vm1", P3, *IN)
    show("diff", "diff", "vm1", P1, P3, *IN)
    show("verify", "verify", "vm1", *IN)
    show("du", "du", "vm1", *IN)
    show("prune-dry-run", "prune", "vm1", "--keep-last", "1", "--dry-run", *IN)
    show("protect", "protect", "vm1", "latest", *IN)
    show("unprotect", "unprotect", "vm1", "latest", *IN)
    show("restore", "restore", "vm1", P1, "--to", "vda.raw", "--disk", "vda", "--force", *IN)
    show("restore-exists", "restore", "vm1", P1, "--to", "vda.raw", "--disk", "vda", *IN)
    show("delete-dry-run", "delete", "vm1", P2, "--dry-run", *IN)
    show("delete-refused", "delete", "vm1", P1[:8], P3, *IN)
    show("rename-dry-run", "rename", "vm1", "vm2", "--dry-run", *IN)
    show("remove-dry-run", "remove", "vm1", "--dry-run", *IN)
    show("remove-refused", "remove", "vm1", *IN)
    show("ambiguous-point", "show", "vm1", "2026", *IN)
    show("no-such-point", "show", "vm1", "20270101T000000Z", *IN)


def test_damage(show, tmp_path):
    builder = points(tmp_path)
    image = builder.directory.path / P1 / "vda.qcow2"
    content = image.read_bytes()
    image.write_bytes(content.replace(b"a" * 65536, b"a" * 65535 + b"x", 1))
    (builder.directory.path / P2 / "manifest.json").write_text("{}")
    show("verify-damage", "verify", "vm1", *IN)
    show("list-damage", "list", *IN)


def test_wrong_use(show, tmp_path):
    show("no-repository", "list", *IN)
    show("unknown-command", "ful", "web")
    show("unknown-option", "full", "web", "--nonsense")
    show("missing-name", "full")
    Repository.create(tmp_path / "repository")
    show("wrong-rate", "full", "web", "--limit", "fast", *VM)


def test_configuration(show, tmp_path):
    (tmp_path / "right.toml").write_text(
        '[defaults]\nrepository = "/backup"\n[vm.web]\nqmp = "unix:/run/web.qmp"\nlimit = "200M"\n'
    )
    (tmp_path / "wrong.toml").write_text('[defaults]\nlimt = "200M"\n[vm.web]\nkeep_daily = "14"\n')
    show("config-show", "config", "show", "web", "--view", "auto", "--config", "right.toml")
    show("config-check", "config", "check", "--config", "right.toml")
    show("config-check-wrong", "config", "check", "--config", "wrong.toml")
    show("wrong-configuration", "list", "--config", "wrong.toml")
    show("install-timers", "install-timers", "--root", "root", "--dry-run", "--config", "right.toml")
    show("vm-not-configured", "full", "wbe", "--config", "right.toml")
    show("help-config-check", "config", "check", "--help")
    show("help-config-show", "config", "show", "--help")


def report(kind: str) -> RunReport:
    parent = P1 if kind == "incremental" else None
    disk = replace(
        disk_entry("vda", size=1 << 34),
        dirty_bytes=1 << 33,
        copied_bytes=1 << 33,
        zero_bytes=1 << 20,
        stored_bytes=1 << 33,
    )
    second = replace(disk, name=DiskName("virtio-disk1"), kind="incremental", scanned=True)
    return RunReport(
        VmName("web"),
        P2,
        kind,
        parent,
        (disk, second),
        62,
        "filesystem",
        3725.0,  # type: ignore[arg-type]
    )


def fake_run(ctx):
    """Tell what a run tells."""
    reporter, options = ctx.reporter, ctx.options
    for step in ("prepare", "attach", "freeze", "transaction", "export", "copy"):
        reporter.event(StepStarted(step))
    reporter.event(
        DiskSkipped("cdrom0", "a read-only medium, which holds nothing that the guest could change")
    )
    reporter.event(CrashConsistent(LONG))
    reporter.progress(DiskName("vda"), 1 << 30, 1 << 30)
    return report(options.kind)


@pytest.mark.parametrize("kind", ["full", "incremental"])
def test_a_run(show, monkeypatch, tmp_path, kind):
    Repository.create(tmp_path / "repository")
    monkeypatch.setattr(backup, "run", fake_run)
    show(kind, kind, "web", *VM)
    show(f"{kind}-quiet", kind, "web", "--quiet", *VM)
    show(f"{kind}-json", kind, "web", "--json", *VM)


FAILURES = {
    "needs-recovery": NeedsRecovery(
        f"no answer to block-job-cancel: {LONG}",
        step="roll back",
        state="what this run put into the VM may still be there; no committed point is lost",
        next_command="backupctl recover web",
    ),
    "locked": Locked("another run holds the lock of web", next_command="backupctl status web"),
    "write-failed": WriteFailed(
        "vda can't be written: No space left on device",
        step="copy",
        state="rolled back: nothing is lost, nothing of this run is left, the guest goes on",
        hint="make room in the repository, or prune older points",
        next_command="backupctl full web",
    ),
    "agent-unavailable": AgentUnavailable(LONG, step="freeze", next_command="backupctl doctor web"),
    "monitor-unreachable": MonitorUnreachable("no monitor at unix:web.qmp: No such file or directory"),
    "damage-found": DamageFound("vda\x1b[2J is damaged", next_command="backupctl verify web"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure(show, monkeypatch, tmp_path, name):
    def fail(*_arguments: object) -> BackupctlError:
        error = FAILURES[name]
        kept = error.next_command
        monkeypatch.setattr(error, "next_command", kept)
        raise error

    Repository.create(tmp_path / "repository")
    monkeypatch.setattr(backup, "run", fail)
    show(f"error-{name}", "full", "web", *VM)


def test_recover(show, monkeypatch, tmp_path):
    Repository.create(tmp_path / "repository")

    def recover(_vm, _repository, reporter, *_more):
        reporter.event(RecoveredFromEarlierRun("thawed the guest's file systems"))
        return Recovered(("thawed the guest's file systems",))

    monkeypatch.setattr(recovery, "recover", recover)
    show("recover", "recover", "web", *VM)
    monkeypatch.setattr(recovery, "recover", lambda *_: Recovered(()))
    show("recover-nothing", "recover", "web", *VM)


def test_doctor(show, monkeypatch):
    findings = (
        Finding("monitor", "ok", "QEMU 10.0.2 answers at unix:web.qmp"),
        Finding("agent", "warning", LONG, "is qemu-guest-agent at work in the guest?"),
        Finding("repository", "bad", "/backup/of/a/very/long/path/that/can/not/be/broken/anywhere is full"),
    )
    monkeypatch.setattr(doctor, "examine", lambda *_a, **_k: Diagnosis(VmName("web"), findings))
    show("doctor-bad", "doctor", "web", *VM)
    monkeypatch.setattr(doctor, "examine", lambda *_a, **_k: Diagnosis(VmName("web"), findings[:2]))
    show("doctor", "doctor", "web", *VM)


def stored(name: str, use: str, why: str) -> StoredBitmap:
    return StoredBitmap(
        name=BitmapName(name),
        node=NodeName("drive-vda"),
        disk="vda",
        point=P1,
        repository="0123abcd",
        known=use != "orphan",
        this_repository=use != "orphan",
        granularity=65536,
        dirty_bytes=3 << 20,
        state="recording",
        busy=False,
        persistent=True,
        read_only=False,
        use=use,  # type: ignore[arg-type]
        why=why,
    )


BITMAPS = (
    stored(f"backupctl-0123abcd-{P2}-vda", "live", "the next incremental builds on it"),
    stored(f"backupctl-89abcdef-{P1}-vda", "orphan", "made by no repository that is known; nothing needs it"),
)


def test_status(show, monkeypatch, tmp_path):
    Repository.create(tmp_path / "repository")
    disk = DiskStatus(
        name=DiskName("vda"),
        node="drive-vda",
        size=1 << 34,
        bitmap=BITMAPS[0].name,
        bitmap_state="recording",
        next="scan",
        reason="its bitmap is inconsistent (QEMU did not end cleanly)",
    )
    found = Status(
        vm=VmName("web"),
        points=(P1, P2),
        damaged=(f"{P1}: vda can't be restored any more: repository/web/{P1}/vda.qcow2 is missing",),
        qemu="10.0.2",
        problem="",
        disks=(disk,),
        leftovers=(f"to clean up: unfinished bitmap backupctl-0123abcd-{P3}-vda on drive-vda",),
        next_run=f"first finishes or rolls back what an earlier run left, then builds on {P2}",
        missing_disks=(MissingDisk(DiskName("vdb"), P1),),
        bitmaps=BITMAPS,
    )
    monkeypatch.setattr(status, "look", lambda *_: found)
    show("status", "status", "web", *VM)
    monkeypatch.setattr(
        status, "look", lambda *_: replace(found, damaged=(), leftovers=(), bitmaps=(), gone=(P3,))
    )
    show("status-gone", "status", "web", *VM)
    monkeypatch.setattr(status, "look", lambda *_: RUNNING)
    show("status-running", "status", "web", *VM)
    empty = Status(
        VmName("web"),
        (),
        (),
        None,
        LONG,
        (),
        (),
        "fails while the VM cannot be reached; check with `backupctl doctor web`",
    )
    monkeypatch.setattr(status, "look", lambda *_: empty)
    show("status-off", "status", "web", *VM)


RUNNING = Status(
    VmName("web"),
    (P1,),
    (),
    None,
    "another run (process 4711) is working on web in this repository",
    (),
    (),
    "waits for a few seconds, then exits with code 75",
    running=Running(
        command="incremental",
        pid=4711,
        point=P2,
        step="copy",
        number=7,
        steps=10,
        description="copying",
        started="2026-01-02T00:00:00Z",
        updated="2026-01-02T00:20:00Z",
        elapsed_seconds=1200,
        disks=(
            DiskActivity(DiskName("vda"), 3 << 30, 4 << 30, estimated=False),
            DiskActivity(DiskName("vdb"), 0, 1 << 30, estimated=True),
        ),
        done_bytes=3 << 30,
        total_bytes=5 << 30,
        estimated=True,
        rate_bytes=100 << 20,
        left_seconds=660,
    ),
)


def test_bitmaps(show, monkeypatch, tmp_path):
    Repository.create(tmp_path / "repository")
    monkeypatch.setattr(bitmaps, "look", lambda *_: BITMAPS)
    show("bitmaps", "bitmaps", "web", *VM)
    monkeypatch.setattr(bitmaps, "remove", lambda *_, dry_run: Removal(VmName("web"), BITMAPS[1:]))
    show("bitmaps-remove", "bitmaps", "web", "--remove", BITMAPS[1].name, *VM)


class Tenth(datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 10, 12, tzinfo=tz)


def test_check(show, monkeypatch, tmp_path):
    monkeypatch.setattr(check, "datetime", Tenth)
    builder = points(tmp_path)
    show("check", "check", "vm1", "--max-age", "10y", *IN)
    (builder.directory.path / P2 / "manifest.json").write_text("{}")
    show("check-critical", "check", *IN)


def test_nothing_to_verify(show, tmp_path):
    Repository.create(tmp_path / "repository")
    show("verify-nothing", "verify", *IN)
    show("verify-unknown", "verify", "vm1", *IN)


def test_other_restores(show, tmp_path):
    points(tmp_path)
    show("restore-thin", "restore", "vm1", P1, "--to", "thin/", "--thin", "--force", *IN)
    (tmp_path / "vda.img").touch()
    changed = ("--disk", "vda", "--only-changed", "--format", "raw")
    show("restore-only-changed", "restore", "vm1", P1, "--to", "vda.img", *changed, *IN)
    show("restore-no-directory", "restore", "vm1", "--to", "none/at/all/", *IN)
    show("restore-other-suffix", "restore", "vm1", "--to", "vda.vmdk", "--disk", "vda", *IN)


def test_a_restore_test(show, monkeypatch, tmp_path):
    points(tmp_path)
    passed = RestoreTestReport(VmName("vm1"), P3, "login", 12.0, "kvm", None, b"", b"")
    monkeypatch.setattr(restore_test, "test", lambda *_: passed)
    show("restore-test", "restore-test", "vm1", *IN)
    error = RestoreTestFailed(f"vm1 {P3} did not boot: {LONG}", hint="look at the console and a screenshot")
    monkeypatch.setattr(restore_test, "test", lambda *_: replace(passed, error=error))
    show("restore-test-failed", "restore-test", "vm1", *IN)


def test_discover(show, monkeypatch):
    found = (FoundDomain("web", True, ("web", "web2")), FoundDomain("old db\x1b[2J", False, ()))
    monkeypatch.setattr(discover, "discover", lambda *_: found)
    show("discover", "discover")


def test_drills(show):
    show("drill-list", "drill", "--list")


WITHOUT_A_SCREEN = {
    *("demo", "drill", "simulate"),  # tables of `rich`, and times
    *("files", "mount", "umount", "serve", "report"),  # addresses and directories that are new each time
    "version",  # of what is installed
}


def test_every_command_has_a_screen_beside_its_help():
    text = Path(__file__).read_text()
    shown = {name for name in COMMANDS if re.search(rf'show\(\s*[^,]+, "{name}"', text)}
    assert set(COMMANDS) - shown - WITHOUT_A_SCREEN == set()


def test_every_screen_that_is_kept_is_shown():
    """A screen that no test shows any more is not kept."""
    text = Path(__file__).read_text()
    kept = {path.stem for path in GOLDEN.glob("*.txt")}
    helps = {"help", *(f"help-{name}" for name in COMMANDS)}
    runs = {f"{kind}{way}" for kind in ("full", "incremental") for way in ("", "-quiet", "-json")}
    failures = {f"error-{name}" for name in FAILURES}
    assert {name for name in kept - helps - runs - failures if f'show("{name}"' not in text} == set()
    assert RENEW or kept >= helps | runs | failures


RUN_CONFIGURATION = """
[defaults]
repository = "repository"
keep_daily = 14
verify_percent = 5
[run]
jobs = 2
[vm.web]
qmp = "unix:/run/web.qmp"
[vm.db]
qmp = "unix:/run/db.qmp"
[vm.shop]
qmp = "unix:/run/shop.qmp"
[vm.mail]
qmp = "unix:/run/mail.qmp"
"""


def routine_report(_asked=None, reporter=None, _stop=None) -> RoutineReport:
    """Return what a run of one VM comes to; tell what it tells."""
    if reporter:
        reporter.event(StepStarted("copy"))
        reporter.event(CrashConsistent("no agent is configured"))
    taken = TaskResult("backup", report("incremental"))
    pruned = TaskResult("prune", PruneReport((), (P1,)))
    verified = TaskResult("verify", VerifyReport((VmName("web"),), 3, 3, 1 << 30, (), (), 1.0), scope=SCOPE)
    return RoutineReport((taken, pruned, verified), 12.0)


SCOPE = VerifyScope(percent=5.0, seed=7)


def job_result(vm: str, found: RoutineReport) -> JobResult:
    one = documents.routine(vm, found, (), {})
    return JobResult(VmName(vm), 0, json.dumps({"vms": [one]}).encode(), 12.0)


def fake_fleet(jobs, _limits, _patience, watcher, _stop) -> list[JobResult]:
    """Work on four VMs: one is well, one is locked, one finds damage, one is killed."""
    well = routine_report()
    damage = replace(well.tasks[2], error=FAILURES["damage-found"])
    locked = TaskResult("backup", error=FAILURES["locked"])
    skipped = TaskResult("prune", skipped="the backup failed, or found damage")
    results = [
        job_result("web", well),
        job_result("db", RoutineReport((locked, skipped), 4.0)),
        job_result("shop", RoutineReport((*well.tasks[:2], damage), 9.0)),
        JobResult(VmName("mail"), -9, b"", 3.0),
    ]
    for job, result in zip(jobs, results, strict=True):
        watcher.started(job)
        watcher.line(job.vm, json.dumps({"backupctl": {"severity": "step", "text": "attach"}}))
        watcher.line(job.vm, json.dumps({"backupctl": {"severity": "warning", "text": LONG}}))
        watcher.ended(result)
    return results


@pytest.fixture
def configured(tmp_path, monkeypatch):
    Repository.create(tmp_path / "repository")
    text = RUN_CONFIGURATION.replace('"repository"', f'"{tmp_path}/repository"')
    (tmp_path / "run.toml").write_text(text)
    monkeypatch.setattr(routine, "run", routine_report)
    monkeypatch.setattr(fleet, "run", fake_fleet)
    monkeypatch.setattr(
        documents,
        "routines",
        lambda vms, _seconds, code, *, dry_run, real=documents.routines: real(
            vms, 0.5, code, dry_run=dry_run
        ),
    )


def test_a_run_of_what_is_due(show, configured):
    show("run", "run", "web", "--config", "run.toml")
    show("run-json", "run", "web", "--config", "run.toml", "--json")
    show("run-all", "run", "--all", "--config", "run.toml")
    show("run-all-quiet", "run", "--all", "--config", "run.toml", "--quiet")
    show("run-no-name", "run", "--config", "run.toml")
    show("run-no-match", "run", "x*", "--config", "run.toml")


def test_what_a_run_would_do(show, configured, monkeypatch):
    disks = (
        DiskForecast(DiskName("vda"), "incremental", "", 3 << 20),
        DiskForecast(DiskName("vdb"), "scan", "its bitmap is gone", 1 << 34),
    )
    found = Forecast("incremental", False, disks, (P1,), 5.0)
    monkeypatch.setattr(forecast, "look", lambda *_: found)
    show("run-dry-run", "run", "web", "--dry-run", "--config", "run.toml")
    monkeypatch.setattr(forecast, "look", lambda *_: replace(found, restore_test_due=True))
    show("run-dry-run-restore-test", "run", "web", "--dry-run", "--config", "run.toml")


def test_each_of_several_vms(show, configured, monkeypatch):
    monkeypatch.setattr(backup, "run", fake_run)
    show("incremental-several", "incremental", "web", "db", "--config", "run.toml")
