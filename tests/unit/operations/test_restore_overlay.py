# SPDX-License-Identifier: GPL-2.0-or-later
"""A thin restore: QEMU reads the point through it, its own writes stay in it, the repository is as before."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from backupctl.cancel import Cancellation
from backupctl.errors import DamageFound, TargetExists, UsageError
from backupctl.images import create
from backupctl.operations.prune.retention import Rules
from backupctl.operations.prune.run import prune
from backupctl.operations.restore.overlay import restore
from backupctl.operations.restore.request import RestoreRequest
from backupctl.progress import Silent
from backupctl.targets import overlay
from fixtures.machine import Disk, Machine
from tests.unit.operations.test_restore_whole import as_raw, tree
from tests.unit.points import P1, P2, Builder, die_at, disk_entry

MIB = 1 << 20


def run(builder: Builder, to: object, *, point: str = "latest", **options):
    chosen = builder.directory.point(point).id
    return restore(RestoreRequest(directory=builder.directory, point=chosen, to=str(to), **options), Silent())


def command(builder: Builder, *arguments: object) -> "subprocess.CompletedProcess[str]":
    repository = str(builder.repository.path)
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "backupctl",
            "restore",
            "vm1",
            *map(str, arguments),
            "--repository",
            repository,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_it_reads_as_the_point_and_takes_no_room(two_points, tmp_path):
    """By qemu-img, through a relative name of the repository and from another directory."""
    builder, content = two_points
    report = run(builder, tmp_path / "thin" / "")
    overlay = tmp_path / "thin" / "vda.qcow2"
    (disk,) = report.images
    assert (disk.path, disk.size) == (overlay, len(content))
    assert disk.backing == (builder.directory.path / P2 / "vda.qcow2").resolve()
    assert overlay.stat().st_size < MIB // 2
    assert as_raw(overlay) == content
    same = ["qemu-img", "compare", str(overlay), str(builder.directory.path / P2 / "vda.qcow2")]
    assert subprocess.run(same, capture_output=True, timeout=60, check=False).returncode == 0


def test_a_qemu_runs_on_it_at_once_and_the_repository_stays_as_it_is(two_points, tmp_path, build):
    """A whole QEMU takes it for its disk: reads the point, writes, reads back."""
    builder, _ = two_points
    before = tree(builder.repository.path)
    run(builder, f"{tmp_path}/thin/", point=P1)
    overlay = tmp_path / "thin" / "vda.qcow2"
    content = as_raw(overlay)
    assert content[:70_000] == b"a" * 70_000
    with Machine(build, [Disk("vda", overlay, "qcow2")]) as machine:
        machine.io("vda", "read -q -P 0x61 0 69632")
        machine.io("vda", "write -q -P 0x77 512 65536")
        machine.io("vda", "read -q -P 0x77 512 65536")
        machine.quit()
    assert as_raw(overlay) == content[:512] + b"\x77" * 65_536 + content[66_048:]
    assert tree(builder.repository.path) == before


def test_a_prune_below_a_vm_that_runs_on_it_waits_and_one_after_it_changes_no_byte(
    two_points, tmp_path, build
):
    """QEMU has the layers open: nothing is written into them. Without it they are merged."""
    builder, _ = two_points
    run(builder, tmp_path / "thin.qcow2")
    content = as_raw(tmp_path / "thin.qcow2")

    def pruned():
        return prune(builder.directory, Rules(last=1), Silent(), Cancellation())

    with Machine(build, [Disk("vda", tmp_path / "thin.qcow2", "qcow2")]) as machine:
        machine.io("vda", "write -q -P 0x77 0 512")
        below = (builder.directory.path / P1 / "vda.qcow2").read_bytes()
        assert pruned().left
        assert (builder.directory.path / P1 / "vda.qcow2").read_bytes() == below
        machine.quit()
    content = b"\x77" * 512 + content[512:]
    assert as_raw(tmp_path / "thin.qcow2") == content
    assert pruned().left == ()
    assert not (builder.directory.path / P1).exists()
    assert as_raw(tmp_path / "thin.qcow2") == content


def test_every_disk_gets_one(builder: Builder, tmp_path):
    builder.point(P1, (disk_entry("vda"), [(0, b"A" * 512)]), (disk_entry("vdb"), [(0, b"B" * 512)]))
    run(builder, tmp_path)
    assert as_raw(tmp_path / "vda.qcow2")[:512] == b"A" * 512
    assert as_raw(tmp_path / "vdb.qcow2")[:512] == b"B" * 512
    with pytest.raises(UsageError, match="--disk"):
        run(builder, tmp_path / "one.qcow2")


@pytest.mark.parametrize("options", [{"to": "-"}, {"to": "x/", "image_format": "raw"}])
def test_what_can_have_no_backing_is_refused(two_points, options):
    builder, _ = two_points
    with pytest.raises(UsageError):
        run(builder, **options)


def test_what_exists_is_replaced_only_by_force_and_the_repository_never(two_points, tmp_path):
    builder, content = two_points
    target = tmp_path / "vda.qcow2"
    target.write_bytes(b"precious")
    with pytest.raises(TargetExists):
        run(builder, target)
    assert target.read_bytes() == b"precious"
    run(builder, target, overwrite=True)
    assert as_raw(target) == content
    with pytest.raises(UsageError, match="repository"):
        run(builder, builder.directory.path / P1 / "vda.qcow2", overwrite=True)


def test_a_broken_chain_is_told_and_nothing_is_made(two_points, tmp_path):
    builder, _ = two_points
    (builder.directory.path / P1 / "vda.qcow2").unlink()
    with pytest.raises(DamageFound):
        run(builder, tmp_path / "thin.qcow2")
    assert not (tmp_path / "thin.qcow2").exists()


def test_death_at_any_step_leaves_the_target_absent_or_whole(two_points, tmp_path):
    builder, content = two_points
    target = tmp_path / "thin.qcow2"
    number = 0
    while not die_at(number, lambda: run(builder, target)):
        assert not target.exists() or as_raw(target) == content
        target.unlink(missing_ok=True)
        number += 1
    assert number > 3
    assert as_raw(target) == content
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_the_command_tells_what_it_stands_on_and_how_to_keep_it(two_points, tmp_path):
    builder, _ = two_points
    done = command(builder, P2, "--to", tmp_path / "thin.qcow2", "--thin")
    assert done.returncode == 0, done.stderr
    assert f"on {builder.directory.path.resolve() / P2}/vda.qcow2" in done.stdout
    assert f"backupctl protect vm1 {P2}" in done.stderr
    done = command(builder, P2, "--to", f"{tmp_path}/more/", "--thin", "--json")
    document = json.loads(done.stdout)
    assert Path(document["disks"][0]["path"]).exists()
    assert command(builder, P2, "--to", tmp_path, "--thin", "--only-changed").returncode == 2


def test_a_chain_that_qemu_can_not_follow_by_its_links_is_refused(tmp_path):
    """QEMU names an image below by the name above and the link in it, so names grow; one byte decides."""
    directory = tmp_path
    while len(str(directory)) < 900:
        directory /= "d" * min(200, 901 - len(str(directory)))
    chain: list[Path] = []
    for number in range(170):
        (directory / f"{number:016}").mkdir(parents=True)
        chain.insert(0, directory / f"{number:016}" / "vda.qcow2")
        create.create_layer(chain[0], MIB, f"../{chain[1].parent.name}/vda.qcow2" if number else None)

    def made(layers: int) -> bool:
        thin = tmp_path / f"{layers}.qcow2"
        try:
            overlay.make(thin, MIB, chain[-layers:], force=False)
        except UsageError:
            create.create_layer(thin, MIB, str(chain[-layers]))
            return False
        return True

    def opened(layers: int) -> bool:
        command = ["qemu-img", "info", "--backing-chain", tmp_path / f"{layers}.qcow2"]
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0

    most = max(layers for layers in range(140, 171) if made(layers))
    assert 140 < most < 170
    assert opened(most)
    assert not opened(most + 1)
