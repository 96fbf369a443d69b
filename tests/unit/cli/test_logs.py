# SPDX-License-Identifier: GPL-2.0-or-later
"""Log lines: where they go, what a failed run leaves, and what must not be in them."""

import gc
import json
import logging
import os
import re
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from backupctl.cli import logs, main, output, reporters
from backupctl.errors import Failed, Locked, UsageError
from backupctl.events.prune import VmSkipped
from backupctl.operations.backup import run as backup
from backupctl.repository.repository import Repository
from backupctl.system.address import Address
from backupctl.system.log import Shown
from backupctl.vm.qmp.monitor import Monitor

SECRET = "correct horse battery staple"
VERSION = {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}


@pytest.fixture
def qmp(tmp_path: Path) -> Iterator[Path]:
    """A monitor that answers everything, with a secret in what it says of itself."""
    answers = {
        "query-version": VERSION,
        "query-commands": [{"name": "query-version"}],
        "qom-get": {"qom-type": "secret", "data": SECRET},
    }

    def serve() -> None:
        try:
            client, _ = listener.accept()
        except OSError:  # nobody came
            return
        with client:
            client.sendall(json.dumps({"QMP": {"version": VERSION, "capabilities": []}}).encode() + b"\n")
            while content := client.recv(65536):  # each waits for the answer to the one before
                asked = json.loads(content)
                answer = {"return": answers.get(asked["execute"], {}), "id": asked.get("id")}
                client.sendall(json.dumps(answer).encode() + b"\n")

    path = tmp_path / "qmp"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield path
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


@pytest.fixture
def call(tmp_path, monkeypatch, capfd, qmp):
    """Call `incremental` in this process, of which a run is made that sends secrets and then raises `err`."""
    Repository.create(tmp_path / "repository")
    config = tmp_path / "backupctl.toml"
    config.touch(0o600)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr(output, "_output", output._Output())

    def made(err, *options):
        def run(ctx):
            ctx.reporter.event(VmSkipped("db", "for a test"))
            with Monitor.connect(Address(path=str(qmp)), 5.0) as monitor:
                monitor.execute("object-add", {"qom-type": "secret", "id": "sec0", "data": SECRET})
                monitor.execute("qom-get", {"path": "/objects/sec0"})
                monitor.execute("block_passwd", {"device": "x", "password": SECRET})
            raise err

        monkeypatch.setattr(backup, "run", run)
        words = ["incremental", "web", "--qmp", f"unix:{qmp}", "--repository", str(tmp_path / "repository")]
        monkeypatch.setattr(sys, "argv", ["backupctl", *words, "--config", str(config), *options])
        with pytest.raises(SystemExit) as ended:
            main.main()
        out, said = capfd.readouterr()
        return ended.value.code, out, said, sorted(temporary.iterdir())

    return made


def test_a_failed_run_leaves_its_transcript_and_names_it(call):
    code, out, said, (log,) = call(Failed("no room"), "--json")
    assert code == 1
    assert json.loads(out)["error"]["log"] == str(log)
    assert f"  log:   {log}\n" in said
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    text = log.read_text()
    for part in ("debug   vm.qmp: -> object-add ", "info    events: skipped db", "Failed: no room"):
        assert part in text
    assert logging.getLogger("backupctl").handlers == []


@pytest.mark.parametrize("err", [Locked("busy"), UsageError("wrong")], ids=["locked", "usage"])
def test_an_error_that_is_told_by_its_text_leaves_none(call, err):
    code, out, _, left = call(err, "--json")
    assert (code, left, json.loads(out)["error"]["log"]) == (err.exit_code, [], None)


def test_a_bug_leaves_its_traceback(call):
    code, _, said, (log,) = call(ZeroDivisionError("oops"))
    assert code == 1
    assert str(log) in said
    assert "ZeroDivisionError: oops" in log.read_text()
    assert "Traceback" not in said


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_secret_is_in_any_log(call, tmp_path, form):
    log = tmp_path / "log"
    _, out, said, _ = call(Failed("no room"), "-v", "--log-file", str(log), "--log-format", form)
    kept = out + said + log.read_text()
    assert SECRET not in kept
    assert kept.count("object-add") == 2  # on stderr, and in the file
    assert "block_passwd" in kept


