# SPDX-License-Identifier: GPL-2.0-or-later
"""SIGKILL before and after every step of a run: the next incremental is byte-equal, nothing is left.

A failing case names KILL_AT and KILL_WHEN; `python -m tests.killed` repeats it.
"""

import signal
import subprocess

import pytest

pytestmark = pytest.mark.simulator_too

CHUNKS = 4


def run(lab, kind: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = lab.cli.command(kind, "web")
    command[command.index("backupctl")] = "tests.killed"
    return subprocess.run(
        command,
        env={**lab.cli.environment, **environment},
        cwd=lab.cli.environment["PYTHONPATH"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def steps_of(lab, kind: str) -> list[str]:
    """Run once to the end; returns the names of its steps."""
    log = lab.folder / "steps"
    done = run(lab, kind, STEPS=str(log))
    assert done.returncode == 0, done.stderr
    return log.read_text().splitlines()


def explore(lab, kind: str, chunk: int) -> int:
    lab.writer.write(20)
    lab.backup("full")
    lab.writer.write(5)
    steps = steps_of(lab, kind)
    cases = 0
    for number in range(chunk, len(steps), CHUNKS):
        for when in ("before", "after"):
            case = f"KILL_AT={number} KILL_WHEN={when} ({steps[number]})"
            committed = {point["point"] for point in lab.cli.json("list", "web", vm=False)}
            lab.writer.write(3)
            log = lab.folder / f"steps-{number}-{when}"
            died = run(lab, kind, KILL_AT=str(number), KILL_WHEN=when, STEPS=str(log))
            if died.returncode == 0 and len(log.read_text().splitlines()) <= number:
                continue  # it asked QEMU once less whether a job had ended, so there is no such step
            assert died.returncode == -signal.SIGKILL, f"{case}: {died.stderr}"
            lab.writer.write(3)
            report = lab.backup("incremental")
            try:
                lab.assert_point(report["point"], lab.writer.moment)
                lab.assert_at_rest()
                assert committed <= {point["point"] for point in lab.cli.json("list", "web", vm=False)}
                if kind == "incremental":
                    assert {disk["kind"] for disk in report["disks"]} == {"incremental"}
            except AssertionError as err:
                raise AssertionError(f"{case}: {err}") from err
            cases += 1
    print(f"{kind}, chunk {chunk}: {cases} cases")
    return cases


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("kind", ["incremental", "full"])
def test_sigkill_at_every_step(build, make_lab, kind, chunk):
    lab = make_lab(build, {"vda": 4 << 20, "vdb": (2 << 20) + 512}, seed=chunk)
    assert explore(lab, kind, chunk) > 20
