# SPDX-License-Identifier: GPL-2.0-or-later
"""Others work on the same VM, its images, its repository: a point is right all the same, or there is none."""

import json
import os
import subprocess
import time
from collections.abc import Callable

import pytest

MIB = 1 << 20

pytestmark = pytest.mark.simulator_too

SLOW = ("--limit", "2M")  # slow enough to be met in mid-copy


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def copying(lab) -> Callable[[], bool]:
    """Whether bytes of the first disk have come."""

    def look() -> bool:
        images = list((lab.cli.repository / "web").glob("*.partial/*.qcow2"))
        moving = any(image.stat().st_blocks * 512 > 300_000 for image in images)
        return bool(lab.machine.qmp("query-block-exports")) and moving

    return look


def taken(report) -> dict[str, str]:
    return {disk["name"]: "scan" if disk["scanned"] else disk["kind"] for disk in report["disks"]}


@pytest.mark.needs_qemu("the simulator keeps bitmaps beside an image, not in it")
def test_images_that_were_exchanged_are_scanned(build, make_lab):
    """A bitmap goes with its image, and both have one of the newest point."""
    lab = make_lab(build, {"vda": 8 * MIB, "vdb": 8 * MIB})
    lab.writer.write(60)
    lab.backup("full")
    lab.machine.quit()
    one, two, aside = (lab.directory / name for name in ("vda.qcow2", "vdb.qcow2", "aside"))
    one.rename(aside)
    two.rename(one)
    aside.rename(two)
    model = lab.writer.model
    model["vda"], model["vdb"] = model["vdb"], model["vda"]
    lab.machine.start()
    lab.writer.write(3)
    report = lab.backup("incremental")
    assert taken(report) == {"vda": "scan", "vdb": "scan"}
    lab.assert_point(report["point"], lab.writer.moment)
    lab.next_is_right()


@pytest.mark.needs_qemu("the simulator keeps bitmaps beside an image, not in it")
def test_an_image_that_was_copied_over_another_is_scanned(any_build, make_lab):
    lab = make_lab(any_build, {"vda": 8 * MIB, "vdb": 8 * MIB})
    lab.writer.write(60)
    lab.backup("full")
    lab.machine.quit()
    (lab.directory / "vdb.qcow2").write_bytes((lab.directory / "vda.qcow2").read_bytes())
    lab.writer.model["vdb"][:] = lab.writer.model["vda"]
    lab.machine.start()
    lab.writer.write(3)
    report = lab.backup("incremental")
    assert taken(report) == {"vda": "incremental", "vdb": "scan"}
    lab.assert_point(report["point"], lab.writer.moment)
    lab.next_is_right()


