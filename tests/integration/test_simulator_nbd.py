# SPDX-License-Identifier: GPL-2.0-or-later
"""Real NBD clients on the simulator: they must be content, and read the bytes of the moment."""

import json
import signal
import socket
import subprocess
import time

import nbd
import pytest

from fixtures.simulated import Simulated

MIB = 1 << 20
SIZE = 16 * MIB
CLUSTER = 65536


@pytest.fixture
def start(request):
    """Start a simulator with these options."""

    def begin(*options):
        made = Simulated("--disk", f"vda={SIZE}", *options)
        request.addfinalizer(made.close)
        made.start()
        return made

    return begin


def uri(vm, export):
    return f"nbd+unix:///{export}?socket={vm.nbd_path}"


def serve(vm, node, name, **more):
    server = vm.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(vm.nbd_path)}})
    added = vm.qmp("block-export-add", type="nbd", id="e0", **{"node-name": node}, name=name, **more)
    assert (server, added) == ({}, {})


def fleece(vm):
    """Begin a point in time of vda, with the old bitmap handed over to a new one."""
    path = vm.directory / "scratch.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE)], check=True, timeout=20)
    file = {"driver": "file", "filename": str(path)}
    added = vm.qmp("blockdev-add", driver="qcow2", **{"node-name": "tmp0"}, file=file, backing="drive-vda")
    backup = {"job-id": "job0", "device": "drive-vda", "target": "tmp0", "sync": "none"}
    actions = [
        {"type": "block-dirty-bitmap-add", "data": {"node": "drive-vda", "name": "next"}},
        {"type": "block-dirty-bitmap-disable", "data": {"node": "drive-vda", "name": "base"}},
        {"type": "blockdev-backup", "data": backup},
    ]
    assert (added, vm.qmp("transaction", actions=actions)) == ({}, {})


def run(*command):
    return subprocess.run([str(part) for part in command], check=True, timeout=60, capture_output=True).stdout


def connected(vm, export, *contexts):
    handle = nbd.NBD()
    for context in contexts:
        handle.add_meta_context(context)
    handle.set_export_name(export)
    handle.connect_unix(str(vm.nbd_path))
    return handle


def test_nbdinfo_maps_allocation_and_dirty_bitmap(start):
    vm = start()
    vm.qmp("block-dirty-bitmap-add", node="drive-vda", name="base")
    vm.control("write", disk="vda", offset=2 * CLUSTER, length=CLUSTER, pattern=1)
    vm.control("zero", disk="vda", offset=4 * CLUSTER, length=CLUSTER)
    vm.qmp("block-dirty-bitmap-disable", node="drive-vda", name="base")
    serve(vm, "drive-vda", "disk", bitmaps=["base"])
    found = json.loads(run("nbdinfo", "--map", "--json", uri(vm, "disk")))
    assert [(e["offset"], e["length"], e["type"]) for e in found] == [
        (0, 2 * CLUSTER, 3),
        (2 * CLUSTER, CLUSTER, 0),
        (3 * CLUSTER, SIZE - 3 * CLUSTER, 3),
    ]
    dirty = json.loads(run("nbdinfo", "--map=qemu:dirty-bitmap:base", "--json", uri(vm, "disk")))
    assert [(e["offset"], e["length"], e["type"]) for e in dirty] == [
        (0, 2 * CLUSTER, 0),
        (2 * CLUSTER, CLUSTER, 1),
        (3 * CLUSTER, CLUSTER, 0),
        (4 * CLUSTER, CLUSTER, 1),
        (5 * CLUSTER, SIZE - 5 * CLUSTER, 0),
    ]
    listed = run("nbdinfo", "--list", "--json", uri(vm, ""))
    assert [export["export-name"] for export in json.loads(listed)["exports"]] == ["disk"]


@pytest.mark.parametrize("tool", ["nbdcopy", "qemu-img"])
def test_copying_tools_read_what_the_guest_wrote(start, tmp_path, tool):
    vm = start("--seed", "7")
    vm.control("step", count=200)
    serve(vm, "drive-vda", "disk")
    copy = tmp_path / "copy.raw"
    if tool == "nbdcopy":
        run("nbdcopy", uri(vm, "disk"), copy)
    else:
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri(vm, "disk"), copy)
    assert copy.read_bytes() == vm.content("vda")


