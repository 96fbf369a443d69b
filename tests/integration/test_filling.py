# SPDX-License-Identifier: GPL-2.0-or-later
"""What we fill is never filled to the last byte where a VM's image may need it, whatever QEMU calls that."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fixtures.machine import Machine
from fixtures.proxy import Proxy
from fixtures.shapes import Nodes, over, shaped

MIB = 1 << 20
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which takes root")
GIVEN_UP = "gave up before the guest's own writes could fail"


@pytest.fixture
def mount(held):
    """Mount a tmpfs of so many MiB on a directory; again to change its size."""

    def mount(directory: Path, size_mib: int) -> Path:
        if directory.is_mount():
            subprocess.run(["mount", "-o", f"remount,size={size_mib}m", directory], check=True, timeout=30)
            return directory
        directory.mkdir(exist_ok=True)
        options = ["-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs"]
        if subprocess.run(["mount", *options, directory], check=False, timeout=30).returncode:
            pytest.skip("no file system can be mounted here")
        held.callback(subprocess.run, ["umount", "-l", directory], check=True, timeout=30)
        return directory

    return mount


def relative(node: Nodes) -> Nodes:
    node["file"]["filename"] = os.path.relpath(node["file"]["filename"])
    return node


def fdset(node: Nodes) -> Nodes:
    node["file"]["filename"] = "/dev/fdset/7"
    return node


class FdsetMachine(shaped(fdset)):
    """A QEMU that is handed its disk as a descriptor."""

    def program(self) -> list[str]:
        handed = f'exec "$0" "$@" -add-fd fd=9,set=7 9<>"{self.disks[0].path}"'
        return ["sh", "-c", handed, *super().program()]


KINDS: dict[str, type[Machine]] = {
    "relative": shaped(relative),
    "filter": shaped(lambda node: over("throttle", **{"throttle-group": "slow"})(relative(node))),
    "fdset": FdsetMachine,
    "luks": shaped(
        lambda node: {**relative(node), "driver": "luks", "key-secret": "key"},
        *("-f", "luks", "--object", "secret,id=key,data=open", "-o", "key-secret=key,iter-time=10"),
    ),
}


def data_file(directory: Path) -> type[Machine]:
    """A disk whose image lies elsewhere than its data."""
    return shaped(dict, "-f", "qcow2", "-o", f"data_file={directory}/data,data_file_raw=on")


def told_of(lab, directory: Path) -> list[dict[str, str]]:
    findings = json.loads(lab.cli.call("doctor", "web", "--json").stdout)["findings"]
    return [one for one in findings if f"file system of {directory}: " in one["said"]]


@pytest.mark.parametrize(
    "name", ["filter", *(pytest.param(name, marks=pytest.mark.slow) for name in KINDS if name != "filter")]
)
def test_a_repository_beside_the_guests_disk_is_known_whatever_qemu_calls_it(
    name, build, make_lab, mount, tmp_path
):
    mount(tmp_path, 330)
    lab = make_lab(build, {"vda": 32 * MIB}, kind_of_machine=KINDS[name])
    lab.writer.do("vda", "data", 0, 32 * MIB, 0x33)
    told = lab.backup("full", code=1)["error"]
    assert GIVEN_UP in told["message"]
    assert "rolled back" in told["state"]
    assert set(lab.machine.leftovers()) <= {"fdset 7"}


def test_the_data_file_of_a_disk_counts_and_a_repository_apart_does_not(any_build, make_lab, mount, tmp_path):
    data, repository = mount(tmp_path / "data-directory", 100), mount(tmp_path / "repository", 60)
    lab = make_lab(any_build, {"vda": 8 * MIB}, kind_of_machine=data_file(data))
    lab.backup("full")  # 60 MiB of its own, and no guest needs them
    assert told_of(lab, repository) == []
    lab.cli.repository = data / "repository"
    (told,) = told_of(lab, data)
    assert (told["verdict"], f"{data}/data" in told["said"]) == ("bad", True)
    assert GIVEN_UP in lab.backup("full", code=1)["error"]["message"]
    assert repository.is_mount()


def test_a_name_that_nobody_can_look_up_counts_as_there(any_build, make_lab, mount, tmp_path):
    """The socket's other end is no QEMU: it may be a tunnel, and its QEMU on another machine."""
    lab = make_lab(any_build, {"vda": 8 * MIB}, kind_of_machine=KINDS["relative"])
    mount(lab.cli.repository, 100)
    lab.backup("full")
    path = lab.machine.directory / "proxy"
    with Proxy(path, lab.machine.qmp_path):
        lab.cli.vm[1] = f"unix:{path}"
        message = lab.backup("incremental", code=1)["error"]["message"]
    assert "of the VM may be on it; its path cannot be looked up from here" in message


