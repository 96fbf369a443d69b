# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl run` of several VMs: each ends as it would alone, and nothing of one reaches another."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from backupctl.drills.fork_server import CallSpec
from backupctl.drills.simulated_vm import SimulatedVm
from backupctl.names import VmName
from backupctl.repository.repository import Repository
from fixtures import fork_server
from tests.conftest import MIB, ROOT, SECONDS
from tests.unit.cli.test_all_vms import Points
from tests.unit.points import P1, disk_entry

SIZE = 2 * MIB


@dataclass
class Host:
    """Simulated VMs, one repository, and a configuration that names them."""

    directory: Path
    held: ExitStack

    def __post_init__(self) -> None:
        self.repository = Repository.create(self.directory / "r")
        self.config = self.directory / "backupctl.toml"
        self.text = f'[defaults]\nrepository = "{self.directory}/r"\nscratch = "{self.directory}"\n'
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "BACKUPCTL_CONFIG": str(self.config)}

    def defaults(self, text: str) -> None:
        self.text += text

    def vm(self, name: str, *keys: str, runs: bool = True, faults: tuple[str, ...] = ()) -> None:
        """Add a VM; one that runs has a simulator."""
        directory = self.directory / name
        directory.mkdir()
        self.text += "\n".join([f'[vm.{name}]\nqmp = "unix:{directory}/qmp"', *keys, ""])
        self.config.write_text(self.text)
        if runs:
            options = [word for fault in faults for word in ("--fault", fault)]
            simulator = SimulatedVm(name, directory, [f"vda={SIZE}"], options, fork_server.shared())
            self.held.enter_context(simulator).order("write", disk="vda", offset=0, length=SIZE, pattern=7)

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "backupctl", *words]

    def run(self, *words: str, code: int) -> tuple[Any, str]:
        """Call the command line with --json; return its document, and what was told meanwhile."""
        called = CallSpec([*words, "--json"], self.environment, str(self.directory))
        done = fork_server.shared().run(called, SECONDS)
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return json.loads(done.stdout), done.stderr

    def start(self, *words: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            self.command(*words, "--json"),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.held.enter_context(process)
        return process

    def points(self, vm: str) -> list[str]:
        return [one.id for one in self.repository.vm(VmName(vm)).points()]

    def tree(self) -> dict[str, tuple[int, bytes]]:
        """Return all that there is in the repository, with the time of its last change."""
        return {
            str(path): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
            for path in sorted((self.directory / "r").rglob("*"))
        }

    def unfinished(self, *vms: str) -> list[Path]:
        return [path for vm in vms for path in (self.directory / "r" / vm).glob("*.partial/vda.qcow2")]


@pytest.fixture
def host(tmp_path: Path, held: ExitStack) -> Iterator[Host]:
    return Host(tmp_path, held)


def until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def codes(document: Any) -> dict[str, int]:
    return {one["vm"]: one["exit_code"] for one in document["vms"]}


def outcomes(document: Any) -> dict[str, dict[str, str]]:
    return {one["vm"]: {task["task"]: task["outcome"] for task in one["tasks"]} for one in document["vms"]}


def test_what_fails_for_one_vm_is_told_and_stops_no_other(host):
    """Two that are well, and seven that are not, each in its own way."""
    host.defaults("verify_percent = 100\nkeep_last = 1\n[run]\njobs = 2\n")
    host.vm("web1", 'freeze = "never"')
    host.vm("web2")
    host.vm("off", runs=False)
    host.vm("busy", runs=False)
    host.vm("rotten", "keep_last = 2")
    host.vm("stuck", faults=("qmp:blockdev-del@*=error:no",))
    host.vm("agentless", 'freeze = "require"')
    host.vm("blocked", runs=False)
    host.vm("unmounted", f'repository = "{host.directory}/mnt"', runs=False)
    (host.directory / "r" / "blocked").write_text("")
    rotten = Points(host.repository, "rotten")
    rotten.point(P1, (replace(disk_entry(), size=SIZE), [(0, b"a" * MIB)]))
    image = rotten.directory.path / P1 / "vda.qcow2"
    image.write_bytes(image.read_bytes().replace(b"a" * 65536, b"a" * 65535 + b"x", 1))
    with host.repository.vm(VmName("busy")).lock():
        before = host.tree()
        planned, _ = host.run("run", "web1", "off", "busy", "rotten", "--dry-run", code=1)
        assert host.tree() == before
        document, told = host.run("run", "--all", code=3)
    ended = {"web1": 0, "web2": 0, "off": 1, "busy": 75, "rotten": 4}
    assert codes(document) == ended | {"stuck": 3, "agentless": 1, "blocked": 1, "unmounted": 2}
    assert document["exit_code"] == 3
    done = dict.fromkeys(("backup", "prune", "verify"), "done")
    assert outcomes(document)["web1"] == outcomes(document)["web2"] == done
    assert outcomes(document)["rotten"] == {**done, "verify": "failed"}
    assert outcomes(document)["off"] == {"backup": "failed", "prune": "skipped", "verify": "skipped"}
    assert [len(host.points(vm)) for vm in ("web1", "web2", "rotten")] == [1, 1, 2]
    for one in document["vms"]:
        assert (one["error"] is None) == (one["exit_code"] == 0)
        if one["error"]:
            assert f"backupctl: {one['vm']}: " in told
    needs = next(one for one in document["vms"] if one["vm"] == "stuck")
    assert needs["error"]["next"] == f"backupctl recover stuck --config {host.config}"
    # What was foretold. A full of what is not there yet is of the whole disk.
    foretold = {one["vm"]: one for one in planned["vms"]}
    assert codes(planned) == {"web1": 0, "off": 1, "busy": 75, "rotten": 0}
    plan = foretold["web1"]["tasks"][0]["report"]
    assert (plan["kind"], plan["most_bytes"]) == ("full", SIZE)


def slow(host: Host) -> None:
    host.defaults('limit = "200K"\n[run]\njobs = 2\n')
    for vm in ("web", "db", "shop"):
        host.vm(vm)


def test_a_run_that_is_asked_to_end_has_every_vm_roll_back(host):
    slow(host)
    process = host.start("run", "--all")
    until(lambda: len(host.unfinished("web", "db")) == 2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, err
    document = json.loads(out)
    assert codes(document) == {"web": 1, "db": 1, "shop": 1}
    assert "stopped before it was started" in document["vms"][2]["error"]["message"]
    assert {one["error"]["kind"] for one in document["vms"]} == {"Interrupted"}
    assert list((host.directory / "r").glob("*/*.partial")) == []
    host.run("run", "web", "--limit", "100M", code=2)  # no option of a run of this kind


def test_a_run_that_is_killed_has_every_vm_roll_back_and_the_next_run_goes_on(host):
    slow(host)
    process = host.start("run", "--all")
    until(lambda: len(host.unfinished("web", "db")) == 2)
    process.kill()
    process.wait()
    until(lambda: not list((host.directory / "r").glob("*/*.partial")))
    host.config.write_text(host.text.replace('limit = "200K"\n', ""))
    document, _ = host.run("run", "--all", "--wait-lock", "30", code=0)
    assert [len(host.points(vm)) for vm in codes(document)] == [1, 1, 1]
    assert [one["notes"][0]["code"] for one in document["vms"]] == ["no-point-to-build-on"] * 3


def test_the_process_of_one_vm_that_is_killed_is_told_and_the_next_run_recovers(host):
    slow(host)
    process = host.start("run", "web", "db")
    until(lambda: len(host.unfinished("web", "db")) == 2)
    killed = json.loads(next((host.directory / "r" / "web").glob("*.partial/run.json")).read_text())["pid"]
    os.kill(killed, signal.SIGKILL)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 3, err
    document = json.loads(out)
    assert codes(document) == {"web": 3, "db": 0}
    assert "was ended by SIGKILL" in document["vms"][0]["error"]["message"]
    host.config.write_text(host.text.replace('limit = "200K"\n', ""))
    document, _ = host.run("run", "web", code=0)
    assert "recovered-from-earlier-run" in {note["code"] for note in document["vms"][0]["notes"]}


def test_by_its_policies_a_vm_is_backed_up_pruned_and_verified(any_build, make_lab):
    lab = make_lab(any_build)
    config = lab.directory / "backupctl.toml"
    config.write_text('[vm.web]\nkeep_last = 2\nverify_percent = 100\nfull_every = "30d"\n')
    lab.cli.environment["BACKUPCTL_CONFIG"] = str(config)
    lab.writer.write(10)
    lab.backup("full")
    moments = {}
    for _ in range(2):
        lab.writer.write(5)
        (told,) = lab.cli.json("run", "web")["vms"]
        tasks = {one["task"]: one for one in told["tasks"]}
        assert {one["outcome"] for one in tasks.values()} == {"done"}
        assert tasks["backup"]["report"]["kind"] == "incremental"
        assert tasks["verify"]["report"]["read_bytes"] > 0
        moments[tasks["backup"]["report"]["point"]] = dict(lab.writer.moment)
    kept = [point["point"] for point in lab.cli.json("list", "web", vm=False)]
    assert kept == list(moments)  # and not the first full
    for point in kept:
        lab.assert_point(point, moments[point])
    lab.assert_at_rest()
