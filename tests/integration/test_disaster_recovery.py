# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/disaster-recovery.md, played: the host is gone, the repository is there, and the VM boots again."""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from backupctl.system.address import Address
from backupctl.vm.guest.agent import Agent
from fixtures import guest as guests
from fixtures.debian import CannotBeHad
from fixtures.libvirt_guest import Guest as LibvirtGuest
from fixtures.libvirtd import Libvirtd
from fixtures.machine import line_socket
from tests.conftest import MIB, ROOT, Cli

PAGE = (ROOT / "docs/disaster-recovery.md").read_text()


def steps(heading: str) -> list[str]:
    """Return the commands of one section of the page."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^```sh\n(.*?)\n^```", section, re.DOTALL | re.MULTILINE)


def play(text: str, places: dict[str, str], directory: Path) -> str:
    """Run a command of the page, with the places of the test for those of the page."""
    text = re.sub("|".join(map(re.escape, places)), lambda found: places[found[0]], text)
    # No configuration of the old host, and nothing but what the page says.
    around = {name: value for name, value in os.environ.items() if not name.startswith("BACKUPCTL_CONFIG")}
    around |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["/bin/sh", "-ec", text],
        cwd=directory,
        env=around,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.guest
@pytest.mark.timeout(600)
@pytest.mark.needs_qemu("the simulator boots no guest")
def test_a_vm_of_plain_qemu_boots_on_a_new_host_from_the_repository_alone(boot, any_build, tmp_path):
    guest, cli = boot(any_build, 64 * MIB)
    guest.tell("files 3")
    point = cli.json("full", "web", "--freeze", "require")["point"]
    guest.kill()
    (tmp_path / "vda.qcow2").unlink()
    new_host = tmp_path / "new"
    new_host.mkdir(mode=0o700)
    restore, script, replace, start = steps("A VM of plain QEMU")
    places = {
        "/backup": str(cli.repository),
        "/srv/web/": f"{new_host}/web/",
        "/var/lib/qemu/web.qcow2": str(tmp_path / "vda.qcow2"),
    }
    play(restore, places, new_host)
    here = new_host / "web/definition"
    assert json.loads((here / "qemu.json").read_text())["command_line"][0] == any_build.system[0]
    play(script, places, here)
    play(replace, places, here)
    for name in ("qmp", "qmp2", "ctl", "ga"):
        (guest.directory / name).unlink(missing_ok=True)
    command = ["setpriv", "--pdeathsig=KILL", *shlex.split(start)]
    guest.process = subprocess.Popen(command, cwd=here, stdin=subprocess.DEVNULL)
    guest.wait_ready()
    assert guest.tell("status").startswith("rw errors=0 kernel=0")
    with Agent.connect(Address(path=str(guest.agent_path)), 60.0) as agent:
        assert agent.freeze_status() == "thawed"
    guest.kill()
    raw = tmp_path / "vda.raw"
    raw.write_bytes(cli.raw(point, "vda", tmp_path))
    guests.check_file_system(raw)
    assert guests.check_journal(raw, tmp_path) == 3


@pytest.mark.guest
@pytest.mark.timeout(600)
def test_a_domain_of_libvirt_boots_on_a_new_host_from_the_repository_alone(held, tmp_path):
    libvirt = pytest.importorskip("libvirt", reason="python3-libvirt is not installed")
    path = tmp_path / "vda.qcow2"
    guests.make_disk(path, 64 * MIB, "qemu-img")
    network = "<interface type='user'><mac address='52:54:00:11:22:33'/><model type='virtio'/></interface>"
    try:
        old_host, new_host = held.enter_context(Libvirtd()), held.enter_context(Libvirtd())
        guest = LibvirtGuest(old_host, path, network)
    except CannotBeHad as err:
        pytest.skip(str(err))
    held.callback(guest.close)
    guest.start()
    scratch = Path(tempfile.mkdtemp(prefix="s-", dir=old_host.directory))
    around = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    cli = Cli(tmp_path / "repository", around, scratch, guest.arguments)
    guest.tell("files 3")
    cli.json("full", "web", "--freeze", "require")
    uuid = guest.handle().UUIDString()
    guest.close()
    path.unlink()
    old_host.kill_daemon(stay_down=True)

    restore, look = steps("A VM of libvirt")
    images = tmp_path / "images"
    images.mkdir()
    places = {
        "/backup": str(cli.repository),
        "/var/lib/libvirt/images/web/": f"{images}/web/",
        "--define": f"--define --libvirt {shlex.quote(new_host.uri)}",
        "qemu:///system": shlex.quote(new_host.uri),
        "dumpxml web": f"dumpxml {guest.name}",
        "start web": f"start {guest.name}",
    }
    said = play(restore, places, tmp_path)
    assert "is defined" in said
    document = play(look, places, tmp_path)
    assert str(images / "web/vda.qcow2") in document
    assert uuid not in document
    assert "52:54:00:11:22:33" not in document
    with line_socket(guest.place, 90.0) as control:
        assert control.readline().strip() == "ready"
        control.write("status\n")
        control.flush()
        assert control.readline().startswith("rw errors=0 kernel=0")
    domain = libvirt.open(new_host.uri).lookupByName(guest.name)
    assert "thawed" in answered(domain, '{"execute": "guest-fsfreeze-status"}')
    domain.destroy()
    refused = cli.call(
        *("restore", "web", "--to", f"{images}/again/", "--define", "--libvirt", new_host.uri),
        vm=False,
    )
    assert refused.returncode == 2
    assert "already" in refused.stderr
    assert f"--domain {guest.name}-restored" in refused.stderr
    assert not (images / "again").exists()
    domain.undefine()


def answered(domain, request: str, seconds: float = 60.0) -> str:
    """Ask a guest's agent through libvirt, which may need a moment to see that it is there."""
    import libvirt  # noqa: PLC0415 - the test is skipped without it
    import libvirt_qemu  # noqa: PLC0415 - as above

    deadline = time.monotonic() + seconds
    while True:
        try:
            return str(libvirt_qemu.qemuAgentCommand(domain, request, 10, 0))
        except libvirt.libvirtError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@pytest.mark.needs_qemu("the simulator has no flash")
