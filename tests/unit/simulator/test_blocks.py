# SPDX-License-Identifier: GPL-2.0-or-later
"""Nodes, filters, jobs and transactions against plain byte strings, without any socket."""

import os
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backupctl.simulator.commands import TABLE
from backupctl.simulator.disks import DiskSpec
from backupctl.simulator.failure import CommandError
from backupctl.simulator.faults import Faults
from backupctl.simulator.machine import Machine, Power, Settings
from backupctl.simulator.nodes import Extent

CLUSTER = 65536
SIZE = 8 * CLUSTER + 512
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["write", "zero", "discard"]), st.integers(0, SIZE // 512 - 1), st.integers(1, 400)
    ),
    max_size=12,
)


@pytest.fixture
def vm(tmp_path_factory):
    made = power_on(tmp_path_factory.mktemp("vm"))
    yield made
    made.end(clean=False)


def power_on(directory, faults=None):
    events = []
    disks = (DiskSpec.parse(f"vda={SIZE}"), DiskSpec.parse(f"vdb={SIZE},format=raw"))
    made = Machine(Settings(directory, disks), faults or Faults(), events.append, Power(events.append))
    made.events = events
    return made


def run(vm, command, **arguments):
    """Run a command as the monitor would; underscores stand for dashes."""
    return TABLE[command].run(vm, {name.replace("_", "-"): value for name, value in arguments.items()})


def scratch(vm, name="tmp0", backing="drive-vda"):
    path = vm.settings.directory / f"{name}.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE)], check=True, timeout=20)
    file = {"driver": "file", "filename": str(path)}
    run(vm, "blockdev-add", driver="qcow2", node_name=name, file=file, backing=backing)
    return vm.graph.find(name)


def fleece(vm, device="drive-vda", target="tmp0", job="job0"):
    run(vm, "blockdev-backup", job_id=job, device=device, target=target, sync="none")


def test_a_full_copy_onto_a_full_target_is_a_job_that_ends_with_an_error(vm):
    vm.faults.add("scratch:tmp*=full:0")
    assert vm.guest.change("vda", "write", 0, 512, b"x" * 512) == ""
    scratch(vm, backing=None)
    vm.events.clear()
    run(vm, "blockdev-backup", job_id="job0", device="drive-vda", target="tmp0", sync="full")
    told = {event["event"]: event["data"] for event in vm.events}
    assert told["BLOCK_JOB_ERROR"] == {"device": "job0", "operation": "write", "action": "report"}
    assert told["BLOCK_JOB_COMPLETED"]["error"] == "No space left on device"
    assert run(vm, "query-jobs") == []
    assert vm.graph.find("drive-vda").blockers == []


