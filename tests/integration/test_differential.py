# SPDX-License-Identifier: GPL-2.0-or-later
"""Differentials: what changed since any older point, by the bitmaps that are kept, or by a scan."""

import signal

import pytest

from tests.integration.test_failures import SLOW, copying, wait_for

MIB = 1 << 20
CLUSTER = 65536

pytestmark = pytest.mark.simulator_too


def how(report) -> dict[str, str]:
    return {disk["name"]: "scan" if disk["scanned"] else disk["kind"] for disk in report["disks"]}


def three_points(lab, *options: str) -> list[str]:
    """Make a full and two incrementals; lab.moments keeps what the disks held at each."""
    ids = []
    for kind in ("full", "incremental", "incremental"):
        lab.writer.write(30)
        ids.append(lab.backup(kind, *options)["point"])
        lab.moments = [*getattr(lab, "moments", []), lab.writer.moment]
    lab.writer.write(30)
    return ids


def bitmaps_of(lab, disk: str = "vda") -> list[str]:
    return sorted(point_of(name, disk) for name in lab.machine.bitmaps()[f"node-{disk}"])


def point_of(bitmap: str, disk: str) -> str:
    return bitmap.removesuffix(f"-{disk}")[-16:]


def remove_bitmap(lab, disk: str, point: str) -> None:
    (name,) = (name for name in lab.machine.bitmaps()[f"node-{disk}"] if point_of(name, disk) == point)
    assert lab.machine.qmp("block-dirty-bitmap-remove", node=f"node-{disk}", name=name) == {}


def test_a_differential_by_checkpoints_stands_on_its_base_alone(build, make_lab):
    lab = make_lab(build)
    first, second, third = three_points(lab, "--keep-checkpoints", "3")
    assert bitmaps_of(lab) == [first, second, third]
    report = lab.backup("incremental", "--since", first, "--keep-checkpoints", "3")
    assert how(report) == {"vda": "incremental", "vdb": "incremental"}
    assert report["parent"] == first
    lab.assert_point(report["point"], lab.writer.moment)
    (point,) = (lab.cli.repository / "web").glob(f"{report['point']}/vda.qcow2")
    assert f"../{first}/vda.qcow2".encode() in point.read_bytes()[:65536]
    assert bitmaps_of(lab) == [first, second, third, report["point"]]
    lab.writer.write(20)
    after = lab.backup("incremental", "--keep-checkpoints", "1")
    assert after["parent"] == report["point"]
    assert bitmaps_of(lab) == [report["point"], after["point"]]
    lab.assert_point(after["point"], lab.writer.moment)
    lab.assert_point(second, lab.moments[1])


def test_a_differential_without_checkpoints_scans_and_says_why(build, make_lab):
    lab = make_lab(build)
    first, _, third = three_points(lab)
    assert bitmaps_of(lab) == [third]
    done = lab.cli.run("incremental", "web", "--since", first, "--json")
    assert "--keep-checkpoints" in done.stderr
    newest = lab.cli.json("list", "web", vm=False)[-1]
    assert newest["parent"] == first
    lab.assert_point(newest["point"], lab.writer.moment)
    lab.next_is_right()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_differential_that_ends_in_mid_copy_gives_all_bitmaps_back(build, make_lab, number):
    lab = make_lab(build)
    first, second, third = three_points(lab, "--keep-checkpoints", "5")
    with lab.cli.start("incremental", "web", "--since", first, "--keep-checkpoints", "5", *SLOW) as run:
        wait_for(copying(lab))
        run.send_signal(number)
        run.communicate(timeout=60)
    lab.writer.write(20)
    if number == signal.SIGKILL:
        lab.cli.run("recover", "web")
    assert bitmaps_of(lab) == [first, second, third]
    lab.writer.write(20)
    report = lab.backup("incremental", "--since", second, "--keep-checkpoints", "5")
    assert how(report) == {"vda": "incremental", "vdb": "incremental"}
    lab.assert_point(report["point"], lab.writer.moment)


def test_checkpoints_live_on_through_a_full_and_a_recover(any_build, make_lab):
    lab = make_lab(any_build)
    first, second, third = three_points(lab, "--keep-checkpoints", "9")
    full = lab.backup("full", "--keep-checkpoints", "9")["point"]
    lab.cli.run("recover", "web")
    assert bitmaps_of(lab) == [first, second, third, full]
    states = {
        point_of(bitmap["name"], "vda"): bitmap["recording"]
        for node in lab.machine.qmp("query-named-block-nodes", flat=True)
        if node["node-name"] == "node-vda"
        for bitmap in node["dirty-bitmaps"]
    }
    assert states == {first: False, second: False, third: False, full: True}
    lab.writer.write(20)
    report = lab.backup("incremental", "--since", second, "--keep-checkpoints", "9")
    assert how(report)["vda"] == "incremental"
    lab.assert_point(report["point"], lab.writer.moment)


def test_a_missing_checkpoint_in_between_is_a_gap_and_not_used(any_build, make_lab):
    lab = make_lab(any_build)
    first, second, _ = three_points(lab, "--keep-checkpoints", "9")
    remove_bitmap(lab, "vda", second)
    report = lab.backup("incremental", "--since", first, "--keep-checkpoints", "9")
    assert how(report) == {"vda": "scan", "vdb": "incremental"}
    lab.assert_point(report["point"], lab.writer.moment)


def test_a_checkpoint_that_was_removed_and_its_point_pruned_hides_no_change(any_build, make_lab):
    """Nothing tells of this gap any more; what changed in it is told by the digests of the points."""
    lab = make_lab(any_build)
    first, second, third = three_points(lab, "--keep-checkpoints", "9")
    for disk in ("vda", "vdb"):
        remove_bitmap(lab, disk, second)
    lab.cli.run("protect", "web", first, vm=False)
    lab.cli.run("prune", "web", "--keep-last", "1", vm=False)
    assert [one["point"] for one in lab.cli.json("list", "web", vm=False)] == [first, third]
    report = lab.backup("incremental", "--since", first, "--keep-checkpoints", "9")
    assert how(report) == {"vda": "incremental", "vdb": "incremental"}
    lab.assert_point(report["point"], lab.writer.moment)


def test_an_unknown_point_to_differ_from_touches_nothing(any_build, make_lab):
    lab = make_lab(any_build)
    first = lab.backup("full")["point"]
    done = lab.cli.run("incremental", "web", "--since", "20200101T000000Z", code=2)
    assert "20200101T000000Z" in done.stderr
    assert bitmaps_of(lab) == [first]


def test_shrunk_then_grown_over_two_points_shows_no_old_bytes(any_build, make_lab):
    """The layer of the small disk hides what lies below, also from the digests.

    QEMU itself shows the cut cluster whole again: a qcow2 keeps what it holds behind the end.
    """
    lab = make_lab(any_build, {"vda": 16 * MIB})
    lab.writer.do("vda", "data", 0, 16 * MIB, 0x55)
    lab.backup("full")
    for size, shown in ((6 * MIB + 512, 6 * MIB + 512), (16 * MIB, 6 * MIB + CLUSTER)):
        lab.machine.qmp("block_resize", **{"node-name": "node-vda", "size": size})
        lab.writer.model["vda"] = bytearray(b"\x55" * shown + bytes(size - shown))
        report = lab.backup("incremental")
        assert how(report) == {"vda": "incremental"}
        lab.assert_point(report["point"], lab.writer.moment)
    lab.writer.do("vda", "data", 8 * MIB, MIB, 0x55)  # what the hidden layer holds there
    report = lab.backup("incremental")
    lab.assert_point(report["point"], lab.writer.moment)
