# SPDX-License-Identifier: GPL-2.0-or-later
"""SIGKILL, or the end of QEMU, at every step of a run: the next incremental is byte-equal, nothing is left.

A failing case names KILL_AT and KILL_WHEN.
"""

import signal
import subprocess
from collections.abc import Iterable

import pytest

from tests import interrupted_cli

pytestmark = pytest.mark.simulator_too

CHUNKS = 4


KEEP = ("--keep-checkpoints", "2")
SHAPES = {"full": ["full"], "incremental": ["incremental"], "differential": ["incremental", *KEEP]}
FILTERED = {"snapshot-access": ["incremental", "--view", "snapshot-access"]}


def run(lab, shape: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    kind, *options = (SHAPES | FILTERED)[shape]
    if shape == "differential":
        options += ["--since", lab.cli.json("list", "web", vm=False)[-2]["point"]]
    return lab.cli.call(kind, "web", *options, entry=interrupted_cli.ENTRY, **environment)


def steps_of(lab, shape: str) -> list[str]:
    """Run once to the end; returns the names of its steps."""
    log = lab.directory / "steps"
    done = run(lab, shape, STEPS=str(log))
    assert done.returncode == 0, done.stderr
    return log.read_text().splitlines()


def explore(lab, shape: str, chunk: int) -> int:
    keep = KEEP if shape == "differential" else ()
    for kind in ("full", *["incremental"] * len(keep)):
        lab.writer.write(10)
        lab.backup(kind, *keep)
    lab.writer.write(5)
    steps = steps_of(lab, shape)
    cases = 0
    for number in range(chunk, len(steps), CHUNKS):
        for when in ("before", "after"):
            case = f"KILL_AT={number} KILL_WHEN={when} ({steps[number]})"
            committed = {point["point"] for point in lab.cli.json("list", "web", vm=False)}
            lab.writer.write(3)
            log = lab.directory / f"steps-{number}-{when}"
            died = run(lab, shape, KILL_AT=str(number), KILL_WHEN=when, STEPS=str(log))
            if died.returncode == 0 and len(log.read_text().splitlines()) <= number:
                continue  # it asked QEMU once less whether a job had ended, so there is no such step
            assert died.returncode == -signal.SIGKILL, f"{case}: {died.stderr}"
            lab.writer.write(3)
            report = lab.backup("incremental", *keep)
            try:
                lab.assert_point(report["point"], lab.writer.moment)
                lab.assert_at_rest(bitmaps_each=3 if keep else 1)
                assert committed <= {point["point"] for point in lab.cli.json("list", "web", vm=False)}
                assert not any(disk["scanned"] for disk in report["disks"]), "a bitmap was lost"
                if shape != "full":
                    assert {disk["kind"] for disk in report["disks"]} == {"incremental"}
            except AssertionError as err:
                raise AssertionError(f"{case}: {err}") from err
            cases += 1
    return cases


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("shape", SHAPES)
def test_sigkill_at_every_step(build, make_lab, shape, chunk, record_property):
    check_every_step(build, make_lab, shape, chunk, record_property)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("shape", FILTERED)
def test_sigkill_at_every_step_with_a_filter_of_ours_under_the_guest(
    newest_build, make_lab, shape, chunk, record_property
):
    check_every_step(newest_build, make_lab, shape, chunk, record_property)


def check_every_step(build, make_lab, shape: str, chunk: int, record_property) -> None:
    lab = make_lab(build, {"vda": 4 << 20, "vdb": (2 << 20) + 512}, seed=chunk)
    cases = explore(lab, shape, chunk)
    where = "the simulator" if build.simulated else f"QEMU {build.version}"
    record_property("cases", (f"SIGKILL at a step on {where}: {shape}", cases))
    assert cases > 20


def explore_terminations(lab, shape: str, termination: str, numbers: Iterable[int]) -> int:
    """End QEMU before steps of a run; a crash may cost what the guest had not flushed, but no more."""
    cases = 0
    for number in numbers:
        case = f"KILL_AT={number} ACTION={termination}"
        committed = {point["point"] for point in lab.cli.json("list", "web", vm=False)}
        lab.writer.write(3)
        pid = str(lab.machine.process.pid)
        ended = run(lab, shape, KILL_AT=str(number), ACTION=termination, VM_PID=pid)
        assert ended.returncode in (0, 1, 3), f"{case}: {ended.stderr}"
        assert not interrupted_cli.BUG.search(ended.stderr), f"{case}: {ended.stderr}"
        assert not lab.agent.frozen, case
        if lab.machine.alive():
            continue  # it had fewer steps this time
        restart(lab)
        if ended.returncode != 3:
            lab.assert_at_rest(bitmaps_each=None)
        lab.cli.run("recover", "web")
        lab.writer.write(3)
        report = lab.backup("incremental")
        try:
            lab.assert_point(report["point"], lab.writer.moment)
            lab.assert_at_rest()
            assert committed <= {point["point"] for point in lab.cli.json("list", "web", vm=False)}
            assert termination == "crash" or not any(disk["scanned"] for disk in report["disks"]), (
                "bitmap lost"
            )
        except AssertionError as err:
            raise AssertionError(f"{case}: {err}") from err
        cases += 1
    return cases


def restart(lab) -> None:
    """Start a QEMU that has ended; the guest then has what is in its images."""
    lab.machine.kill()
    for disk in lab.machine.disks:
        raw = lab.directory / "after.raw"
        command = [lab.machine.build.tool("qemu-img"), "convert", "-O", "raw", disk.path, raw]
        subprocess.run(command, check=True, timeout=60)
        lab.writer.model[disk.name][:] = raw.read_bytes()
    lab.machine.start()


def lab_at_an_incremental(build, make_lab, seed: int):
    lab = make_lab(build, {"vda": 4 << 20, "vdb": (2 << 20) + 512}, seed=seed)
    for kind in ("full", "incremental"):
        lab.writer.write(10)
        lab.backup(kind)
    return lab


@pytest.mark.needs_qemu("tests/exploration ends the simulator at every step")
@pytest.mark.timeout(200)
@pytest.mark.parametrize("termination", ["quit", "crash"])
def test_the_end_of_qemu_at_some_steps(build, make_lab, termination):
    lab = lab_at_an_incremental(build, make_lab, 9)
    assert (
        explore_terminations(lab, "incremental", termination, range(7, len(steps_of(lab, "incremental")), 35))
        >= 2
    )


@pytest.mark.slow
@pytest.mark.needs_qemu("tests/exploration ends the simulator at every step")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("shape", ["full", "incremental"])
@pytest.mark.parametrize("termination", ["quit", "crash"])
def test_the_end_of_qemu_at_every_step(build, make_lab, shape, termination, chunk, record_property):
    lab = lab_at_an_incremental(build, make_lab, chunk)
    cases = explore_terminations(lab, shape, termination, range(chunk, len(steps_of(lab, shape)), CHUNKS))
    record_property("cases", (f"QEMU {build.version} ends ({termination}) at a step: {shape}", cases))
    assert cases > 10