def change(vm, disk, model, what, block, blocks, seed):
    """Make one change on a disk and on its model."""
    offset = block * 512
    length = min(blocks * 512, SIZE - offset)
    data = bytes([seed % 255 + 1]) * length if what == "write" else None
    assert vm.guest.change(disk, what, offset, length, data) == ""
    if what == "write":
        model[offset : offset + length] = data
    elif what == "zero" or disk == "vdb":
        model[offset : offset + length] = bytes(length)
    else:  # a qcow2 gives up whole clusters only
        first, end = -(-offset // CLUSTER) * CLUSTER, offset + length
        last = end if end == SIZE else end // CLUSTER * CLUSTER
        if last > first:
            model[first:last] = bytes(last - first)


def play(vm, disk, model, changes):
    for seed, (what, block, blocks) in enumerate(changes):
        change(vm, disk, model, what, block, blocks, seed)


def assert_extents_tell_the_truth(node):
    """What is told to be zero reads as zeroes, and the extents cover the node."""
    offset = 0
    for length, flags in node.extents(0, node.size):
        if flags & Extent.ZERO:
            assert not any(node.read(offset, length))
        offset += length
    assert offset == node.size


@pytest.mark.parametrize("disk", ["vda", "vdb"])
@settings(max_examples=40, deadline=None)
@given(changes=CHANGES)
def test_a_disk_holds_what_was_written(tmp_path_factory, disk, changes):
    vm = power_on(tmp_path_factory.mktemp("vm"))
    model = bytearray(SIZE)
    play(vm, disk, model, changes)
    assert vm.top(disk).read(0, SIZE) == model
    assert_extents_tell_the_truth(vm.top(disk))
    vm.end(clean=True)


@pytest.mark.parametrize("disk", ["vda", "vdb"])
@settings(max_examples=40, deadline=None)
@given(before=CHANGES, after=CHANGES)
def test_fleecing_shows_the_moment_whatever_the_guest_does(tmp_path_factory, disk, before, after):
    vm = power_on(tmp_path_factory.mktemp("vm"))
    model = bytearray(SIZE)
    play(vm, disk, model, before)
    moment = bytes(model)
    tmp = scratch(vm, backing=f"drive-{disk}")
    fleece(vm, f"drive-{disk}")
    for seed, (what, block, blocks) in enumerate(after):
        vm.guest.change(
            disk,
            what,
            block * 512,
            min(blocks * 512, SIZE - block * 512),
            bytes([seed + 1]) * min(blocks * 512, SIZE - block * 512),
        )
    assert tmp.read(0, SIZE) == moment
    assert_extents_tell_the_truth(tmp)
    vm.end(clean=True)


@settings(max_examples=40, deadline=None)
@given(before=CHANGES, after=CHANGES)
def test_snapshot_access_shows_the_moment_whatever_the_guest_does(tmp_path_factory, before, after):
    vm = power_on(tmp_path_factory.mktemp("vm"))
    model = bytearray(SIZE)
    play(vm, "vda", model, before)
    moment = bytes(model)
    scratch(vm, backing=None)
    run(vm, "blockdev-add", driver="copy-before-write", node_name="cbw0", file="drive-vda", target="tmp0")
    run(vm, "qom-set", path="/machine/peripheral/vda", property="drive", value="cbw0")
    run(vm, "blockdev-add", driver="snapshot-access", node_name="acc0", file="cbw0")
    play(vm, "vda", model, [each for each in after if each[0] != "discard"])
    assert vm.graph.find("acc0").read(0, SIZE) == moment
    assert vm.top("vda").read(0, SIZE) == model
    vm.end(clean=True)


@settings(max_examples=40, deadline=None)
@given(changes=CHANGES)
def test_a_recording_bitmap_covers_every_change(tmp_path_factory, changes):
    vm = power_on(tmp_path_factory.mktemp("vm"))
    run(vm, "block-dirty-bitmap-add", node="drive-vda", name="b0")
    before, model = bytes(SIZE), bytearray(SIZE)
    play(vm, "vda", model, changes)
    bits = vm.graph.find("drive-vda").bitmaps["b0"].bits
    for cluster in range(-(-SIZE // CLUSTER)):
        part = slice(cluster * CLUSTER, (cluster + 1) * CLUSTER)
        assert bits.get(cluster) or model[part] == before[part]
    vm.end(clean=True)


def test_a_full_scratch_fails_the_guests_write_under_fleecing(vm):
    vm.faults.add("scratch:tmp*=full:0")
    scratch(vm)
    vm.guest.change("vda", "write", 0, 512, b"a" * 512)
    fleece(vm)
    assert vm.guest.change("vda", "write", 0, 512, b"b" * 512) == os.strerror(28)
    assert vm.top("vda").read(0, 512) == b"a" * 512
    assert vm.jobs.jobs["job0"].status == "running"


def test_a_full_scratch_breaks_the_snapshot_and_spares_the_guest_with_break_snapshot(vm):
    vm.faults.add("scratch:tmp*=full:0")
    vm.guest.change("vda", "write", 0, 512, b"a" * 512)
    scratch(vm, backing=None)
    options = {"driver": "copy-before-write", "node_name": "cbw0", "file": "drive-vda", "target": "tmp0"}
    run(vm, "blockdev-add", **options, on_cbw_error="break-snapshot")
    run(vm, "qom-set", path="/machine/peripheral/vda", property="drive", value="cbw0")
    run(vm, "blockdev-add", driver="snapshot-access", node_name="acc0", file="cbw0")
    assert vm.guest.change("vda", "write", 0, 512, b"b" * 512) == ""
    with pytest.raises(PermissionError):
        vm.graph.find("acc0").read(0, 512)


def test_a_transaction_that_fails_leaves_nothing(vm):
    scratch(vm)
    run(vm, "block-dirty-bitmap-add", node="drive-vda", name="b0")
    vm.guest.change("vda", "write", 0, 512, b"a" * 512)
    described = TABLE["query-named-block-nodes"].run(vm, {"flat": True})
    one = {"node": "drive-vda", "name": "b0"}
    actions = [
        {"type": "block-dirty-bitmap-add", "data": {"node": "drive-vda", "name": "b1"}},
        {"type": "block-dirty-bitmap-disable", "data": one},
        {"type": "block-dirty-bitmap-clear", "data": one},
        {
            "type": "block-dirty-bitmap-merge",
            "data": {"node": "drive-vda", "target": "b1", "bitmaps": ["b0"]},
        },
        {"type": "block-dirty-bitmap-remove", "data": one},
        {
            "type": "blockdev-backup",
            "data": {"job-id": "j", "device": "drive-vda", "target": "tmp0", "sync": "none"},
        },
        {"type": "block-dirty-bitmap-clear", "data": {"node": "drive-vda", "name": "absent"}},
    ]
    with pytest.raises(CommandError, match="Dirty bitmap 'absent' not found"):
        run(vm, "transaction", actions=actions)
    assert TABLE["query-named-block-nodes"].run(vm, {"flat": True}) == described
    assert not vm.jobs.jobs


def test_a_transaction_that_fails_to_enable_a_missing_bitmap_kills_qemu(vm):
    enable = {"type": "block-dirty-bitmap-enable", "data": {"node": "drive-vda", "name": "absent"}}
    with pytest.raises(CommandError):
        run(vm, "transaction", actions=[enable])
    assert vm.events == ["segv"]


def test_a_merge_of_no_bitmaps_kills_qemu_unless_its_transaction_fails(vm):
    run(vm, "block-dirty-bitmap-add", node="drive-vda", name="b0")
    nothing = {"node": "drive-vda", "target": "b0", "bitmaps": []}
    merge = {"type": "block-dirty-bitmap-merge", "data": nothing}
    with pytest.raises(CommandError, match="aborted"):
        run(vm, "transaction", actions=[merge, {"type": "abort", "data": {}}])
    assert vm.events == []
    run(vm, "transaction", actions=[merge])
    run(vm, "block-dirty-bitmap-merge", **nothing)
    assert vm.events == ["segv", "segv"]


def test_a_device_that_is_given_the_drive_it_has_kills_qemu(vm):
    drive = {"path": "/machine/peripheral/vda", "property": "drive"}
    run(vm, "qom-set", **drive, value="drive-vda")
    assert vm.events == ["segv"]


def test_a_transaction_that_fails_to_enable_a_busy_bitmap_leaves_it_disabled(vm):
    run(vm, "block-dirty-bitmap-add", node="drive-vda", name="b0")
    bitmap = vm.graph.find("drive-vda").bitmaps["b0"]
    bitmap.busy = 1
    one = {"node": "drive-vda", "name": "b0"}
    with pytest.raises(CommandError, match="in use"):
        run(vm, "block-dirty-bitmap-enable", **one)
    assert bitmap.recording
    with pytest.raises(CommandError, match="in use"):
        run(vm, "transaction", actions=[{"type": "block-dirty-bitmap-enable", "data": one}])
    assert not bitmap.recording


def test_a_clean_end_stores_persistent_bitmaps_and_a_crash_leaves_them_inconsistent(tmp_path):
    vm = power_on(tmp_path)
    run(vm, "block-dirty-bitmap-add", node="drive-vda", name="kept", persistent=True)
    run(vm, "block-dirty-bitmap-add", node="drive-vda", name="transient")
    vm.guest.change("vda", "write", CLUSTER, 512, b"a" * 512)
    vm.end(clean=True)

    vm = power_on(tmp_path)
    kept = vm.graph.find("drive-vda").bitmaps
    assert {name: bitmap.describe()["count"] for name, bitmap in kept.items()} == {"kept": CLUSTER}
    assert kept["kept"].recording
    run(vm, "block-dirty-bitmap-add", node="drive-vda", name="young", persistent=True)
    vm.end(clean=False)

    vm = power_on(tmp_path)
    found = vm.graph.find("drive-vda").bitmaps
    assert {name: bitmap.inconsistent for name, bitmap in found.items()} == {"kept": True}
    with pytest.raises(CommandError, match="inconsistent"):
        run(vm, "block-dirty-bitmap-enable", node="drive-vda", name="kept")
    run(vm, "block-dirty-bitmap-remove", node="drive-vda", name="kept")
    vm.end(clean=False)

    vm = power_on(tmp_path)
    assert vm.graph.find("drive-vda").bitmaps == {}
    assert vm.top("vda").read(CLUSTER, 512) == b"a" * 512
    vm.end(clean=True)


def test_a_new_file_knows_nothing_of_an_older_one_with_its_number(vm):
    tmp = scratch(vm, backing=None)
    tmp.write(0, b"o" * CLUSTER)
    run(vm, "blockdev-del", node_name="tmp0")
    path = vm.settings.directory / "tmp0.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE)], check=True, timeout=20)
    file = {"driver": "file", "filename": str(path)}
    vm.guest.change("vda", "write", 0, 512, b"n" * 512)
    run(vm, "blockdev-add", driver="qcow2", node_name="tmp0", file=file, backing="drive-vda")
    assert vm.graph.find("tmp0").read(0, 512) == b"n" * 512


def test_a_file_that_is_added_again_still_holds_what_was_written(vm):
    tmp = scratch(vm)
    vm.guest.change("vda", "write", 0, 512, b"n" * 512)
    tmp.zero(0, CLUSTER)
    run(vm, "blockdev-del", node_name="tmp0")
    file = {"driver": "file", "filename": str(vm.settings.directory / "tmp0.qcow2")}
    run(vm, "blockdev-add", driver="qcow2", node_name="tmp0", file=file, backing="drive-vda")
    assert vm.graph.find("tmp0").read(0, 512) == bytes(512)


def test_an_external_snapshot_leaves_bitmap_and_content_on_the_old_layer(vm):
    run(vm, "block-dirty-bitmap-add", node="drive-vda", name="b0")
    scratch(vm, "over", None)
    run(vm, "blockdev-snapshot", node="drive-vda", overlay="over")
    vm.guest.change("vda", "write", 0, 512, b"n" * 512)
    assert vm.top("vda").name == "over"
    assert vm.graph.find("drive-vda").bitmaps["b0"].bits.count() == 0
    assert vm.graph.find("drive-vda").read(0, 512) == bytes(512)


def test_a_write_threshold_is_told_once(vm):
    run(vm, "block-set-write-threshold", node_name="drive-vda", write_threshold=1024)
    for _ in range(2):
        vm.guest.change("vda", "write", 1024, 512, b"x" * 512)
    told = [event["data"] for event in vm.events if event["event"] == "BLOCK_WRITE_THRESHOLD"]
    assert told == [{"node-name": "drive-vda", "amount-exceeded": 512, "write-threshold": 1024}]
