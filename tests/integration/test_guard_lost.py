# SPDX-License-Identifier: GPL-2.0-or-later
"""The guard dies, too: the guest is thawed all the same, and nothing of ours stays in it."""

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from tests.integration.test_failures import SLOW, copying, wait_for


@pytest.fixture
def lab(build72, make_lab):
    made = make_lab(build72)
    made.writer.write(80)
    made.backup("full")
    made.writer.write(40)
    return made


def guard_of(run: int) -> int:
    """Find the guard of a run by its process id."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            child = f"\nPPid:\t{run}\n" in (folder / "status").read_text()
            if child and b"backupctl.vm.guard_process" in (folder / "cmdline").read_bytes():
                return int(folder.name)
    raise AssertionError("there is no guard")


def test_a_guard_that_is_killed_in_mid_copy_costs_the_run_and_leaves_nothing(lab):
    with lab.cli.start("incremental", "web", *SLOW) as run:
        wait_for(copying(lab))
        os.kill(guard_of(run.pid), signal.SIGKILL)
        _, told = run.communicate(timeout=60)
    assert run.returncode == 1, told
    assert "the guard process has died" in told
    lab.assert_at_rest()
    lab.next_is_right()