def test_no_secret_is_in_a_transcript(call):
    _, out, said, (log,) = call(Failed("no room"))
    assert "block_passwd" in log.read_text()
    assert SECRET not in out + said + log.read_text()


def test_a_log_file_has_all_and_is_named_in_the_place_of_a_transcript(call, tmp_path):
    log = tmp_path / "log"
    code, _, said, left = call(Failed("no room"), "--log-file", str(log))
    assert (code, left) == (1, [])
    assert f"  log:   {log}\n" in said
    assert "debug:" not in said
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    lines = log.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (debug|info) ", line) for line in lines)


def test_json_lines_have_an_events_fields(call, tmp_path):
    log = tmp_path / "log"
    log.write_text("{}\n")  # it is appended to
    log.chmod(0o640)
    call(Failed("no room"), "--log-file", str(log), "--log-format", "json")
    first, *lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert first == {}
    assert stat.S_IMODE(log.stat().st_mode) == 0o640  # as its owner made it
    assert {"time", "level", "logger", "message"} <= set.intersection(*map(set, lines))
    (event,) = [one for one in lines if one.get("code") == "vm-skipped"]
    assert (event["vm"], event["level"], event["logger"]) == ("db", "info", "backupctl.events")


def test_verbose_shows_what_no_reporter_shows(call):
    _, _, said, _ = call(Failed("no room"), "-v")
    assert "backupctl: debug: vm.qmp: -> object-add " in said
    assert said.count("skipped db") == 1


@pytest.mark.parametrize("what", ["link", "directory", "pipe", "second name", "of another user"])
def test_a_log_file_that_others_could_have_put_there_is_refused(call, tmp_path, what):
    log, victim = tmp_path / "log", tmp_path / "victim"
    victim.write_text("as it was")
    if what == "link":
        log.symlink_to(victim)
    elif what == "directory":
        log.mkdir()
    elif what == "pipe":
        os.mkfifo(log)
    elif what == "second name":
        log.hardlink_to(victim)
    elif os.geteuid():
        pytest.skip("only root may give files away")
    else:
        log.write_text("")
        os.chown(log, 12345, -1)
    code, _, said, left = call(Failed("not reached"), "--log-file", str(log))
    assert (code, left) == (2, [])
    assert f"cannot open the log file {log}: " in said
    assert victim.read_text() == "as it was"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_log_does_not_follow_another_users_link_on_the_way(call, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    log = tmp_path / "link" / "log"
    call(Failed("no room"), "--log-file", str(log))
    held = log.read_text()
    assert "skipped db" in held
    os.lchown(tmp_path / "link", 12345, 12345)
    code, _, said, left = call(Failed("not reached"), "--log-file", str(log))
    assert (code, left, log.read_text()) == (2, [], held)
    assert f"cannot open the log file {log}: {tmp_path / 'link'} is a symbolic link of user 12345" in said


def test_the_options_stand_on_either_side_of_the_command_but_a_file_once(tmp_path):
    def ran(*words: str) -> "subprocess.CompletedProcess[str]":
        program = [sys.executable, "-m", "backupctl", *words]
        return subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)

    log, config = str(tmp_path / "log"), tmp_path / "backupctl.toml"
    config.touch(0o600)
    where = ("list", "--repository", str(Repository.create(tmp_path / "r").path), "--config", str(config))
    assert ran("--log-file", log, *where).returncode == 0
    assert ran(*where, "--log-file", log).returncode == 0
    twice = ran("--log-file", log, *where, "--log-file", log)
    assert (twice.returncode, "given twice" in twice.stderr) == (2, True)


def test_a_transcript_is_bounded():
    with logs.begin() as found:
        for number in range(5000):
            logging.getLogger("backupctl.test").debug("%d %s", number, "x" * 5000)
        assert len(found.transcript) == 2000
        assert max(map(len, found.transcript)) < 2100
        assert " 4999 " in found.transcript[-1]


