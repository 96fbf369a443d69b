# SPDX-License-Identifier: GPL-2.0-or-later
"""The program starts without what a command does not need, and ends with the code that it has."""

import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from backupctl.cli.main import cli
from tests.conftest import ROOT

PROGRAM = [sys.executable, "-m", "backupctl"]


def call(*arguments, **options):
    return subprocess.run(
        [*PROGRAM, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, **options
    )


@pytest.mark.parametrize(
    ("module", "slow"),
    [
        (
            "main",
            {"asyncio", "numpy", "rich", "nbd", "blake3", "qemu.qmp", "backupctl.repository.repository"},
        ),
        (
            "backup",
            {"rich", "numpy.random", "backupctl.operations.verify.run", "backupctl.operations.prune.run"},
        ),
        ("report", {"rich", "nbd", "http.server", "backupctl.transfer", "backupctl.operations.prune.run"}),
        ("list_show", {"rich", "nbd", "backupctl.transfer", "backupctl.operations.restore"}),
    ],
)
def test_a_command_loads_nothing_slow_that_it_does_not_need(module, slow):
    program = f"import sys, backupctl.cli.main, backupctl.cli.{module}; print(*sys.modules)"
    command = [sys.executable, "-c", program]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    assert f"backupctl.cli.{module}" in loaded.split()
    assert slow.isdisjoint(loaded.split())


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--version"], 0), (["--help"], 0), (["nonsense"], 2), (["list", "--x"], 2)]
)
def test_the_exit_code_is_that_of_the_command(arguments, code):
    done = call(*arguments)
    assert done.returncode == code
    assert done.stdout if code == 0 else done.stderr


def test_the_version_is_told_without_the_command_line_and_as_that_would():
    program = (
        "import sys; from backupctl import __main__ as main\n"
        "main._leave = sys.exit; sys.argv[1:] = ['--version']\n"
        "try: main.main()\n"
        "finally: print(*sys.modules)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    version, loaded = done.stdout.splitlines()
    assert {"click", "msgspec", "backupctl.cli"}.isdisjoint(loaded.split())
    assert f"{version}\n" == CliRunner().invoke(cli, ["--version"]).output
    assert call("-V").stdout == call("--version").stdout == f"{version}\n"


def test_a_version_that_nobody_can_read_is_a_failure():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*PROGRAM, "--version"],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert "cannot write to standard output" in done.stderr


def test_a_reader_that_has_left_is_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*PROGRAM, "--help"],
        cwd=ROOT,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(writing)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_numpy_starts_no_thread_for_each_processor():
    """OpenBLAS would, while it is loaded."""
    program = (
        "import os, sys, click; sys.argv[1:] = ['--version']\n"
        "from backupctl import __main__ as start\n"
        "start._leave = lambda code: None\n"
        "try:\n    start.main()\nexcept SystemExit:\n    pass\n"
        "import numpy; print('threads:', len(os.listdir('/proc/self/task')))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "threads: 1" in done.stdout
