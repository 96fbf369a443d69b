# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls through the fork server behave like calls of a program of its own."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backupctl.drills.fork_server import CallSpec, ForkServer
from backupctl.errors import Failed

ENTRY = "program:main"
PROGRAM = """
import os, signal, sys, time
def main():
    exec(sys.argv[1])
"""


@pytest.fixture
def server(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    with ForkServer(
        ["json"], {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{tmp_path}"}
    ) as one:
        yield one


def call(server: ForkServer, body: str, directory: Path = Path("/"), timeout: float = 30, **environment: str):
    return server.run(CallSpec([body], environment, str(directory), ENTRY), timeout)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("pass", 0),
        ("sys.exit(3)", 3),
        ("sys.exit()", 0),
        ("sys.exit('no')", 1),
        ("os.kill(os.getpid(), 9)", -9),
    ],
)
def test_the_exit_code_is_what_subprocess_tells(server, body, code):
    direct = subprocess.run([sys.executable, "-c", f"import os, sys\n{body}"], check=False)
    assert call(server, body).returncode == direct.returncode == code


def test_an_exception_is_told_as_by_the_interpreter(server):
    done = call(server, "print('begun'); 1 / 0")
    assert (done.returncode, done.stdout) == (1, "begun\n")
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_call_has_its_own_environment_directory_and_streams_and_no_other_descriptors(server, tmp_path):
    body = "print(dict(os.environ), os.getcwd(), sys.stdin.read() == '', os.listdir('/proc/self/fd'))"
    done = call(server, body, tmp_path, A="b")
    assert done.stdout == f"{{'A': 'b'}} {tmp_path} True ['0', '1', '2', '3']\n"  # 3: of the listing itself


def test_ctrl_c_can_be_heard_by_a_call(server):
    body = "try:\n    signal.raise_signal(signal.SIGINT)\nexcept KeyboardInterrupt:\n    print('heard')"
    assert call(server, body).stdout == "heard\n"


def test_a_call_that_takes_too_long_is_killed(server, tmp_path):
    note = tmp_path / "pid"
    with pytest.raises(subprocess.TimeoutExpired):
        call(server, f"open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)", timeout=2)
    await_end(int(note.read_text()))


def test_calls_run_side_by_side(server, tmp_path):
    """Each waits for all others to be there."""

    def meet(code: int) -> int:
        waits = "while len(os.listdir('.')) < 4: time.sleep(0.01)"
        body = f"open('{code}', 'w').close()\n{waits}\nsys.exit({code})"
        return call(server, body, tmp_path / "met").returncode

    (tmp_path / "met").mkdir()
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(meet, range(4))) == [0, 1, 2, 3]


def test_calls_that_end_as_their_callers_leave_do_not_disturb_others(server, tmp_path):
    """What ends takes its descriptors' numbers with it, and the next call gets them."""

    def hurry(code: int) -> list[int]:
        codes = []
        for _ in range(15):
            with server.start(CallSpec(["pass"], {}, str(tmp_path), ENTRY), sys.__stderr__, sys.__stderr__):
                pass
            codes.append(call(server, f"sys.exit({code})").returncode)
        return codes

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(hurry, range(4))) == [[code] * 15 for code in range(4)]


def test_running_calls_end_with_the_fork_server(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    note = tmp_path / "pid"
    body = f"open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    with ForkServer([], environment(tmp_path)) as server:
        under_way = server.start(CallSpec([body], {}, str(tmp_path), ENTRY), sys.__stderr__, sys.__stderr__)
        while not (note.exists() and note.read_text()):
            time.sleep(0.01)
        assert under_way.poll() is None
    await_end(int(note.read_text()))
    with under_way, pytest.raises(Failed, match="has ended"):
        under_way.poll()
    with pytest.raises(Failed, match="cannot send a request"):
        call(server, "pass")


def environment(directory: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{directory}"}


def await_end(process: int) -> None:
    deadline = time.monotonic() + 30
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