def test_a_log_that_can_not_be_written_is_no_error(tmp_path):
    with logs.begin() as found:
        found.append_to(tmp_path / "log")
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, found._file._descriptor)
        os.close(full)
        logging.getLogger("backupctl.test").debug("lost")
        assert found.transcript[-1].endswith("lost")


def test_verbose_waits_for_no_reader(monkeypatch):
    """The guest may be frozen meanwhile. What did not fit comes later."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream, logs.begin() as found:
        monkeypatch.setattr(sys, "stderr", stream)
        found.show()
        for number in range(300):
            logging.getLogger("backupctl.test").debug("%d %s", number, "x" * 1000)
        first = os.read(reader, 1 << 20)
        logging.getLogger("backupctl.test").debug("last")
        then = os.read(reader, 1 << 20)
    os.close(reader)
    numbers = [int(line.split()[3]) for line in (first + then).decode().splitlines()]
    assert numbers == list(range(len(numbers)))
    assert 60 < len(numbers) < 300


@pytest.mark.parametrize("journal", [True, False], ids=["journal", "elsewhere"])
def test_lines_for_systemds_journal_begin_with_their_priority(tmp_path, monkeypatch, journal):
    with (tmp_path / "stderr").open("w+") as stream:
        found = os.fstat(stream.fileno())
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino + (not journal)}")
        with logs.begin() as log, reporters.reporter() as reporter:
            log.show()
            reporter.event(VmSkipped("db", "for a test"))
            logging.getLogger("backupctl.test").debug("details")
        output.print_message("look here", "warning")
        output.print_error(Failed("no room", next_command="backupctl full web"), as_json=False)
        stream.seek(0)
        lines = stream.read().splitlines()
    heads = ["<6>", "<7>", "<4>", "<3>", "<3>"] if journal else [""] * 5
    told = ["backupctl: note: skipped db: for a test", "backupctl: debug: test: details"]
    told += ["backupctl: warning: look here", "backupctl: no room", "  next:  backupctl full web"]
    assert lines == [head + line for head, line in zip(heads, told, strict=True)]


def test_options_parsed_outside_of_a_call_leave_no_handler(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "_current", [])
    log = tmp_path / "log"
    main.cli.make_context("backupctl", ["-v", "--log-file", str(log), "list"]).close()
    assert logging.getLogger("backupctl").handlers == []
    with logs.current():
        logging.getLogger("backupctl.test").debug("in the call")
    assert "in the call" in log.read_text()


def test_a_message_is_made_into_a_line_only_when_somebody_wants_it(monkeypatch):
    made = []
    shown = Shown.__str__
    monkeypatch.setattr(Shown, "__str__", lambda one: made.append(1) or shown(one))
    with logs.begin() as found:
        logging.getLogger("backupctl.test").debug("-> %s", Shown({"password": SECRET}, 100))
        assert made == []
        assert found.transcript[0].endswith('-> {"password": "***"}')


@pytest.mark.parametrize(
    "argument", [object(), ValueError("x"), Shown({}), Shown({}, 1 << 20), "x" * 10_000], ids=range(5)
)
def test_what_may_be_large_or_change_or_hold_more_is_not_kept(argument):
    with logs.begin() as found:
        logging.getLogger("backupctl.test").debug("%s", argument)
        gc.collect()
        kept = [one for one in gc.get_objects() if isinstance(one, logging.LogRecord)]
        assert not any(argument is one for record in kept for one in record.args or ())
        assert len(found.transcript) == 1


def test_lines_are_in_order_however_late_they_are_made():
    with logs.begin() as found:
        for number in range(1000):
            logging.getLogger("backupctl.test").debug("%s", number if number % 3 else ValueError(number))
        assert [int(line.split()[-1]) for line in found.transcript] == list(range(1000))
        unmade = [one for one in found._transcript._newest if not isinstance(one, str)]
        assert 0 < len(unmade) <= 300