def test_a_scratch_directory_beside_a_disk_leaves_room_to_the_guest(any_build, make_lab, mount, tmp_path):
    lab = make_lab(any_build, {"vda": 64 * MIB})
    lab.cli.scratch = mount(tmp_path / "images", 300)
    lab.backup("full", "--scratch-size", "100M")
    other = make_other(lab, lab.cli.scratch)
    with other:
        told = lab.backup("full", "--scratch-size", "100M", code=1)["error"]
        assert "beside 256 MiB for the guests" in told["message"]
        mount(lab.cli.scratch, 400)
        lab.backup("full", "--scratch-size", "100M")


def make_other(lab, directory: Path) -> Machine:
    """Return another VM, with its disk in a directory."""
    disk = lab.machine.disks[0].__class__("vdx", directory / "other.raw", "raw")
    disk.path.write_bytes(bytes(MIB))
    return Machine(lab.machine.build, [disk])


def test_a_restore_ends_before_it_takes_the_room_of_other_vms(any_build, make_lab, mount, tmp_path):
    lab = make_lab(any_build, {"vda": 32 * MIB})
    lab.writer.do("vda", "data", 0, 32 * MIB, 0x33)
    point = lab.backup("full")["point"]
    directory = mount(tmp_path / "images", 280)
    target = directory / "vda.raw"
    restore = ("restore", "web", point, "--to", str(target))
    with make_other(lab, directory):
        told = lab.cli.json(*restore, code=1, vm=False)["error"]
        assert "other.raw of the VM of process" in told["message"]
        assert os.listdir(directory) == ["other.raw"]
    lab.cli.run(*restore, vm=False)
    assert target.read_bytes() == lab.writer.moment["vda"]


@contextmanager
def served(program: str, image: Path, path: Path) -> Iterator[int]:
    """Serve an image, as to a VM elsewhere; yields the process."""
    command = ["qemu-nbd", "-f", "raw", "-t", "-k", str(path), str(image)]
    if program == "qemu-storage-daemon":
        command = [
            *(program, "--blockdev", f"driver=file,node-name=disk,filename={image}"),
            *("--nbd-server", f"addr.type=unix,addr.path={path}"),
            *("--export", "type=nbd,id=disk,node-name=disk,writable=on"),
        ]
    with subprocess.Popen(command) as server:
        try:
            while not path.exists():
                assert server.poll() is None
                time.sleep(0.02)
            yield server.pid
        finally:
            server.terminate()


@pytest.mark.parametrize("server", ["qemu-storage-daemon", "qemu-nbd"])
def test_a_restore_ends_before_it_takes_the_room_of_a_disk_that_is_served(
    any_build, make_lab, mount, server, tmp_path
):
    lab = make_lab(any_build, {"vda": 32 * MIB})
    lab.writer.do("vda", "data", 0, 32 * MIB, 0x33)
    point = lab.backup("full")["point"]
    directory = mount(tmp_path / "images", 280)
    (directory / "other.raw").write_bytes(bytes(MIB))
    restore = ("restore", "web", point, "--to", str(directory / "vda.raw"))
    with served(server, directory / "other.raw", tmp_path / "nbd") as process:
        told = lab.cli.json(*restore, code=1, vm=False)["error"]
        assert f"other.raw of the disk server of process {process}" in told["message"]
        assert os.listdir(directory) == ["other.raw"]
    lab.cli.run(*restore, vm=False)


def test_a_merge_ends_before_it_takes_the_room_of_other_vms(any_build, make_lab, mount, tmp_path):
    lab = make_lab(any_build, {"vda": 32 * MIB})
    mount(lab.cli.repository, 500)
    points = []
    for kind, value in (("full", 0x11), ("incremental", 0x22), ("incremental", 0x33)):
        lab.writer.do("vda", "data", 0, 16 * MIB, value)
        lab.writer.remember()
        points.append(lab.backup(kind, "--freeze", "never")["point"])
    moment = bytes(lab.writer.model["vda"])
    prune = ("prune", "web", "--keep-last", "1")
    mount(lab.cli.repository, 270)
    with make_other(lab, lab.cli.repository):
        told = lab.cli.json(*prune, code=1, vm=False)["error"]
        assert "other.raw of the VM of process" in told["message"]
    assert lab.cli.raw(points[-1], "vda", tmp_path) == moment
    lab.cli.run(*prune, vm=False)
    assert lab.cli.raw(points[-1], "vda", tmp_path) == moment
