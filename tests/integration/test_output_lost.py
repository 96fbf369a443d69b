# SPDX-License-Identifier: GPL-2.0-or-later
"""Standard output that is full, closed, or read by nobody: what is done is told as done all the same."""

import subprocess
import sys
from pathlib import Path

import pytest

from backupctl.names import vm_name
from backupctl.repository.repository import Repository
from fixtures import builds

SIZES = {"vda": 1 << 20}


@pytest.fixture
def lab(make_lab):
    return make_lab(builds.simulator("10.0"), SIZES)


def call(lab, *arguments: str, vm: bool, shell: str) -> "subprocess.CompletedProcess[str]":
    """Call the command line with its output as the shell says."""
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$@" {shell}', "bash", *lab.cli.command(*arguments, vm=vm)],
        env=lab.cli.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("shell", [">/dev/full", "| true"], ids=["full", "left"])
@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
def test_a_committed_point_is_no_failure_though_its_report_is_lost(lab, shell, options):
    done = call(lab, "full", "web", *options, vm=True, shell=shell)
    points = lab.cli.json("list", "web", vm=False)
    assert [done.returncode, len(points)] == [0, 1]
    assert "rolled back" not in done.stderr
    if shell == ">/dev/full":
        point = points[0]["point"]
        assert f"the recovery point {point} of web is committed" in done.stderr
        assert "No space left on device" in done.stderr


def test_a_reader_that_has_seen_enough_ends_a_list_quietly(tmp_path):
    Repository.create(tmp_path / "r")
    command = [sys.executable, "-m", "backupctl", "list", "--repository", str(tmp_path / "r")]
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" | true', "bash", *command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_list_that_can_not_be_written_is_a_failure_and_says_why(tmp_path):
    Repository.create(tmp_path / "r")
    command = [sys.executable, "-m", "backupctl", "list", "--repository", str(tmp_path / "r")]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert done.returncode == 1
    assert "cannot write to standard output: No space left on device" in done.stderr


def test_damage_is_told_by_the_exit_code_though_nobody_reads_the_report(tmp_path):
    directory = Repository.create(tmp_path / "r").vm(vm_name("web")).path
    (directory / "20260101T000000Z").mkdir(parents=True)
    command = [sys.executable, "-m", "backupctl", "verify", "--repository", str(tmp_path / "r")]
    for target in ("/dev/full", "/dev/null"):
        with Path(target).open("w") as output:
            done = subprocess.run(
                command, stdout=output, stderr=subprocess.PIPE, text=True, timeout=60, check=False
            )
        assert done.returncode == 4
