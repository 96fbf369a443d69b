# SPDX-License-Identifier: GPL-2.0-or-later
"""qemu-storage-daemon: disks without a device, a monitor that takes no descriptors."""

from backupctl.repository.repository import Repository
from fixtures.storage_daemon import StorageDaemon


def test_the_disks_of_a_storage_daemon_are_backed_up_over_named_files(oldest_build, make_lab):
    lab = make_lab(oldest_build, kind_of_machine=StorageDaemon, seed=3)
    lab.writer.write(60)
    lab.writer.start()
    moments = {}
    for kind in ("full", "incremental", "incremental"):
        report = lab.backup(kind, "--limit", "60M")
        assert report["consistency"] == "filesystem"
        moments[report["point"]] = {f"node-{disk}": content for disk, content in lab.writer.moment.items()}
    lab.writer.stop()
    lab.assert_at_rest()
    for point, moment in moments.items():
        lab.assert_point(point, moment)
    assert lab.cli.json("status", "web")["leftovers"] == []


def test_without_an_agent_its_points_are_crash_consistent_and_hold_what_changed(oldest_build, make_lab):
    lab = make_lab(oldest_build, {"vda": 16 << 20}, kind_of_machine=StorageDaemon)
    lab.agent.close()
    lab.writer.do("vda", "data", 0, 8 << 20)
    lab.backup("full")
    lab.writer.do("vda", "data", (4 << 20) + 512, 1 << 20)
    lab.writer.remember()
    report = lab.backup("incremental")
    assert report["consistency"] == "crash"
    assert report["disks"][0]["name"] == "node-vda"
    assert report["disks"][0]["copied_bytes"] == (1 << 20) + 65536
    lab.assert_point(report["point"], {"node-vda": lab.writer.moment["vda"]})


def test_a_fuse_export_is_refused_by_a_qemu_that_would_hang_with_it(newest_build, make_lab):
    lab = make_lab(newest_build, kind_of_machine=StorageDaemon)
    told = lab.cli.json("full", "web", code=1)["error"]
    assert told["kind"] == "Refused"
    assert "is exported by FUSE" in told["message"]
    assert told["state"] == "nothing was touched"
    Repository.create(lab.cli.repository)
    assert told["message"] in lab.cli.json("status", "web")["next_run"]
    lab.assert_at_rest(bitmaps_each=0)