def test_names_that_were_exchanged_in_the_configuration_lead_to_a_scan(any_build, make_lab, tmp_path):
    lab = make_lab(any_build, {"vda": 8 * MIB, "vdb": 8 * MIB})
    lab.writer.write(60)
    config = tmp_path / "backupctl.toml"

    def run(kind: str, **names: str) -> dict[str, object]:
        disks = "\n".join(f'{disk} = "{name}"' for disk, name in names.items())
        config.write_text(
            f'[vm.web]\nqmp = "unix:{lab.machine.qmp_path}"\nagent = "unix:{lab.machine.agent_path}"\n'
            f'scratch = "{lab.cli.scratch}"\n[vm.web.disks]\n{disks}\n'
        )
        done = subprocess.run(
            lab.cli.command(kind, "web", "--json", vm=False),
            env={**lab.cli.environment, "BACKUPCTL_CONFIG": str(config)},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return json.loads(done.stdout)

    run("full", vda="system", vdb="data")
    lab.writer.write(3)
    report = run("incremental", vda="data", vdb="system")
    assert taken(report) == {"data": "scan", "system": "scan"}
    moment = lab.writer.moment
    lab.assert_point(report["point"], {"data": moment["vda"], "system": moment["vdb"]})


def test_a_volume_that_was_extended_is_read_where_it_is_new(build, make_lab):
    """What lay there before is no zeroes, and no write of the guest's has made it dirty."""
    lab = make_lab(build, {"vda": 16 * MIB}, formats={"vda": "raw"})
    lab.writer.write(40)
    lab.backup("full")
    with (lab.directory / "vda.raw").open("ab") as image:
        image.write(os.urandom(MIB + 512))
    size = 17 * MIB + 512
    assert lab.machine.qmp("block_resize", **{"node-name": "node-vda", "size": size}) == {}
    lab.writer.model["vda"][:] = (lab.directory / "vda.raw").read_bytes()
    lab.writer.write(3)
    report = lab.backup("incremental")
    assert taken(report) == {"vda": "incremental"}
    lab.assert_point(report["point"], lab.writer.moment)
    lab.next_is_right()


@pytest.mark.parametrize("kind", ["full", "incremental"])
def test_a_job_that_somebody_ends_in_mid_copy_fails_the_run(build, make_lab, kind):
    """Without it the guest's writes show through."""
    lab = make_lab(build, {"vda": 16 * MIB})
    lab.writer.write(5)
    first = lab.backup("full")["point"]
    moment = lab.writer.moment
    lab.writer.do("vda", "data", 0, 16 * MIB, 0x11)
    with lab.cli.start(kind, "web", "--json", *SLOW) as run:
        wait_for(copying(lab))
        (job,) = [each["id"] for each in lab.machine.qmp("query-jobs")]
        assert lab.machine.qmp("block-job-cancel", device=job, force=True) == {}
        lab.writer.do("vda", "data", 14 * MIB, 2 * MIB, 0x22)
        told, _ = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "somebody else ended the job" in json.loads(told)["error"]["message"]
    assert [each["point"] for each in lab.cli.json("list", "web", vm=False)] == [first]
    lab.assert_point(first, moment)
    lab.next_is_right()


def test_a_job_of_a_dead_run_whose_guard_died_too_is_not_taken_for_that_of_the_next(build, make_lab):
    """It ends on the next run's own monitor connection, and has the same name."""
    lab = make_lab(build, {"vda": 8 * MIB})
    lab.writer.write(20)
    lab.backup("full")
    lab.writer.write(10)
    tag = lab.machine.bitmaps()["node-vda"][0].split("-")[1]
    target = lab.directory / "scratch.raw"
    target.write_bytes(bytes(8 * MIB))
    scratch, job = f"backupctl-{tag}-tmp0", f"backupctl-{tag}-job0"
    node = {"driver": "raw", "node-name": scratch, "file": {"driver": "file", "filename": str(target)}}
    assert lab.machine.qmp("blockdev-add", **node) == {}
    order = {"job-id": job, "device": "node-vda", "target": scratch, "sync": "none"}
    assert lab.machine.qmp("blockdev-backup", **order) == {}
    lab.next_is_right()


@pytest.mark.needs_qemu("the simulator takes no snapshot below a filter")
def test_a_snapshot_below_our_filter_is_what_the_device_gets_back(newest_build, make_lab):
    """Of the node that it had before, it would lose what the guest wrote since."""
    lab = make_lab(newest_build, {"vda": 16 * MIB})
    lab.writer.do("vda", "data", 0, 16 * MIB, 0x11)
    overlay = lab.directory / "over.qcow2"
    make = [newest_build.tool("qemu-img"), "create", "-q", "-f", "qcow2", overlay, "16M"]
    subprocess.run(make, check=True, timeout=30)
    node = {"driver": "qcow2", "node-name": "over", "file": {"driver": "file", "filename": str(overlay)}}
    with lab.cli.start("full", "web", "--json", "--view", "snapshot-access", *SLOW) as run:
        wait_for(copying(lab))
        moment = lab.writer.moment
        assert lab.machine.qmp("blockdev-add", **node, backing=None) == {}
        assert lab.machine.qmp("blockdev-snapshot", node="node-vda", overlay="over") == {}
        lab.writer.do("vda", "data", 14 * MIB, MIB, 0x22)
        told, _ = run.communicate(timeout=60)
    assert run.returncode == 0, told
    lab.assert_point(json.loads(told)["point"], moment)
    tops = [each["inserted"]["node-name"] for each in lab.machine.qmp("query-block") if each.get("inserted")]
    assert tops == ["over"]
    assert lab.machine.leftovers() == []
    lab.machine.io("vda", f"read -q -P 0x22 {14 * MIB} {MIB}")
    lab.writer.remember()
    report = lab.backup("incremental")
    assert taken(report) == {"vda": "scan"}
    lab.assert_point(report["point"], lab.writer.moment)


def test_a_base_that_somebody_enabled_before_the_recovery_gets_the_record_all_the_same(build, make_lab):
    lab = make_lab(build, {"vda": 16 * MIB})
    lab.writer.write(80)
    lab.backup("full")
    lab.writer.write(40)
    with lab.cli.start("incremental", "web", *SLOW) as run:
        wait_for(copying(lab))
        lab.writer.do("vda", "data", MIB, 65536, 0x61)
        run.kill()
        run.communicate(timeout=60)
    wait_for(lambda: not lab.machine.qmp("query-block-exports") and not lab.machine.qmp("query-jobs"))
    base = min(name for name in lab.machine.bitmaps()["node-vda"] if name.startswith("backupctl-"))
    assert lab.machine.qmp("block-dirty-bitmap-enable", node="node-vda", name=base) == {}
    lab.writer.do("vda", "data", 15 * MIB, 65536, 0x62)
    report = lab.backup("incremental")
    assert taken(report) == {"vda": "incremental"}
    lab.assert_point(report["point"], lab.writer.moment)
    lab.next_is_right()


def test_a_copy_of_the_repository_and_a_clock_set_back_make_no_id_twice(any_build, make_lab):
    """Else each repository would take the other's bitmap for its own."""
    lab = make_lab(any_build, {"vda": 16 * MIB})
    plain, clock = lab.cli.command, ["2026-11-23T12:00:00"]

    def command(*arguments: str, vm: bool = True) -> list[str]:
        found = plain(*arguments, vm=vm)
        at = found.index("-m")
        code = (
            "import runpy, sys; from datetime import UTC, datetime; "
            "from backupctl.cli import backup; from functools import partial; "
            f"clock = lambda: datetime.fromisoformat('{clock[0]}').replace(tzinfo=UTC); "
            "backup.RunContext = partial(backup.RunContext, clock=clock); "
            "runpy.run_module('backupctl', run_name='__main__')"
        )
        return [*found[:at], "-c", code, *found[at + 2 :]]

    lab.cli.command = command
    lab.writer.write(60)
    lab.backup("full")
    first, second = lab.cli.repository, lab.directory / "copy"
    subprocess.run(["cp", "-a", first, second], check=True)
    clock[0] = "2026-11-22T12:00:00"
    points = {}
    for number, repository in enumerate((first, second, first)):
        lab.cli.repository = repository
        points[repository] = lab.backup("incremental")["point"]
        lab.assert_point(points[repository], lab.writer.moment)
        lab.writer.do("vda", "data", (5 + number) * MIB, 65536, 0x61 + number)
    assert points[first] != points[second]
