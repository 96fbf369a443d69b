# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs on the images of a VM that is off, here or on another host: their storage daemons, and the copy."""

import subprocess
import time

from tests.conftest import Lab
from tests.every_step import storage_daemons


def daemons_of(lab: Lab) -> list[int]:
    """Return the storage daemons that have an image of the machine open."""
    return storage_daemons(disk.path for disk in lab.machine.disks)


def await_copy(lab: Lab, run: subprocess.Popen[str]) -> list[int]:
    """Wait until a run copies; returns its storage daemon, which has an image open."""
    deadline = time.monotonic() + 60
    while not list((lab.cli.repository / "web").glob("*.partial/*.qcow2")):
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return daemons_of(lab)
