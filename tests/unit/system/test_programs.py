# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs of the configuration: what they get, what is kept of their output, and that they end."""

import logging
import os
import time
from pathlib import Path

import pytest

from backupctl.errors import Interrupted
from backupctl.system import programs
from backupctl.system.programs import ProgramFailed


def shell(text: str, seconds: float = 10.0, stdin: bytes = b"", **more) -> None:
    programs.run(["/bin/sh", "-c", text], stdin, {"GIVEN": "a value"}, seconds, **more)


def failure(text: str, seconds: float = 10.0) -> str:
    with pytest.raises(ProgramFailed) as caught:
        shell(text, seconds)
    return str(caught.value)


def is_gone(pid: Path) -> bool:
    """Whether a process has ended, which its parent may not have noticed yet. A killed one takes a moment."""
    status = Path(f"/proc/{int(pid.read_text())}/stat")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if status.read_text().rsplit(") ", 1)[1][0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_it_gets_stdin_and_environment_and_its_output_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    shell(f'cat > {tmp_path}/in; pwd; echo "$GIVEN"; echo "$HOME" >&2', stdin=b"document")
    assert (tmp_path / "in").read_bytes() == b"document"
    assert [one.getMessage() for one in caplog.records] == [
        "sh: /",
        "sh: a value",
        f"sh: {os.environ['HOME']}",
    ]


def test_arguments_reach_it_as_they_are_listed(tmp_path):
    programs.run(["/usr/bin/touch", "--", f"{tmp_path}/a $HOME `b`; c"], b"", {}, 10)
    assert [one.name for one in tmp_path.iterdir()] == ["a $HOME `b`; c"]


def test_a_failure_tells_how_it_ended_and_its_last_lines():
    said = failure("for i in 1 2 3 4 5 6 7; do echo line $i; done; printf 'no end'; exit 3")
    assert said == "/bin/sh failed with exit code 3: line 4; line 5; line 6; line 7; no end"
    assert failure("kill -9 $$") == "/bin/sh was killed by SIGKILL"


@pytest.mark.parametrize(
    "text",
    ["sleep 60 & echo $! > {pid}; wait", "trap '' TERM; sleep 60 & echo $! > {pid}; while :; do :; done"],
)
def test_one_that_hangs_is_ended_with_what_it_has_started(tmp_path, text):
    pid, begun = tmp_path / "pid", time.monotonic()
    assert "took longer than 2 s and was ended" in failure(text.format(pid=pid), 2.0)
    assert time.monotonic() - begun < 30
    assert is_gone(pid)


def test_one_that_prints_without_end_is_ended_and_not_kept(caplog):
    caplog.set_level(logging.INFO)
    said = failure("yes " + "x" * 100, 2.0)
    assert len(said) < 1000
    assert len(caplog.records) == 1000


def test_what_it_leaves_in_the_background_holds_nobody_up(tmp_path):
    begun = time.monotonic()
    shell(f"sleep 60 & echo $! > {tmp_path}/pid")
    assert time.monotonic() - begun < 30
    os.kill(int((tmp_path / "pid").read_text()), 9)


def test_input_that_it_does_not_read_holds_nobody_up():
    shell("exit 0", stdin=bytes(1 << 20))


def test_a_check_ends_it(tmp_path):
    pid = tmp_path / "pid"

    def check() -> None:
        if pid.exists() and pid.read_text().endswith("\n"):
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        shell(f"sleep 60 & echo $! > {pid}; wait", check=check)
    assert is_gone(pid)


def test_one_that_others_could_have_written_is_not_started(tmp_path):
    program = tmp_path / "hook"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o777)
    with pytest.raises(ProgramFailed, match=r"hook is not trusted: it is writable by other users"):
        programs.run([str(program)], b"", {}, 10)
    program.chmod(0o755)
    tmp_path.chmod(0o777)
    with pytest.raises(ProgramFailed, match="not trusted"):
        programs.run([str(program)], b"", {}, 10)
    assert not (tmp_path / "ran").exists()
    tmp_path.chmod(0o755)
    programs.run([str(program)], b"", {}, 10)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["none", "text"])
def test_one_that_can_not_be_started_is_a_failure(tmp_path, name):
    (tmp_path / "text").write_text("no program")
    with pytest.raises(ProgramFailed, match="cannot be started: "):
        programs.run([str(tmp_path / name)], b"", {}, 10)
