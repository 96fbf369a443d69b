# SPDX-License-Identifier: GPL-2.0-or-later
"""A process for each of several VMs: how many at once, and however one ends, the others go on."""

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from backupctl.cancel import Cancellation
from backupctl.names import VmName
from backupctl.operations.fleet import run as fleet
from backupctl.operations.fleet.limits import Job, Limits, next_job
from backupctl.operations.fleet.run import JobResult, Patience
from backupctl.system import mounts
from tests.conftest import ROOT

MANY = Limits(8, 8)


def job(vm: str, script: str = "", *, storage: str = "8:1", monitor: str = "", host: str = "") -> Job:
    return Job(VmName(vm), ("sh", "-c", script), storage, monitor or vm, host)


@dataclass
class Seen:
    """A watcher that notes what it is told. most: how many were running at once."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    most: int = 0
    stop_at_line: Cancellation | None = None

    def started(self, job: Job) -> None:
        self.running.add(job.vm)
        self.most = max(self.most, len(self.running))

    def line(self, vm: VmName, line: str) -> None:
        self.lines.append((vm, line))
        if self.stop_at_line:
            self.stop_at_line.request("SIGTERM")

    def ended(self, result: JobResult) -> None:
        self.running.discard(result.vm)


def do(*jobs: Job, limits: Limits = MANY, patience: Patience | None = None, seen: Seen | None = None):
    seen = seen or Seen()
    stop = seen.stop_at_line or Cancellation()
    return {one.vm: one for one in fleet.run(jobs, limits, patience or Patience(), seen, stop)}, seen


def test_the_first_that_may_start_does():
    web, shop, db = job("web"), job("shop"), job("db", storage="8:2")
    limits = Limits(jobs=3, per_storage=1)
    assert next_job([web, shop, db], [], limits) == web
    assert next_job([shop, db], [web], limits) == db
    assert next_job([shop], [web, db], limits) is None
    assert next_job([shop, db], [web], Limits(1, 1)) is None
    assert next_job([], [], limits) is None


def test_no_more_than_are_allowed_are_worked_on_at_once_on_each_host():
    here, far, also, other = job("here"), job("a", host="h1"), job("b", host="h1"), job("c", host="h2")
    limits = Limits(jobs=8, per_storage=8, per_host=1)
    assert next_job([also, other], [far], limits) == other
    assert next_job([also], [far, other], limits) is None
    assert next_job([also, here], [far, other], limits) == here
    assert next_job([also], [far], Limits(8, 8)) == also
    jobs = [job(f"vm{number}", "sleep 0.1", host="h1") for number in range(4)]
    _, seen = do(*jobs, limits=Limits(4, 4, 2))
    assert seen.most == 2


def test_one_monitor_is_never_spoken_to_by_two():
    there, elsewhere = job("web", monitor="/q"), job("web-offsite", storage="8:2", monitor="/q")
    assert next_job([elsewhere], [there], MANY) is None
    assert next_job([elsewhere], [], MANY) == elsewhere


def test_no_more_run_at_once_than_are_allowed_and_all_are_done_in_their_order():
    jobs = [job(f"vm{number}", f"echo {number}; sleep 0.1") for number in range(5)]
    results, seen = do(*jobs, limits=Limits(2, 2))
    assert seen.most == 2
    assert list(results) == [one.vm for one in jobs]
    assert [result.document for result in results.values()] == [b"%d\n" % number for number in range(5)]


def test_however_one_ends_the_others_go_on():
    results, seen = do(
        job("dead", "echo '{' ; kill -KILL $$"),
        job("failed", "echo oh >&2; echo 'no end' | tr -d '\\n' >&2; exit 3"),
        Job(VmName("none"), ("/no/such/program",), "", ""),
        job("well", "echo done"),
    )
    assert {vm: one.code for vm, one in results.items()} == {
        "dead": -signal.SIGKILL,
        "failed": 3,
        "none": None,
        "well": 0,
    }
    assert results["dead"].document == b"{\n"
    assert "cannot start" in results["none"].why
    assert [line for vm, line in seen.lines if vm == "failed"] == ["oh", "no end"]


def test_one_that_could_not_be_watched_is_ended_and_told(monkeypatch):
    started: list[int] = []

    def fail(pid: int) -> int:
        started.append(pid)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", fail)
    results, _ = do(job("web", "exec sleep 60"))
    assert (results["web"].code, "Too many open files" in results["web"].why) == (None, True)
    assert not Path(f"/proc/{started[0]}").exists()


def test_much_that_is_written_holds_up_nobody():
    results, seen = do(job("loud", "yes 0123456789 | head -100000 >&2; yes | head -100000"))
    assert (results["loud"].code, len(seen.lines)) == (0, 100_000)
    assert len(results["loud"].document) == 200_000


def test_a_stop_is_handed_on_and_nothing_more_is_started():
    seen = Seen(stop_at_line=Cancellation())
    rolls_back = "trap 'echo rolled back; exit 1' TERM; echo up >&2; while :; do sleep 0.05; done"
    results, _ = do(job("web", rolls_back), job("later", "echo no"), limits=Limits(1, 1), seen=seen)
    assert (results["web"].code, results["web"].document) == (1, b"rolled back\n")
    assert (results["later"].code, results["later"].document) == (None, b"")
    assert "stopped before it was started" in results["later"].why


def test_one_that_hangs_is_asked_to_end_and_then_killed():
    patience = Patience(work=2.0, end=0.3, dead=60)
    results, _ = do(job("deaf", "trap '' TERM; exec sleep 60"), job("well", "exit 0"), patience=patience)
    assert (results["deaf"].code, results["well"].code) == (-signal.SIGKILL, 0)
    assert results["deaf"].why == "it took longer than 2 s"


def test_one_that_not_even_a_kill_ends_is_left_alone(monkeypatch):
    """As one that waits for a disk of a server that is gone. It must not hold up the end of the others."""
    started: list[int] = []
    monkeypatch.setattr(subprocess.Popen, "kill", lambda self: started.append(self.pid))
    results, _ = do(
        job("stuck", "trap '' TERM; exec sleep 60"), patience=Patience(work=2.0, end=0.2, dead=0.2)
    )
    try:
        assert results["stuck"].code is None
        assert results["stuck"].seconds > 2.3
    finally:
        os.kill(started[0], signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(started[0], 0)


PARENT = """
import sys
from backupctl.cancel import Cancellation
from backupctl.operations.fleet import run as fleet
from backupctl.operations.fleet.limits import Job, Limits
from tests.unit.operations.test_fleet import Seen
script = "trap ': > $0.rolled-back; exit' TERM; echo $$ > $0; while :; do sleep 0.05; done"
command = ("sh", "-c", script, sys.argv[1])
fleet.run([Job("web", command, "", "")], Limits(1, 1), fleet.Patience(), Seen(), Cancellation())
"""


def test_a_parent_that_is_killed_has_its_children_roll_back(tmp_path):
    up = tmp_path / "up"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", PARENT, str(up)], env=environment, cwd=ROOT) as parent:
        wait_for(up)
        parent.kill()
    try:
        wait_for(Path(f"{up}.rolled-back"))
    except AssertionError:
        os.kill(int(up.read_text()), signal.SIGKILL)
        raise


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


MOUNTS = rb"""22 1 8:1 / / rw - ext4 /dev/sda1 rw
23 22 0:40 / /backup rw - nfs server:/x rw
24 22 8:2 / /backup\040two rw - ext4 /dev/sdb rw
25 23 8:3 / /backup/web rw - ext4 /dev/sdc rw
26 23 8:4 / /backup/web rw - ext4 /dev/sdd rw
"""


@pytest.mark.parametrize(
    ("path", "device"),
    [
        *(("/backup/db", "0:40"), ("/backup", "0:40"), ("/backups", "8:1"), ("/backup two/r", "8:2")),
        *(("/backup/web/x", "8:4"), ("/backup/db/../web", "8:4"), ("/", "8:1")),
    ],
)
def test_the_file_system_of_a_path_is_found_without_a_look_at_it(tmp_path, path, device):
    (tmp_path / "mountinfo").write_bytes(MOUNTS)
    assert mounts.device(Path(path), tmp_path / "mountinfo") == device


def test_without_the_kernels_list_each_path_is_one_of_its_own(tmp_path):
    assert mounts.device(Path("/backup"), tmp_path / "none") == "/backup"
    assert mounts.device(tmp_path) == f"{os.major(tmp_path.stat().st_dev)}:{os.minor(tmp_path.stat().st_dev)}"
