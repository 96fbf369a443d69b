# SPDX-License-Identifier: GPL-2.0-or-later
"""Every point is the frozen moment, byte for byte, while the writes go on."""

import subprocess

import nbd
import pytest

from tests.conftest import get_build

pytestmark = pytest.mark.simulator_too


def test_full_and_five_incrementals_under_writes_equal_their_moments(each_build, make_lab):
    lab = make_lab(each_build)
    lab.writer.write(60)
    lab.writer.start()
    moments = {}
    for number in range(6):
        report = lab.backup("incremental" if number else "full", "--limit", "60M")
        moments[report["point"]] = lab.writer.moment
        assert report["consistency"] == "filesystem"
        assert report["frozen_ms"] is not None
        assert report["kind"] == ("incremental" if number else "full")
    lab.writer.stop()
    assert lab.writer.count > 100, "the writes were to go on during the copies"
    lab.assert_at_rest()
    assert sorted(moments) == list(moments)
    for point, moment in moments.items():
        lab.assert_point(point, moment)
    assert len(lab.agent.freezes) == len(lab.agent.thaws) == 6


@pytest.mark.parametrize("view", ["snapshot-access", "auto"])
def test_the_other_view_shows_the_moment(newest_build, make_lab, view):
    lab = make_lab(newest_build, seed=7)
    lab.writer.write(40)
    options = ("--view", view, "--limit", "60M")
    lab.assert_points_under_writes("full", "incremental", "incremental", options=options)


def test_snapshot_access_is_refused_where_it_is_not_right(oldest_build, make_lab):
    lab = make_lab(oldest_build)
    error = lab.backup("full", "--view", "snapshot-access", code=1)["error"]
    assert "10.0" in error["message"]
    lab.assert_at_rest(bitmaps_each=0)
    lab.backup("full", "--view", "auto")


@pytest.mark.parametrize(("version", "lost"), [("7.2", [30, 31, 32]), ("10.0", []), ("newest", [])])
def test_what_zeroes_overwrite_is_lost_from_snapshot_access_before_10_0(make_lab, version, lost):
    """The smallest case of why that view is offered from 10.0 on: QEMU alone, one write of zeroes."""
    build = get_build(version)
    cluster = 65536
    lab = make_lab(build, {"vda": 4 << 20})
    lab.machine.io("vda", "write -q -P 1 0 4M")
    scratch, address = lab.directory / "tmp0.qcow2", lab.machine.directory / "nbd"
    subprocess.run(
        [build.tool("qemu-img"), "create", "-q", "-f", "qcow2", scratch, "4M"], check=True, timeout=30
    )

    def do(command: str, **arguments: object) -> None:
        assert lab.machine.qmp(command, **{k.replace("_", "-"): v for k, v in arguments.items()}) == {}

    do("blockdev-add", driver="qcow2", node_name="tmp0", file={"driver": "file", "filename": str(scratch)})
    do("blockdev-add", driver="copy-before-write", node_name="cbw0", file="node-vda", target="tmp0")
    do("qom-set", path="/machine/peripheral/vda", property="drive", value="cbw0")
    do("blockdev-add", driver="snapshot-access", node_name="acc0", file="cbw0")
    do("nbd-server-start", addr={"type": "unix", "data": {"path": str(address)}})
    do("block-export-add", type="nbd", id="e", node_name="acc0", name="e")
    lab.machine.io("vda", f"write -q -P 2 {10 * cluster} {3 * cluster}")
    lab.machine.io("vda", f"write -q -z {30 * cluster} {3 * cluster}")
    handle = nbd.NBD()
    handle.connect_uri(f"nbd+unix:///e?socket={address}")
    content = handle.pread(4 << 20, 0)
    handle.shutdown()
    changed = [n for n in range(64) if content[n * cluster : (n + 1) * cluster] != b"\1" * cluster]
    assert changed == lost


def test_dirty_zeroes_are_stored_as_zeroes(any_build, make_lab):
    """A discarded or zeroed cluster must not let the old data come back at restore."""
    lab = make_lab(any_build, {"vda": 4 << 20})
    lab.writer.do("vda", "data", 0, 4 << 20, 0x11)
    lab.backup("full")
    lab.writer.do("vda", "zero", 65536, 131072)
    lab.writer.do("vda", "discard", 1 << 20, 1 << 20)
    report = lab.backup("incremental")
    assert report["disks"][0]["zero_bytes"] == 131072 + (1 << 20)
    assert report["disks"][0]["copied_bytes"] == 0
    lab.assert_point(report["point"], lab.writer.moment)


def test_an_incremental_copies_what_changed_and_no_more(any_build, make_lab):
    lab = make_lab(any_build, {"vda": 32 << 20})
    lab.writer.do("vda", "data", 0, 32 << 20, 0x22)
    lab.backup("full")
    lab.writer.do("vda", "data", 5 << 20, 65536)
    lab.writer.do("vda", "data", (7 << 20) + 512, 512)
    disk = lab.backup("incremental")["disks"][0]
    assert disk["dirty_bytes"] == disk["copied_bytes"] == 2 * 65536
    assert lab.backup("incremental")["disks"][0]["dirty_bytes"] == 0


def test_a_full_leaves_out_what_was_never_written(any_build, make_lab):
    lab = make_lab(any_build, {"vda": 64 << 20})
    lab.writer.do("vda", "data", 10 << 20, 1 << 20)
    report = lab.backup("full")
    disk = report["disks"][0]
    assert disk["copied_bytes"] == 1 << 20
    assert disk["stored_bytes"] < 2 << 20
    lab.assert_point(report["point"], lab.writer.moment)


def test_an_offset_beyond_4_gib_is_kept(any_build, make_lab):
    """A 32-bit offset anywhere would put these bytes elsewhere."""
    lab = make_lab(any_build, {"vda": 16 << 20})
    lab.machine.qmp("block_resize", **{"node-name": "node-vda", "size": 9 << 30})
    lab.machine.io("vda", f"write -q -P 5 {(8 << 30) + 65536} 65536")
    point = lab.backup("full")["point"]
    lab.machine.io("vda", f"write -q -P 6 {(5 << 30) + 512} 65536")
    lab.backup("incremental")
    target = lab.directory / "big.raw"
    lab.cli.run("restore", "web", "latest", "--to", str(target), vm=False)
    with target.open("rb") as file:
        file.seek((8 << 30) + 65536)
        assert file.read(65536) == b"\5" * 65536
        file.seek((5 << 30) + 512)
        assert file.read(65536) == b"\6" * 65536
        assert target.stat().st_size == 9 << 30
        assert target.stat().st_blocks * 512 < 1 << 20, "the restored image is sparse"
    assert point
