# SPDX-License-Identifier: GPL-2.0-or-later
"""Copies of a repository as docs/off-site.md makes them, while runs and prunes go on."""

import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from fixtures import builds
from tests.conftest import ROOT, Lab

pytestmark = pytest.mark.timeout(300)
SIZES = {"vda": 1 << 20}
COPIES = 4


def commands(lab: Lab, copy: Path) -> str:
    """Return the page's own commands, for places of this test."""
    page = (ROOT / "docs/off-site.md").read_text()
    block = re.findall(r"^    flock .*?\n\n", page, re.DOTALL | re.MULTILINE)[0]
    text = block.partition("    ssh")[0].replace("backup2:/backup", str(copy))
    return "set -e\n" + text.replace("/backup/", f"{lab.cli.repository}/")


def copied(lab: Lab, copy: Path) -> None:
    subprocess.run(["/bin/bash", "-c", commands(lab, copy)], check=True, timeout=120)


@pytest.fixture
def lab(make_lab):
    if shutil.which("rsync") is None:
        pytest.skip("needs rsync")
    return make_lab(builds.simulator("10.0"), SIZES)


def verify(lab: Lab, repository: Path, code: int = 0) -> None:
    """Verify all of a repository, with its data."""
    command = [*lab.cli.command("verify", "web", vm=False), "--repository", str(repository)]
    done = subprocess.run(
        command, env=lab.cli.environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr


def points(repository: Path) -> list[str]:
    return sorted(path.name for path in (repository / "web").iterdir() if path.is_dir())


def test_each_copy_that_is_made_while_runs_and_prunes_go_on_is_sound(lab, tmp_path):
    copy, over = tmp_path / "copy", threading.Event()
    copy.mkdir()
    lab.backup("full")
    ended: list[int] = []

    def work() -> None:
        while not over.is_set():
            lab.writer.write(5)
            ended.append(lab.cli.call("incremental", "web", "--json").returncode)
            ended.append(lab.cli.call("prune", "web", "--keep-last", "2", vm=False).returncode)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        seen = []
        for _ in range(COPIES):
            copied(lab, copy)
            verify(lab, copy)
            seen.append(points(copy))
    finally:
        over.set()
        worker.join()
    assert set(ended) <= {0, 75}
    assert 0 in ended
    assert len({tuple(each) for each in seen}) > 1, "nothing went on meanwhile"
    assert not any(name.endswith(".partial") for each in seen for name in each)


def test_a_layer_that_changes_within_a_second_is_copied_again(lab, tmp_path):
    copy, second = tmp_path / "copy", 1_700_000_000 * 10**9
    copy.mkdir()
    layer = lab.cli.repository / "web" / lab.backup("full")["point"] / "vda.qcow2"
    for content, time_ns in ((b"as it was", second), (b"as it is ", second + 10**6)):
        layer.write_bytes(content)
        os.utime(layer, ns=(time_ns, time_ns))
        copied(lab, copy)
    assert (copy / layer.relative_to(lab.cli.repository)).read_bytes() == b"as it is "


def test_a_copy_restores_what_the_original_does(lab, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    lab.backup("full")
    lab.writer.write(5)
    point = lab.backup("incremental")["point"]
    (lab.cli.repository / "web/20990101T000000Z.partial").mkdir()
    copied(lab, copy)
    assert points(copy) == [name for name in points(lab.cli.repository) if not name.endswith(".partial")]
    shutil.rmtree(lab.cli.repository)
    copy.rename(lab.cli.repository)
    lab.assert_point(point, lab.writer.moment)


def test_a_run_that_meets_a_copy_ends_with_75_and_names_its_process(lab):
    lab.backup("full")
    holder = subprocess.Popen(["flock", lab.cli.repository / "web/lock", "sh", "-c", "echo; read x"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        failed = lab.cli.run("incremental", "web", code=75)
        assert f"process {holder.pid} (flock) keeps web of this repository locked" in " ".join(
            failed.stderr.split()
        )
    finally:
        holder.communicate(b"\n", timeout=30)
    assert lab.backup("incremental")["kind"] == "incremental"


def test_a_hook_copies_after_each_backup(lab, tmp_path):
    """The lock is free by then, or the hook would wait for its own run."""
    copy, script = tmp_path / "copy", tmp_path / "copy-backup"
    copy.mkdir()
    page = (ROOT / "docs/off-site.md").read_text()
    (body,) = re.findall(r"^    (#!/bin/sh\n.*?)\n\n", page, re.DOTALL | re.MULTILINE)
    script.write_text(
        re.sub(r"^    ", "", body, flags=re.MULTILINE).replace("backup2:/backup", str(copy)) + "\n"
    )
    script.chmod(0o700)
    config = tmp_path / "backupctl.toml"
    config.write_text(f"[hooks]\nafter = {json.dumps([str(script)])}\ntimeout = 30\n[vm.web]\n")
    lab.cli.environment["BACKUPCTL_CONFIG"] = str(config)
    report = lab.backup("full")
    assert report["warnings"] == []
    verify(lab, copy)
    assert points(copy) == [report["point"]]
