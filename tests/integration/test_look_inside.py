# SPDX-License-Identifier: GPL-2.0-or-later
"""Points of a real run looked into, booted from, and put back onto the VM's own disk."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from fixtures import builds
from fixtures.guest import Guest
from fixtures.machine import Disk, Machine
from tests.integration.test_guest import assert_unharmed
from tests.unit.repository.test_repository_page import READER

MIB = 1 << 20
_READER = 65534


@pytest.mark.simulator_too
def test_every_way_to_a_point_of_a_real_run_shows_the_same_bytes(build, make_lab, tmp_path):
    """serve, a thin restore, the page's reader, and diff agree with what the guest had written."""
    lab = make_lab(build)
    lab.writer.write(10)
    first, before = lab.backup("full")["point"], dict(lab.writer.moment)
    lab.writer.write(5)
    second, after = lab.backup("incremental")["point"], dict(lab.writer.moment)
    _assert_diff(lab, first, second, before, after)
    for point, moment in ((first, before), (second, after)):
        thin = tmp_path / f"thin-{point}"
        lab.cli.run("restore", "web", point, "--to", f"{thin}/", "--thin", vm=False)
        for disk, content in moment.items():
            assert _raw(lab, thin / f"{disk}.qcow2", "qcow2") == content
        assert _served(lab, point) == moment
        _assert_reader(lab, point, moment, tmp_path)


def _raw(lab, image, image_format: str) -> bytes:
    out = lab.directory / "looked.raw"
    command = [lab.machine.build.tool("qemu-img"), "convert", "-f", image_format, "-O", "raw", image, out]
    subprocess.run(command, check=True, timeout=60)
    return out.read_bytes()


def _served(lab, point: str) -> dict[str, bytes]:
    command = [*lab.cli.command("serve", "web", point, vm=False), "--json"]
    with subprocess.Popen(command, env=lab.cli.environment, stdout=subprocess.PIPE, text=True) as child:
        try:
            text = ""
            while not text.endswith("\n}\n"):
                line = child.stdout.readline()
                assert line, "serve ended early"
                text += line
            found = {one["disk"]: _raw(lab, one["uri"], "raw") for one in json.loads(text)["exports"]}
        finally:
            child.terminate()
            child.wait(60)
    assert child.returncode == 0
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="connects as other users, which takes root")
def test_a_user_who_is_given_the_socket_can_connect_and_no_other_user_can(make_lab):
    """The way of docs/rights.md for file systems that `files` does not read."""
    lab = make_lab(builds.simulator("10.0"), {"vda": 2 * MIB})
    point = lab.backup("full")["point"]
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o711)
        path = Path(name, "web.sock")
        command = [*lab.cli.command("serve", "web", point, "--socket", str(path), vm=False), "--json"]
        with subprocess.Popen(command, env=lab.cli.environment, stdout=subprocess.PIPE) as server:
            try:
                assert server.stdout.readline() == b"{\n"
                assert "PermissionError" in _greeting(path, _READER)
                os.chown(path, _READER, -1)
                assert "NBDMAGICIHAVEOPT" in _greeting(path, _READER)
                assert "PermissionError" in _greeting(path, _READER - 1)
            finally:
                server.terminate()
                assert server.wait(60) == 0
        assert not path.exists()


def _greeting(path: Path, user: int) -> str:
    """Return what a server says first, or the error, to a user without any rights."""
    program = (
        "import socket, sys\ns = socket.socket(socket.AF_UNIX)\ns.settimeout(30)\n"
        "s.connect(sys.argv[1])\nprint(s.recv(16, socket.MSG_WAITALL))"
    )
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-c", program, path],
        user=user,
        group=user,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout + done.stderr


def _assert_diff(lab, first: str, second: str, before: dict[str, bytes], after: dict[str, bytes]) -> None:
    for one in lab.cli.json("diff", "web", first, second, vm=False)["disks"]:
        old, new = before[one["name"]], after[one["name"]]
        changed = {
            at // 65536
            for area in one["ranges"]
            for at in range(area["offset"], area["offset"] + area["length"], 65536)
        }
        really = {
            at // 65536 for at in range(0, len(new), 65536) if old[at : at + 65536] != new[at : at + 65536]
        }
        assert changed == really


def _assert_reader(lab, point: str, moment: dict[str, bytes], directory) -> None:
    for disk, content in moment.items():
        (directory / "moment.raw").write_bytes(content)
        arguments = [str(lab.cli.repository), "web", point, disk, str(directory / "moment.raw")]
        command = [sys.executable, "-I", "-c", READER, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_a_vm_put_back_in_place_goes_on_with_its_chain(build, make_lab, tmp_path, image_format):
    """The VM is shut down, its own disk brought to an older point, and booted: the next incremental is right.

    The bitmap in a qcow2 has recorded what was put back; a raw disk has none, and is read whole.
    """
    lab = make_lab(build, {"vda": 16 * MIB}, formats={"vda": image_format})
    lab.writer.write(10)
    first, wanted = lab.backup("full")["point"], lab.writer.moment["vda"]
    lab.writer.write(5)
    lab.backup("incremental")
    lab.writer.write(5)
    disk = lab.machine.disks[0].path
    lab.machine.quit()
    command = ["restore", "web", first, "--to", str(disk), "--only-changed"]
    (report,) = lab.cli.json(*command, vm=False)["disks"]
    assert 0 < report["written_bytes"] < 16 * MIB
    assert _raw(lab, disk, image_format) == wanted
    with Machine(build, [Disk("vda", disk, image_format)]) as machine:
        lab.cli.vm[:] = ["--qmp", f"unix:{machine.qmp_path}"]
        after = lab.backup("incremental")
        assert after["disks"][0]["scanned"] == (image_format == "raw")
        assert lab.cli.raw(after["point"], "vda", tmp_path) == wanted


@pytest.mark.guest
@pytest.mark.timeout(300)
def test_a_real_guest_boots_at_once_from_a_thin_restore(any_build, boot, tmp_path):
    """It mounts the file system of the point, writes on, and the point below is as it was."""
    guest, cli = boot(any_build)
    guest.tell("load")
    time.sleep(1)
    point = cli.json("full", "web", "--freeze", "require")["point"]
    guest.tell("stop")
    guest.quit()
    image = cli.repository / "web" / point / "vda.qcow2"
    before = image.read_bytes()
    cli.run("restore", "web", point, "--to", f"{tmp_path}/thin/", "--thin", vm=False)
    with Guest(any_build, [Disk("vda", tmp_path / "thin" / "vda.qcow2", "qcow2")]) as again:
        again.tell("load")
        time.sleep(1)
        again.tell("stop")
        assert assert_unharmed(again) > 0
    assert image.read_bytes() == before
