# SPDX-License-Identifier: GPL-2.0-or-later
"""What `status` and `doctor` say of the next run after a death anywhere is what that run does."""

import json
import time

import pytest

from fixtures import builds
from tests import interrupted_cli
from tests.conftest import MIB, Lab

pytestmark = pytest.mark.timeout(600)
STEPS = 5  # so many of them, evenly, and those around the commit


def call(lab: Lab, *arguments: str, **environment: str) -> tuple[int, list[str]]:
    """Make a call that may be killed; returns its exit code and its steps."""
    log = lab.directory / "steps"
    log.unlink(missing_ok=True)
    told = {"STEPS": str(log), "CONTROL": str(lab.machine.directory / "control"), **environment}
    done = lab.cli.call(*arguments, entry=interrupted_cli.ENTRY, **told)
    return done.returncode, log.read_text().splitlines()


def settled_status(lab: Lab) -> dict:
    """Ask for the status once the guard of the dead run has let go of the monitor."""
    deadline = time.monotonic() + 60
    while (told := lab.cli.json("status", "web"))["qemu"] is None:
        assert time.monotonic() < deadline, told["problem"]
        time.sleep(0.1)
    return told


def chosen(steps: list[str]) -> list[int]:
    commit = max(number for number, step in enumerate(steps) if step == "rename ")
    cut = next(number for number, step in enumerate(steps) if step == "execute transaction")
    return sorted({*range(cut, len(steps) - 1, len(steps) // STEPS), commit - 1, commit})


def follow(lab: Lab, step: int, kind: str, *options: str) -> None:
    code, _ = call(lab, kind, "web", *options, KILL_AT=str(step), KILL_WHEN="after")
    assert code == -9
    lab.writer.write(1)
    told = settled_status(lab)
    assert not any("undid" in one or "removed" in one for one in told["leftovers"])
    foretold = {disk["name"]: disk["next"] for disk in told["disks"]}
    text = json.dumps([told["next_run"], told["leftovers"], [disk["reason"] for disk in told["disks"]]])
    assert "disabled" not in text
    doctor = lab.cli.json("doctor", "web")
    assert not [one for one in doctor["findings"] if one["subject"] == "chain" or one["verdict"] == "bad"]
    report = lab.backup("incremental")
    did = {disk["name"]: "scan" if disk["scanned"] else disk["kind"] for disk in report["disks"]}
    assert did == foretold, f"killed after step {step}"
    assert (f"builds on {report['parent']}" if report["parent"] else "takes a full") in told["next_run"]
    lab.assert_point(report["point"], lab.writer.moment)
    assert "an earlier run left" not in lab.cli.json("status", "web")["next_run"]


@pytest.mark.parametrize("view", ["fleecing", "snapshot-access"])
def test_what_status_and_doctor_foretell_after_a_death_is_what_the_next_run_does(make_lab, view):
    lab = make_lab(builds.simulator("10.0"), {"vda": 2 * MIB})
    lab.writer.write(5)
    lab.backup("full")
    code, steps = call(lab, "incremental", "web", "--view", view)
    assert code == 0
    every = chosen(steps)
    for step in every if view == "fleecing" else every[1::3]:
        follow(lab, step, "incremental", "--view", view)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("view", ["fleecing", "snapshot-access"])
def test_what_is_foretold_after_a_death_at_every_step_is_what_the_next_run_does(make_lab, view):
    lab = make_lab(builds.simulator("10.0"), {"vda": 2 * MIB})
    lab.writer.write(5)
    lab.backup("full")
    code, steps = call(lab, "incremental", "web", "--view", view)
    assert code == 0
    for step in range(len(steps) - 1):
        follow(lab, step, "incremental", "--view", view)


def test_what_is_foretold_after_a_killed_first_full_is_a_full(make_lab):
    lab = make_lab(builds.simulator("10.0"), {"vda": 2 * MIB})
    lab.writer.write(5)
    follow(lab, 30, "full")
