# SPDX-License-Identifier: GPL-2.0-or-later
"""`run`: what the process of each VM is told, and what its end is taken for."""

import json
import random
import signal
import time

import pytest
from click.testing import CliRunner

from backupctl.cli import run_screen
from backupctl.cli.main import cli
from backupctl.cli.reporters import RelayReporter, relayed
from backupctl.errors import Interrupted, UsageError
from backupctl.events.backup import CrashConsistent
from backupctl.names import VmName
from backupctl.operations.fleet import run as fleet
from backupctl.operations.fleet.limits import Job, Limits
from backupctl.operations.fleet.run import JobResult
from backupctl.operations.routine import run as routine
from backupctl.operations.routine.run import RoutineReport, TaskResult
from backupctl.outcome import documents
from backupctl.repository.repository import Repository

WEB = VmName("web")
WELL = json.dumps({"vms": [documents.routine_failed("web", None)]}).encode()


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """Three VMs, of which two have one monitor."""
    Repository.create(tmp_path / "r")
    config = tmp_path / "c.toml"
    config.write_text(
        f'[defaults]\nrepository = "{tmp_path}/r"\nkeep_last = 3\nfull_every = "30d"\nverify_percent = 5\n'
        "[run]\njobs = 3\njobs_per_storage = 2\nwait_lock = 60\n"
        '[vm.web]\nqmp = "/q1"\nkeep_last = 9\n[vm.db]\nqmp = "/q2"\nverify_percent = 0\n'
        f'[vm.db-offsite]\nqmp = "/q2"\nrepository = "/proc/r"\n'
    )
    monkeypatch.setenv("BACKUPCTL_CONFIG", str(config))
    return config


@pytest.fixture
def started(configured, monkeypatch):
    """Call `run`; return with what the fleet is called."""

    def call(*words: str):
        seen = []

        def run(*given):
            seen.extend(given)
            return [JobResult(job.vm, 0, WELL, 1.0) for job in given[0]]

        monkeypatch.setattr(fleet, "run", run)
        done = CliRunner().invoke(cli, ["run", *words])
        assert done.exit_code == 0, (done.output, done.exception)
        return seen[:3]

    return call


