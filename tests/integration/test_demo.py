# SPDX-License-Identifier: GPL-2.0-or-later
"""The demos: the one on the simulator tells the truth; `make demo` falls back to it and says so."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from backupctl.cancel import Cancellation
from backupctl.cli.demo import Screen, Story
from backupctl.drills.demo import Stage, first_difference
from backupctl.errors import DamageFound, Failed
from fixtures import builds
from fixtures import demo as fixtures_demo
from fixtures.debian import CannotBeHad
from fixtures.storage_daemon import StorageDaemon
from tests.conftest import ROOT

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
DEMO = [sys.executable, "-m", "backupctl", "demo"]


def played(**environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        DEMO,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        cwd=ROOT,
    )


@pytest.fixture
def stage():
    with tempfile.TemporaryDirectory(prefix="bc-") as name, Stage.machine_for(Path(name), 3) as machine:
        yield Stage(Path(name), machine, Screen(), Cancellation())


def test_the_demo_tells_the_whole_story_in_seconds(tmp_path):
    before = os.times()
    done = played(TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    after = os.times()
    cpu_seconds = after.children_user - before.children_user + after.children_system - before.children_system
    assert cpu_seconds < 20, "a few seconds; a busy machine spends more time, but hardly more of its CPU"
    order = [
        *("A VM starts", "A full backup", "An incremental", "A run that fails", "roll back", "exit code 1"),
        *("The next incremental", "The recovery points", "Every point restored", "6 disks restored"),
    ]
    places = [done.stdout.index(text) for text in order]
    assert places == sorted(places)
    assert len(re.findall(r"^ +\d{8}T\d{6}Z +vd[ab] .* equal *$", done.stdout, re.MULTILINE)) == 6
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_bytes_that_differ_are_damage(stage, monkeypatch):
    """The verdict is computed: one byte of one moment is turned over, and the demo must find it."""
    real = Stage.backup

    def spoilt(self, kind):
        report = real(self, kind)
        with self.moments[report.point]["vdb"].open("r+b") as file:
            file.seek(5000)
            byte = file.read(1)
            file.seek(5000)
            file.write(bytes([byte[0] ^ 1]))
        return report

    monkeypatch.setattr(Stage, "backup", spoilt)
    with pytest.raises(DamageFound, match=r"vdb of \S+, vdb of \S+, vdb of") as caught:
        Story(stage, Screen()).run()
    assert caught.value.exit_code == 4


def test_a_run_that_was_to_fail_and_does_not_is_a_failure(stage):
    with pytest.raises(Failed, match="did not fail"):
        stage.failing("full", "nbd:sent@900M=drop")


def test_a_run_that_fails_unasked_ends_the_demo_with_its_error(stage):
    stage.machine.order("fault", spec="qmp:blockdev-add=error:no luck today")
    with pytest.raises(Failed, match="no luck today") as caught:
        Story(stage, Screen()).run()
    assert caught.value.exit_code == 1


def test_what_is_left_behind_is_noticed(stage):
    stage.check_clean()
    stage.machine.order("freeze", frozen=True)
    with pytest.raises(Failed, match="a frozen guest"):
        stage.check_clean()


@pytest.mark.parametrize(
    ("other", "at"),
    [(b"abcdef", None), (b"abcdxf", 4), (b"abc", 3), (b"abcdefg", 6), (b"", 0)],
    ids=str,
)
def test_the_first_byte_that_differs(tmp_path, other, at):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"abcdef")
    two.write_bytes(other)
    assert first_difference(one, two) == at


def test_a_difference_behind_the_first_piece_is_found(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(bytes(3 << 20))
    two.write_bytes(bytes((3 << 20) - 1) + b"\1")
    assert first_difference(one, two) == (3 << 20) - 1


def test_missing_tools_are_named_with_what_to_install():
    done = played(QEMU_IMG="no-such-qemu-img", QEMU_STORAGE_DAEMON="no-such-daemon")
    assert done.returncode == 2
    assert "qemu-img and qemu-storage-daemon not found" in done.stderr
    assert "apt install" in done.stderr


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_missing_libnbd_is_named_with_what_to_install(options):
    program = (
        "import importlib.util as u, sys; real = u.find_spec; sys.modules['nbd'] = None\n"
        "u.find_spec = lambda name, *more: None if name == 'nbd' else real(name, *more)\n"
        "from backupctl.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "list", *options],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert "apt install python3-libnbd" in done.stderr
    assert "Traceback" not in done.stderr
    if options:
        assert json.loads(done.stdout)["error"]["exit_code"] == 2


def test_sigterm_ends_the_demo_and_leaves_nothing(tmp_path):
    with subprocess.Popen(
        DEMO,
        env={**ENVIRONMENT, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as run:
        while "An incremental" not in run.stdout.readline():
            assert run.poll() is None
        state = next(tmp_path.glob("backupctl-demo-*"))
        run.send_signal(signal.SIGTERM)
        _, told = run.communicate(timeout=60)
    assert run.returncode == 1, told
    assert "SIGTERM" in told
    assert not state.exists()
    assert not any(str(state) in line for line in command_lines())


def command_lines():
    """The command lines of all processes that are there."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it may have ended meanwhile
            yield path.read_text(errors="replace")


@pytest.mark.parametrize("reason", ["no FUSE here", "QEMU 10.0 may hang"])
def test_make_demo_falls_back_to_the_simulator_and_says_so(monkeypatch, capfd, reason):
    def no_fuse(_self):
        raise CannotBeHad("no FUSE here")

    monkeypatch.setenv("QEMU", "no-such-qemu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    if reason == "no FUSE here":
        monkeypatch.setattr(StorageDaemon, "program", no_fuse)
    monkeypatch.setattr(builds, "version_of", lambda *_: "7.2" if reason == "no FUSE here" else "10.0")
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert fixtures_demo.main() == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    told = capfd.readouterr().out
    places = [
        told.index(text)
        for text in (
            *(
                "No guest available: no no-such-qemu is installed",
                f"No storage daemon available: {reason}",
            ),
            *("the bundled simulator is the VM", "A VM starts", "6 disks restored, all identical"),
        )
    ]
    assert places == sorted(places)


def test_make_demo_takes_a_storage_daemon_where_there_is_no_emulator():
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no FUSE here")
    if builds.installed().number >= (8, 1):
        pytest.skip("the storage daemon of this QEMU may hang")
    done = subprocess.run(
        [sys.executable, "-m", "fixtures.demo"],
        env={**ENVIRONMENT, "QEMU": "no-such-qemu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No guest available" in done.stdout
    assert "qemu-storage-daemon" in done.stdout
    assert done.stdout.count("MiB equal") == 3