def test_nbdcopy_writes_to_a_writable_export(start, tmp_path):
    vm = start()
    image = tmp_path / "image.raw"
    image.write_bytes(b"".join(bytes([n]) * CLUSTER for n in range(SIZE // CLUSTER)))
    target = tmp_path / "target.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", target, str(SIZE)], check=True, timeout=20)
    file = {"driver": "file", "filename": str(target)}
    assert vm.qmp("blockdev-add", driver="qcow2", **{"node-name": "t"}, file=file) == {}
    serve(vm, "t", "t", writable=True)
    run("nbdcopy", image, uri(vm, "t"))
    back = tmp_path / "back.raw"
    run("nbdcopy", uri(vm, "t"), back)
    assert back.read_bytes() == image.read_bytes()


@pytest.mark.parametrize("seed", range(3))
def test_fleecing_under_a_writing_guest_reads_the_frozen_moment(start, tmp_path, seed):
    vm = start("--seed", str(seed), "--keep-moments")
    vm.qmp("block-dirty-bitmap-add", node="drive-vda", name="base")
    vm.control("workload", **{"per-second": 1000})
    deadline = time.monotonic() + 60
    while vm.control("status")["writes"] < 100 and time.monotonic() < deadline:
        time.sleep(0.01)
    fleece(vm)
    serve(vm, "tmp0", "moment", bitmaps=["base"])
    copy = tmp_path / "copy.raw"
    run("nbdcopy", "--connections=2", uri(vm, "moment"), copy)
    wrote = vm.control("status")["writes"]
    vm.control("workload", **{"per-second": 0})
    with open(vm.control("moment")["disks"]["vda"], "rb") as moment:
        assert copy.read_bytes() == moment.read()
    assert wrote > 100
    assert vm.control("status")["failed-writes"] == 0
    assert vm.content("vda") != copy.read_bytes()


def test_the_guest_stands_still_while_it_is_frozen(start):
    vm = start("--writes", "500")
    assert ask_agent(vm, "guest-fsfreeze-freeze") == {"return": 1}
    before = vm.control("status")["writes"]
    time.sleep(0.1)
    assert vm.control("status")["writes"] == before
    with pytest.raises(RuntimeError, match="frozen"):
        vm.control("write", disk="vda", offset=0, length=512, pattern=1)
    refused = ask_agent(vm, "guest-fsfreeze-freeze")
    assert "frozen state" in refused["error"]["desc"]
    assert ask_agent(vm, "guest-fsfreeze-thaw") == {"return": 1}
    assert ask_agent(vm, "guest-fsfreeze-status") == {"return": "thawed"}


def ask_agent(vm, command):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(vm.agent_path))
        connection.sendall(b'\xff{"execute": "guest-sync-delimited", "arguments": {"id": 5}}\n')
        stream = connection.makefile("rb")
        assert stream.read(1) == b"\xff"
        assert json.loads(stream.readline()) == {"return": 5}
        connection.sendall(json.dumps({"execute": command}).encode() + b"\n")
        return json.loads(stream.readline())


@pytest.mark.parametrize("action", ["drop", "short", "garbage"])
def test_a_stream_that_breaks_is_an_error_for_the_client(start, action):
    vm = start("--fault", f"nbd:sent@1M={action}")
    vm.control("write", disk="vda", offset=0, length=4 * MIB, pattern=9)
    serve(vm, "drive-vda", "disk")
    handle = connected(vm, "disk")
    assert handle.pread(MIB, 0) == b"\x09" * MIB
    with pytest.raises(nbd.Error):
        handle.pread(MIB, MIB)


def test_a_stalled_stream_stalls_only_its_own_client(start):
    vm = start()
    vm.control("write", disk="vda", offset=0, length=MIB, pattern=9)
    vm.control("fault", spec="nbd:sent@0=stall")
    serve(vm, "drive-vda", "disk")
    handle = connected(vm, "disk")
    handle.aio_pread(nbd.Buffer(4096), 0)
    assert handle.poll(300) in (0, 1)
    assert handle.aio_peek_command_completed() in (-1, 0)
    vm.control("clear-faults")
    assert connected(vm, "disk").pread(4096, 0) == b"\x09" * 4096


def test_a_read_error_names_its_errno_and_spares_the_rest(start):
    vm = start("--fault", "nbd:read@64k-128k=error:EIO")
    serve(vm, "drive-vda", "disk")
    handle = connected(vm, "disk")
    with pytest.raises(nbd.Error) as caught:
        handle.pread(CLUSTER, CLUSTER)
    assert caught.value.errno == "EIO"
    assert handle.pread(CLUSTER, 0) == bytes(CLUSTER)


def test_a_hard_removal_closes_the_connection_and_a_safe_one_refuses(start):
    vm = start()
    serve(vm, "drive-vda", "disk")
    handle = connected(vm, "disk")
    assert "still in use" in vm.qmp("block-export-del", id="e0")["desc"]
    assert vm.qmp("block-export-del", id="e0", mode="hard") == {}
    with pytest.raises(nbd.Error):
        handle.pread(512, 0)
    assert vm.qmp("query-block-exports") == []


@pytest.mark.parametrize(
    ("version", "iothread", "dies"),
    [("7.2.22", "on", True), ("7.2.22", "off", False), ("10.0.2", "on", False), ("7.2.13", "on", False)],
)
def test_a_vanished_client_kills_what_it_kills_in_the_world(request, version, iothread, dies):
    vm = Simulated("--version", version, "--disk", f"vda=1M,iothread={iothread}")
    request.addfinalizer(vm.close)
    vm.start()
    serve(vm, "drive-vda", "disk")
    handle = connected(vm, "disk")
    handle.pread(512, 0)
    handle.shutdown()
    if dies:
        assert vm.wait() == -signal.SIGABRT
        assert "nbd_blockdev_client_closed" in vm.complaints()
    else:
        time.sleep(0.2)
        assert vm.qmp("query-status")["running"]


def test_the_server_that_closes_first_lives_even_on_an_iothread(request):
    vm = Simulated("--disk", "vda=1M,iothread=on")
    request.addfinalizer(vm.close)
    vm.start()
    serve(vm, "drive-vda", "disk")
    handle = connected(vm, "disk")
    vm.qmp("block-export-del", id="e0", mode="hard")
    with pytest.raises(nbd.Error):
        handle.pread(512, 0)
    time.sleep(0.2)
    assert vm.qmp("query-status")["running"]
