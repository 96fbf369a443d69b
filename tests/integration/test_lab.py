# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab itself: what the other tests take for true is true, on each QEMU."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fixtures import builds
from fixtures import guest as guests
from fixtures.agent import SENTINEL, PlayedAgent
from fixtures.builds import Build
from fixtures.debian import CannotBeHad
from fixtures.machine import Disk, Machine, line_socket
from fixtures.simulated import Simulated
from fixtures.simulated_guest import SimulatedAgent
from fixtures.storage_daemon import StorageDaemon
from tests.conftest import MIB, ROOT, get_build

KINDS = pytest.mark.parametrize("kind", [Machine, StorageDaemon])


def content(lab, disk):
    """The bytes of a disk's image, read by QEMU's own tool once the machine has ended."""
    raw = lab.directory / "content.raw"
    image = next(entry.path for entry in lab.machine.disks if entry.name == disk)
    subprocess.run(
        [lab.machine.build.tool("qemu-img"), "convert", "-O", "raw", image, raw], check=True, timeout=60
    )
    return raw.read_bytes()


def converse(path, *commands):
    """Say commands to an agent, one after the other; returns its replies."""
    with line_socket(path, 20.0) as agent:
        replies = []
        for command in commands:
            agent.write(json.dumps({"execute": command}) + "\n")
            agent.flush()
            replies.append(json.loads(agent.readline()))
        return replies


def test_all_programs_of_a_build_are_what_they_say(each_build):
    for name in ("qemu-system-x86_64", "qemu-img", "qemu-storage-daemon", "qemu-io", "qemu-nbd"):
        said = subprocess.run(
            [each_build.tool(name), "--version"], capture_output=True, text=True, timeout=30, check=True
        )
        assert f" {each_build.version}." in said.stdout.splitlines()[0]


def test_a_required_qemu_that_cannot_be_had_fails_and_any_other_is_skipped(monkeypatch):
    def missing(version):
        raise CannotBeHad(f"no {version} today")

    monkeypatch.setattr(builds, "build", missing)
    monkeypatch.setenv("BACKUPCTL_REQUIRE_QEMU", "10.0")
    with pytest.raises(pytest.fail.Exception, match=r"no 10\.0 today"):
        get_build("10.0")
    with pytest.raises(pytest.skip.Exception, match=r"no 7\.2 today"):
        get_build("7.2")


@pytest.fixture
def packaged(monkeypatch, tmp_path):
    """Say what is installed and what Debian has: `packaged("8.2", {"7.2": "7.2", "11.1": "11.2"})`."""
    monkeypatch.setattr(builds, "_found", {})
    monkeypatch.delenv("BACKUPCTL_REQUIRE_QEMU", raising=False)

    def make(installed: str, unpacked: dict[str, str]) -> None:
        program = tmp_path / "qemu-system-x86_64"
        program.write_text(f"#!/bin/sh\necho QEMU emulator version {installed}.1\n")
        program.chmod(0o755)
        monkeypatch.setenv("QEMU", str(program) if installed else "no-such-qemu")

        def unpack(version: str) -> Build:
            if version not in unpacked:
                raise CannotBeHad("no archive today")
            return Build(unpacked[version], tmp_path / version)

        monkeypatch.setattr(builds, "_unpacked", unpack)

    return make


def test_an_installed_qemu_of_any_version_is_tested(packaged):
    packaged("8.2", {})
    assert builds.versions() == ("7.2", "8.2", "10.0", "11.1")
    assert {builds.build(which).version for which in ("installed", "oldest", "newest", "8.2")} == {"8.2"}
    with pytest.raises(CannotBeHad, match="no archive today"):
        builds.build("11.1")


def test_versions_are_taken_in_the_order_of_their_numbers(packaged):
    packaged("10.0", {"7.2": "7.2", "11.1": "11.1"})
    found = [builds.build(which).version for which in ("oldest", "installed", "newest")]
    assert found == ["7.2", "10.0", "11.1"]


def test_what_replaces_the_newest_stands_in_its_place_and_nothing_older_does(packaged):
    packaged("", {"7.2": "7.1", "10.0": "10.1", "11.1": "11.2"})
    assert builds.build("11.1").version == builds.build("installed").version == "11.2"
    for version in ("7.2", "10.0"):
        with pytest.raises(CannotBeHad, match=f"QEMU {version} is wanted"):
            builds.build(version)


