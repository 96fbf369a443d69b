# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM that does not run keeps the descriptors of scratch files; it must not keep their room."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from fixtures.proxy import Proxy

MIB = 1 << 20


def kept_bytes(lab) -> int:
    """Return what QEMU's open files without a name take on the disk."""
    directory, total = Path(f"/proc/{lab.machine.process.pid}/fd"), 0
    for one in directory.iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if str(lab.cli.scratch) in os.readlink(one):
                total += one.stat().st_blocks * 512
    return total


@pytest.mark.parametrize("state", ["paused", pytest.param("prelaunch", marks=pytest.mark.slow)])
def test_runs_of_a_vm_that_stands_still_keep_no_room(state, build, make_lab):
    lab = make_lab(build, {"vda": 16 * MIB}, extra=["-S"] if state == "prelaunch" else [])
    if state == "paused":
        lab.machine.qmp("stop")
    assert lab.machine.qmp("query-status")["status"] == state
    for kind in ("full", "incremental"):
        lab.writer.write(10)
        lab.backup(kind)
        assert kept_bytes(lab) == 0
        assert lab.cli.json("status", "web")["leftovers"] == []
    lab.machine.qmp("cont")
    lab.next_is_right()


def test_the_room_is_given_back_by_the_run_itself_where_it_can_not_reach_qemus_process(
    oldest_build, make_lab
):
    """Later versions of QEMU close the descriptors of a paused VM, too."""
    lab = make_lab(oldest_build, {"vda": 16 * MIB})
    lab.machine.qmp("stop")
    path = lab.machine.directory / "proxy"
    with Proxy(path, lab.machine.qmp_path):
        lab.cli.vm[1] = f"unix:{path}"
        lab.backup("full")
        assert kept_bytes(lab) == 0
        (told,) = lab.cli.json("status", "web")["leftovers"]
    assert "an amount that cannot be looked up from here" in told


def test_the_room_of_a_dead_run_of_a_paused_vm_is_told_and_given_back(any_build, make_lab):
    lab = make_lab(any_build, {"vda": 16 * MIB})
    lab.writer.do("vda", "data", 0, 8 * MIB, 0x33)
    lab.machine.qmp("stop")
    with lab.cli.start("full", "web", "--limit", "1M") as run:
        deadline = time.monotonic() + 60
        while not lab.machine.qmp("query-block-exports"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
        run.communicate(timeout=60)
    while lab.machine.qmp("query-block-exports"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert kept_bytes(lab) > 16 * MIB
    told = lab.cli.json("status", "web")["leftovers"]
    assert any("the paused VM keeps a scratch file open (19 MiB)" in one for one in told), told
    lab.cli.run("recover", "web")
    assert kept_bytes(lab) == 0
    assert lab.cli.json("status", "web")["leftovers"] == []
    lab.machine.qmp("cont")
    lab.next_is_right()