def test_each_vm_gets_a_process_with_what_was_typed_and_where_configuration_and_log_are(
    started, configured, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    typed = ("--jobs", "2", "--full-every", "7d", "--dry-run", "-v", "--log-file", "log", "--quiet")
    jobs, limits, patience = started("--all", *typed)
    assert [job.vm for job in jobs] == ["web", "db", "db-offsite"]
    command = list(jobs[0].command)
    own = ["-m", "backupctl", "run", "web", "--relay", "--json", "--random-delay", "0"]
    assert command[2 : 2 + len(own)] == own
    rest = command[2 + len(own) :]
    assert sorted(rest) == sorted(
        ["--full-every", "7d", "--dry-run", "--config", str(configured), "--log-file", str(tmp_path / "log")]
    )
    assert limits == Limits(2, 2)
    assert patience.work is None


def test_two_with_one_monitor_or_on_one_storage_are_known_as_such(started):
    jobs, limits, _ = started("db*", "web")
    assert [job.monitor for job in jobs] == ["/q2", "/q2", "/q1"]
    assert jobs[0].storage == jobs[2].storage != jobs[1].storage
    assert limits == Limits(3, 2)


def test_the_host_of_a_vm_is_that_of_its_monitor(started, configured):
    text = "".join(
        f'[vm.vm{number}]\nqmp = "{qmp}"\n'
        for number, qmp in enumerate(
            (
                "ssh://root@Far:22/q",
                "ssh://far/q2",
                "tcp:127.0.0.1:4444",
                "tcp:10.0.0.7:4444",
                "ssh://localhost/q",
            )
        )
    )
    text += '[vm.vm5]\nimage = {vda = "ssh://root@Far/a b.qcow2,format=raw"}\n'
    configured.write_text(configured.read_text() + text)
    jobs, limits, _ = started("vm*", "web", "--jobs-per-host", "2")
    assert [job.host for job in jobs] == ["far", "far", "", "10.0.0.7", "localhost", "far", ""]
    assert limits == Limits(3, 2, 2)


def test_a_process_that_takes_too_long_is_ended_after_it_should_have_ended_itself(started):
    assert started("--all", "--max-time", "100")[2].work > 100


def told(*, code: int | None, document: bytes = b"", seconds: float = 1.0, why: str = "", last: str = ""):
    entry = run_screen.entry_of(JobResult(WEB, code, document, seconds, why), last)
    return entry["exit_code"], (entry["error"] or {}).get("message", "")


def test_a_process_without_a_document_is_told_by_how_it_ended():
    assert told(code=0, document=WELL) == (0, "")
    assert told(code=None, seconds=0.0, why="stopped") == (1, "stopped")
    assert told(code=-signal.SIGTERM) == (1, "stopped by SIGTERM")
    assert told(code=1, last="no module") == (1, "its process ended with exit code 1: no module")
    for lost in ({"code": -signal.SIGKILL}, {"code": None, "why": "too long"}, {"code": 0, "document": b"{"}):
        assert told(**lost)[0] == 3  # type: ignore[arg-type]
    assert "was ended by SIGKILL" in told(code=-signal.SIGKILL)[1]
    error = {"error": {**documents.error(UsageError("wrong")), "log": None}}
    assert told(code=2, document=json.dumps(error).encode()) == (2, "wrong")


def test_the_lines_of_a_process_carry_the_name_of_its_vm(capsys):
    watcher = run_screen.Watcher(quiet=False, verbose=False)
    RelayReporter().event(CrashConsistent("no agent"))
    RelayReporter().progress("vda", 1 << 20, 2 << 20)
    for line in capsys.readouterr().err.splitlines():
        watcher.line(WEB, line)
    watcher.line(WEB, "Traceback: something else")
    assert capsys.readouterr().err.splitlines() == [
        "backupctl: warning: web: not frozen, this recovery point is only crash-consistent: no agent",
        "backupctl: web: vda: 50 % of 2.0 MiB",
    ]
    assert watcher.last_line(WEB) == "Traceback: something else"


@pytest.mark.parametrize("line", ["", "{", "[]", "7", '{"backupctl": 1}', '{"backupctl": {"text": "x"}}'])
def test_what_is_not_relayed_is_not_taken_for_it(line):
    assert relayed(line) is None


def test_quiet_shows_warnings_only_and_verbose_the_steps(capsys):
    for severity, quiet, verbose in (("warning", True, False), ("note", True, False), ("step", False, True)):
        watcher = run_screen.Watcher(quiet=quiet, verbose=verbose)
        watcher.started(Job(WEB, (), "", ""))
        watcher.line(WEB, json.dumps({"backupctl": {"severity": severity, "text": severity}}))
    assert capsys.readouterr().err.splitlines() == [
        *("backupctl: warning: web: warning", "backupctl: web: started", "backupctl: web: step")
    ]


@pytest.fixture
def alone(configured, monkeypatch):
    """Call `run` of one VM; return its Routine, the exit code, and the document."""

    def call(*words: str, do=lambda _stop: None):
        seen = []

        def run(asked, _reporter, stop):
            seen.append(asked)
            try:
                do(stop)
            except Interrupted as err:
                return RoutineReport((TaskResult("backup", error=err),), 1.0)
            return RoutineReport((), 1.0)

        monkeypatch.setattr(routine, "run", run)
        done = CliRunner().invoke(cli, ["run", *words, "--json"])
        return seen[0], done.exit_code, json.loads(done.stdout)

    return call


def test_one_vm_is_worked_on_here_by_its_own_policies(alone):
    asked, code, document = alone("web")
    assert (asked.policy.rules.last, asked.policy.full_every.days) == (9, 30)
    assert (asked.policy.verify_percent, asked.wait_seconds, asked.options.kind) == (5.0, 60.0, "incremental")
    assert (code, document["exit_code"], document["vms"][0]["vm"]) == (0, 0, "web")
    assert alone("db")[0].policy.verify_percent == 0.0
    assert alone("db", "--verify-percent", "50", "--wait-lock", "0")[0].policy.verify_percent == 50.0


def test_the_work_on_a_vm_ends_after_its_time(alone):
    def work(stop) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            stop.check()
            time.sleep(0.01)

    _, code, document = alone("web", "--max-time", "0.1", do=work)
    assert code == 1
    assert "took longer than 0.1 s" in document["vms"][0]["error"]["message"]


def test_the_start_is_put_off_by_a_random_time_that_is_told(alone, monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda least, most: (least + most) / 1000)
    begun = time.monotonic()
    _, code, document = alone("web", "--random-delay", "200")
    assert (code, time.monotonic() - begun >= 0.2) == (0, True)
    assert document["vms"][0]["notes"][0]["code"] == "start-delayed"