def test_uefi_variables_are_a_disk_of_their_own_and_come_back_as_they_were(make_lab, build, tmp_path):
    code, variables = tmp_path / "code.fd", tmp_path / "vars.fd"
    code.write_bytes(bytes(256 << 10))
    first = os.urandom(128 << 10)
    variables.write_bytes(first)
    flash = ["-drive", f"if=pflash,unit=0,readonly=on,file={code},format=raw"]
    flash += ["-drive", f"if=pflash,unit=1,file={variables},format=raw"]
    lab = make_lab(build, {"vda": 4 * MIB}, extra=[*flash, "-S"])
    points = [lab.backup("full")["point"]]
    line = 'qemu-io -d /machine/system.flash1 "write -q -P 7 64k 4k"'
    lab.machine.qmp("human-monitor-command", **{"command-line": line})
    points.append(lab.backup("incremental")["point"])
    second = first[: 64 << 10] + b"\7" * 4096 + first[(64 << 10) + 4096 :]
    assert variables.read_bytes() == second
    for point, content in zip(points, (first, second), strict=True):
        assert lab.cli.raw(point, "pflash1", tmp_path) == content
    without = lab.backup("full", "--no-firmware")
    assert [disk["name"] for disk in without["disks"]] == ["vda"]
    lab.assert_at_rest(None)


def test_a_missing_file_to_include_fails_the_run_before_the_vm_is_touched(make_lab, any_build, tmp_path):
    lab = make_lab(any_build, {"vda": 4 * MIB})
    lab.backup("full")
    before = lab.machine.bitmaps()
    (tmp_path / "named.conf").write_text("x")
    error = lab.backup("incremental", "--include-file", str(tmp_path / "missing"), code=2)["error"]
    assert "missing: No such file" in error["message"]
    assert lab.machine.bitmaps() == before
    assert len(list((lab.cli.repository / "web").glob("*Z*"))) == 1
    point = lab.backup("incremental", "--include-file", str(tmp_path / "named.conf"))["point"]
    shown = lab.cli.json("show", "web", point, vm=False)["definition"]
    assert [one["origin"] for one in shown if one["kind"] == "included"] == [str(tmp_path / "named.conf")]
    assert {one["kind"] for one in shown} == {"qemu", "included"}
