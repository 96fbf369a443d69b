# SPDX-License-Identifier: GPL-2.0-or-later
"""Many VMs by one `run --all`, of every kind, some failing in seven ways: what is told, and to whom."""

import json
import os
import re
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from backupctl.repository.repository import Repository
from backupctl.system import image_lock
from fixtures import builds
from fixtures.machine import Disk, Machine
from tests.conftest import MIB
from tests.integration.test_run_all import SIZE, Host, codes
from tests.unit.cli.test_all_vms import Points
from tests.unit.monitoring import exposition_format
from tests.unit.points import P1, disk_entry

pytestmark = [
    pytest.mark.needs_qemu("two of the VMs are real ones"),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which takes root"),
]
FAILING = {"gone": 1, "silent": 1, "agentless": 1, "full": 1, "damaged": 4, "locked": 1, "hooked": 1}
"""The exit code of each."""


@dataclass
class Fleet:
    """VMs of three kinds, all in one configuration."""

    host: Host
    held: ExitStack

    def simulated(self, name: str) -> None:
        self.host.vm(name, 'freeze = "never"')

    def real(self, name: str) -> None:
        disk = Disk("vda", self.image(name))
        machine = self.held.enter_context(Machine(builds.build("installed"), [disk]))
        self.configure(name, f'qmp = "unix:{machine.qmp_path}"')

    def off(self, name: str) -> Path:
        image = self.image(name)
        self.configure(name, f'image = {{vda = "{image}"}}')
        return image

    def image(self, name: str) -> Path:
        """Make an image with some data in it."""
        directory = self.host.directory / name
        directory.mkdir()
        path = directory / "vda.qcow2"
        build = builds.build("installed")
        subprocess.run(
            [build.tool("qemu-img"), "create", "-q", "-f", "qcow2", path, str(SIZE)], check=True, timeout=60
        )
        subprocess.run(
            [build.tool("qemu-io"), "-c", "write -q -P 5 0 1M", path],
            check=True,
            timeout=60,
            capture_output=True,
        )
        return path

    def configure(self, name: str, *keys: str) -> None:
        self.host.text += "\n".join([f"[vm.{name}]", *keys, ""])
        self.host.config.write_text(self.host.text)

    def failing(self, number: int) -> list[str]:
        """Add a VM for each way to fail; return their names."""
        names = {kind: f"{kind}{number}" for kind in FAILING}
        self.host.vm(names["gone"], runs=False)
        self.host.vm(names["silent"], "command_timeout = 2", faults=("qmp:query-*@*=silent",))
        self.host.vm(
            names["agentless"], 'freeze = "require"', "agent_timeout = 2", faults=("agent:*@*=silent",)
        )
        self.host.vm(names["full"], f'repository = "{self.small(number)}"')
        self.host.vm(names["damaged"])
        self.host.vm(names["hooked"], f"[vm.{names['hooked']}.hooks]", 'before = ["/bin/false"]')
        points = Points(self.host.repository, names["damaged"])
        points.point(P1, (disk_entry(size=SIZE), [(0, b"a" * MIB)]))
        os.truncate(points.directory.path / P1 / "vda.qcow2", 65536)
        image = self.off(names["locked"])
        descriptor = os.open(image, os.O_RDWR)
        self.held.callback(os.close, descriptor)
        image_lock.keep_from_writers(descriptor)
        return list(names.values())

    def small(self, number: int) -> Path:
        """Make a repository in a file system that is too small for a full."""
        path = self.host.directory / f"small{number}"
        path.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
        if subprocess.run(mount, check=False, timeout=30).returncode:
            pytest.skip("no file system can be mounted here")
        self.held.callback(subprocess.run, ["umount", "-l", str(path)], check=True, timeout=30)
        Repository.create(path)
        return path


@pytest.fixture
def fleet(tmp_path: Path, held: ExitStack) -> Iterator[Fleet]:
    host = Host(tmp_path, held)
    (tmp_path / "metrics").mkdir()
    host.defaults(
        f'[run]\njobs = 4\n[metrics]\ntextfile = "{tmp_path}/metrics"\nstate = "{tmp_path}/state"\n'
    )
    return Fleet(host, held)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("simulated", "off", "failing"), [(2, 1, 1), pytest.param(24, 10, 2, marks=pytest.mark.slow)]
)
def test_many_vms_by_one_run_some_failing_in_seven_ways(
    fleet, tmp_path, record_property, simulated, off, failing
):
    """12 VMs, or 50: two of them real QEMUs, some off, the others simulated."""
    sound = [f"web{number}" for number in range(simulated)]
    for name in sound:
        fleet.simulated(name)
    for name in ("real0", "real1"):
        fleet.real(name)
    for number in range(off):
        fleet.off(f"off{number}")
    sound += ["real0", "real1", *(f"off{number}" for number in range(off))]
    bad = [name for number in range(failing) for name in fleet.failing(number)]
    expected = dict.fromkeys(sound, 0) | {name: FAILING[name.rstrip("01")] for name in bad}

    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = fleet.host.start("run", "--all")
    document, told = process.communicate(timeout=800)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = json.loads(document)

    assert codes(found) == expected
    assert (process.returncode, found["exit_code"]) == (4, 4), "the worst of all"
    for one in found["vms"]:
        assert (one["error"] is None) == (one["exit_code"] == 0)
    for name in bad:
        assert f"backupctl: {name}: " in told, "each failure is told with the name of its VM"
    assert "Traceback" not in told
    for name in sound:
        assert len(fleet.host.points(name)) == 1
        assert fleet.host.unfinished(name) == []
    # The metrics of each.
    for name, code in expected.items():
        metrics = exposition_format.read((tmp_path / "metrics" / f"backupctl-{name}.prom").read_text())
        assert metrics["backupctl_last_run_success"].value == (code == 0), name
        assert bool(metrics["backupctl_last_run_info"].labels["reason"]) == (code != 0), name
    # The page shows all of them; one with damage is no reason to leave out another.
    page = tmp_path / "page.html"
    report, _ = fleet.host.run("report", "--html", str(page), code=4)
    states = {vm["vm"]: vm["state"] for each in report["repositories"] for vm in each["vms"]}
    assert states.keys() == expected.keys()
    assert {name for name, state in states.items() if state == "OK"} == set(sound)
    assert set(re.findall(r'data-vm="?([a-z0-9]+)', page.read_text())) == expected.keys()
    seconds = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    record_property("cases", (f"VMs by one run, {seconds / len(expected):.2f} CPU s each", len(expected)))
    print(
        f"{len(expected)} VMs: {time.monotonic() - begun:.1f} s, {seconds:.1f} CPU s, largest process "
        f"{used.ru_maxrss >> 10} MiB"
    )