def test_a_required_newest_is_not_replaced_by_an_older_one(packaged, monkeypatch):
    packaged("10.0", {})
    monkeypatch.setenv("BACKUPCTL_REQUIRE_QEMU", "11.1")
    with pytest.raises(pytest.fail.Exception, match="no archive today"):
        get_build("newest")
    assert get_build("installed").version == "10.0"


@KINDS
@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_the_model_agrees_with_the_disks_byte_for_byte(build, make_lab, kind, image_format):
    formats = {"vda": image_format, "vdb": image_format}
    lab = make_lab(build, formats=formats, kind_of_machine=kind, seed=11)
    lab.writer.start()
    deadline = time.monotonic() + 60
    while lab.writer.count < 300:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lab.writer.stop()
    lab.writer.do("vda", "discard", MIB, 3 * MIB)  # at rest a discard is a known quantity
    lab.machine.quit()
    for disk, model in lab.writer.model.items():
        assert any(model)
        assert content(lab, disk) == model, disk


def test_a_freeze_stops_the_writer_and_the_moment_is_what_qemu_copies_meanwhile(build, make_lab):
    lab = make_lab(build, {"vda": 8 * MIB})
    lab.writer.start()
    converse(lab.machine.agent_path, "guest-fsfreeze-freeze")
    count = lab.writer.count
    target = lab.directory / "copy.raw"
    target.write_bytes(bytes(8 * MIB))
    node = {"driver": "raw", "node-name": "copy", "file": {"driver": "file", "filename": str(target)}}
    assert lab.machine.qmp("blockdev-add", **node) == {}
    answer = lab.machine.qmp(
        "blockdev-backup", **{"job-id": "copy", "device": "node-vda", "target": "copy", "sync": "full"}
    )
    assert answer == {}
    deadline = time.monotonic() + 60
    while lab.machine.qmp("query-jobs"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert lab.writer.count == count, "nothing is written while frozen"
    assert lab.machine.qmp("blockdev-del", **{"node-name": "copy"}) == {}
    converse(lab.machine.agent_path, "guest-fsfreeze-thaw")
    while lab.writer.count < count + 5:
        assert time.monotonic() < deadline, "the writer goes on after the thaw"
        time.sleep(0.01)
    lab.writer.stop()
    assert target.read_bytes() == lab.writer.moment["vda"]


def test_one_seed_writes_the_same_bytes_again(any_build, make_lab):
    lab = make_lab(any_build, {"vda": 4 * MIB}, seed=5)
    lab.writer.write(50)
    other = type(lab.writer)({"vda": 4 * MIB}, lambda _disk, _command: None, seed=5)
    other.write(50)
    assert other.model == lab.writer.model


def test_a_write_that_fails_is_an_error_of_the_test(any_build, make_lab):
    lab = make_lab(any_build, {"vda": MIB})
    with pytest.raises(OSError, match="write"):
        lab.machine.io("vda", f"write -q -P 1 {MIB} 512")


@KINDS
def test_a_closed_machine_leaves_no_process_and_no_directory(any_build, tmp_path, kind):
    path = tmp_path / "vda.qcow2"
    subprocess.run([any_build.tool("qemu-img"), "create", "-q", "-f", "qcow2", path, "1M"], check=True)
    with kind(any_build, [Disk("vda", path)]) as machine:
        process, directory = machine.process, machine.directory
        assert machine.alive()
        assert len(str(machine.qmp_path)) < 60, "a unix socket's path has 107 bytes"
    assert process.returncode is not None
    assert not directory.exists()


def test_a_machine_ends_with_a_test_that_is_killed(any_build, tmp_path):
    program = (
        "from fixtures import builds, machine; import time\n"
        "m = machine.Machine(builds.build('installed'), []); m.start()\n"
        "print(m.process.pid, m.directory, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as test:
        pid, directory = test.stdout.readline().split()
        test.kill()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/status").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    shutil.rmtree(directory)


def test_a_scsi_disk_is_written_through_its_backend_too(any_build, tmp_path, held):
    path = tmp_path / "sda.raw"
    path.write_bytes(bytes(MIB))
    machine = Machine(any_build, [Disk("sda", path, "raw", "scsi-hd")])
    held.callback(machine.close)
    machine.start()
    machine.io("sda", "write -q -P 7 512 512")
    assert path.read_bytes() == bytes(512) + b"\7" * 512 + bytes(MIB - 1024)


@pytest.mark.parametrize(
    ("behaviour", "heard", "frozen"),
    [
        ("", b'{"return": 1}\n', True),
        ("silent", None, False),
        ("unanswered", None, True),
        ("late", b'{"return": 1}\n', True),
        ("stale", b'{"return": 0}\n', True),
        ("refuse", b'{"error": {"class": "GenericError"', False),
        ("garbage", b"{]]", False),
        ("hang up", b"", False),
    ],
)
def test_the_played_agent_misbehaves_as_told(tmp_path, behaviour, heard, frozen):
    with PlayedAgent(tmp_path / "ga") as agent:
        agent.late_seconds = 0.2
        agent.behaviour["guest-fsfreeze-freeze"] = behaviour
        with line_socket(agent.path, 0.5) as stream:
            stream.write('{"execute": "guest-fsfreeze-freeze"}\n')
            stream.flush()
            if heard is None:
                with pytest.raises(TimeoutError):
                    stream.readline()
            else:
                assert stream.readline().encode().startswith(heard)
        assert agent.frozen is frozen


@pytest.mark.parametrize(
    ("behaviour", "heard", "frozen"),
    [
        ("silent", None, False),
        ("unanswered", None, True),
        ("late", b'{"return": 1}\n', True),
        ("refuse", b'{"error": {"class": "GenericError"', False),
        ("garbage", b"", False),
        ("hang up", b"", False),
    ],
)
def test_the_simulated_agent_misbehaves_as_the_played_one(behaviour, heard, frozen):
    with Simulated("--disk", "vda=1M") as machine:
        agent = SimulatedAgent(machine)
        agent.late_seconds = 0.2
        agent.behaviour["guest-fsfreeze-freeze"] = behaviour
        with line_socket(agent.path, 0.5) as stream:
            stream.write('{"execute": "guest-fsfreeze-freeze"}\n')
            stream.flush()
            if heard is None:
                with pytest.raises(TimeoutError):
                    stream.readline()
            else:
                assert stream.buffer.readline().startswith(heard)
        assert agent.frozen is frozen
        assert (len(agent.freezes), len(agent.thaws)) == (int(frozen), 0)
        agent.behaviour.clear()
        assert converse(agent.path, "guest-fsfreeze-thaw") == [{"return": int(frozen)}]
        assert (agent.frozen, len(agent.thaws)) == (False, int(frozen))


def test_the_simulated_moment_is_the_model_as_it_was_at_the_transaction(make_lab):
    lab = make_lab(builds.simulator("10.0"), formats={"vdb": "raw"}, seed=11)
    lab.writer.write(100)
    before = {disk: bytes(model) for disk, model in lab.writer.model.items()}
    add = {"type": "block-dirty-bitmap-add", "data": {"node": "node-vda", "name": "b0"}}
    assert lab.machine.qmp("transaction", actions=[add]) == {}
    lab.writer.write(100)
    assert lab.writer.moment == before
    assert {disk: lab.machine.content(disk) for disk in before} == lab.writer.model
    assert before != lab.writer.model


@pytest.mark.guest
def test_the_played_agent_answers_as_the_real_one(boot, tmp_path):
    """Same keys, same types, same values where they mean something; also while frozen."""
    guest, _ = boot(get_build("installed"))
    commands = (
        *("guest-ping", "guest-fsfreeze-status", "guest-fsfreeze-freeze", "guest-fsfreeze-status"),
        *("guest-fsfreeze-freeze", "guest-fsfreeze-freeze-list", "guest-ping"),
        *("guest-fsfreeze-thaw", "guest-fsfreeze-thaw", "guest-fsfreeze-status"),
        *("guest-fsfreeze-freeze-list", "guest-fsfreeze-thaw", "guest-no-such-command"),
    )
    with PlayedAgent(tmp_path / "ga") as agent:
        played, real = converse(agent.path, *commands), converse(guest.agent_path, *commands)
        assert without_why(played) == without_why(real)


def without_why(answers: list) -> list:
    """Leave out why a command is disabled, which later agents say otherwise."""
    for answer in answers:
        if "error" in answer:
            answer["error"]["desc"] = answer["error"]["desc"].partition(" has been disabled: ")[0]
    return answers


@pytest.mark.guest
def test_the_real_agent_puts_the_sentinel_before_the_answer_to_a_sync(boot, tmp_path):
    guest, _ = boot(get_build("installed"))
    sync = b'{"execute": "guest-sync-delimited", "arguments": {"id": 7}}\n'
    with PlayedAgent(tmp_path / "ga") as agent:
        for path in (agent.path, guest.agent_path):
            with socket.socket(socket.AF_UNIX) as agent_socket:
                agent_socket.settimeout(20)
                agent_socket.connect(str(path))
                agent_socket.sendall(SENTINEL + sync)
                received = b""
                while b'{"return": 7}\n' not in received:
                    received += agent_socket.recv(4096)
                assert received.endswith(SENTINEL + b'{"return": 7}\n')


@pytest.mark.guest
@pytest.mark.parametrize(
    "disk",
    [
        {},
        {"iothread": True},
        {"driver": "scsi-hd"},
        {"driver": "scsi-hd", "iothread": True},
        {"format": "raw"},
    ],
    ids=lambda disk: "-".join(map(str, disk.values())) or "virtio-blk",
)
def test_the_guest_writes_to_two_disks_and_its_journals_agree(build, boot, tmp_path, disk):
    guest, _ = boot(build, 64 * MIB, disks=2, **disk)
    assert guest.tell("files 8") == "ok"
    assert guest.tell("status") == "rw errors=0 kernel=0 count=8"
    assert guest.tell("off") == "ok"
    guest.process.wait(60)
    for entry in guest.disks:
        raw = tmp_path / "content.raw"
        image_format = ["-f", entry.format, "-O", "raw"]
        subprocess.run(
            [build.tool("qemu-img"), "convert", *image_format, entry.path, raw], check=True, timeout=60
        )
        assert guests.check_file_system(raw)
        assert guests.check_journal(raw, tmp_path) == 8


@pytest.mark.guest
def test_the_guest_goes_on_writing_until_told_to_stop_and_stands_still_while_frozen(build, boot):
    guest, _ = boot(build)
    guest.tell("load")
    assert int(guest.tell("status").split("count=")[1]) > 0, "a load has begun when it is answered"
    assert guest.tell("load") == "ok"
    assert guest.tell("files 3") == "busy"
    assert count_grows(guest)
    converse(guest.agent_path, "guest-fsfreeze-freeze")
    time.sleep(0.3)  # what was under way comes to its first write
    assert not count_grows(guest, 1.0)
    converse(guest.agent_path, "guest-fsfreeze-thaw")
    assert count_grows(guest)
    assert guest.tell("stop") == "ok"
    assert not count_grows(guest, 1.0)
    assert guest.tell("stop") == "ok"
    guest.tell("load")
    assert count_grows(guest)


def count_grows(guest, seconds=10.0):
    """Whether the guest writes files within so many seconds."""
    before = guest.tell("status")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.1)
        if guest.tell("status") != before:
            return True
    return False


@pytest.mark.guest
def test_a_damaged_file_and_a_damaged_file_system_are_noticed(any_build, boot, tmp_path):
    guest, _ = boot(any_build, 64 * MIB, format="raw")
    guest.tell("files 3")
    guest.tell("off")
    guest.process.wait(60)
    raw = guest.disks[0].path
    block = subprocess.run(
        ["/sbin/debugfs", "-R", "bmap /files/2 1", raw],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    with raw.open("r+b") as file:
        file.seek(int(block.stdout) * file_system_block(raw))
        file.write(os.urandom(16))
    with pytest.raises(AssertionError, match="file 2"):
        guests.check_journal(raw, tmp_path)
    with raw.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))
    with pytest.raises(AssertionError):
        guests.check_file_system(raw)


def file_system_block(raw):
    said = subprocess.run(
        ["/sbin/dumpe2fs", "-h", raw], capture_output=True, text=True, timeout=30, check=True
    )
    return int(next(line for line in said.stdout.splitlines() if line.startswith("Block size")).split()[-1])
