# SPDX-License-Identifier: GPL-2.0-or-later
"""What verify finds, what it says of it, and that it keeps quiet about what is sound."""

import json
import random
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from backupctl.cancel import Cancellation
from backupctl.digests import digest_map
from backupctl.errors import DamageFound, Interrupted, NoSuchPoint
from backupctl.images import create
from backupctl.names import PointId, VmName
from backupctl.operations.verify.impact import Affected, Impact
from backupctl.operations.verify.layer import VerifyScope
from backupctl.operations.verify.run import verify
from backupctl.progress import Silent
from backupctl.repository import history, markers
from backupctl.repository.history import PointEvent
from backupctl.system import locks
from tests.unit.points import P1, P2, P3, Builder, disk_entry, stored, write_image

MIB = 1 << 20
CLUSTER = 65536


def noise(seed: int, clusters: int) -> bytes:
    return random.Random(seed).randbytes(clusters * CLUSTER)


@dataclass
class Stock:
    """A full and two incrementals of two disks.

    vda is of 40 clusters and a bit: the full stores 0 to 19 and the tail; P2 clusters 4 to 7 and 30,
    and zeroes at 10; P3 stores 6. vdb: cluster 0 of each point.
    """

    builder: Builder

    def image(self, point: PointId, disk: str = "vda", suffix: str = "qcow2") -> Path:
        return self.builder.directory.path / point / f"{disk}.{suffix}"

    def verify(self, point=None, vm="vm1", **depth):
        return verify(
            self.builder.repository,
            vm and self.builder.directory.name,
            point,
            VerifyScope(**depth),
            Silent(),
            Cancellation(),
        )

    def place(self, image: Path, marker: bytes) -> int:
        """Where in the file a cluster's bytes lie."""
        found = image.read_bytes().find(marker)
        assert found > 0
        return found


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


@pytest.fixture
def stock(builder: Builder) -> Stock:
    size = 40 * CLUSTER + 1024
    vda, vdb = disk_entry("vda", size=size), disk_entry("vdb", size=MIB)
    builder.point(P1, (vda, [(0, noise(1, 20)), (40 * CLUSTER, b"tail" * 256)]), (vdb, [(0, noise(2, 1))]))
    up = {"kind": "incremental", "parent": P1}
    changes = [(4 * CLUSTER, noise(3, 4)), (30 * CLUSTER, noise(4, 1)), (10 * CLUSTER, bytes(CLUSTER))]
    builder.point(P2, (replace(vda, **up), changes), (replace(vdb, **up), [(0, noise(5, 1))]))
    up = {"kind": "incremental", "parent": P2}
    builder.point(
        P3, (replace(vda, **up), [(6 * CLUSTER, noise(6, 1))]), (replace(vdb, **up), [(0, noise(7, 1))])
    )
    return Stock(builder)


def test_a_sound_repository_has_no_damage_and_every_layer_is_read_once(stock):
    report = stock.verify()
    assert report.damage == ()
    assert report.notes == ()
    assert (report.points, report.layers) == (3, 6)
    assert report.read_bytes == (21 + 5 + 1 + 3) * CLUSTER


def test_the_whole_repository_is_verified_when_no_vm_is_named(stock):
    assert stock.verify(vm=None).vms == ("vm1",)


def test_a_flipped_bit_is_told_with_its_range_and_every_point_that_reads_it(stock):
    image = stock.image(P1)
    flip(image, stock.place(image, noise(1, 20)[5 * CLUSTER : 5 * CLUSTER + 64]) + 777)
    (damage,) = stock.verify().damage
    assert (damage.kind, damage.disk, damage.path) == ("data", "vda", image)
    assert damage.ranges == ((5 * CLUSTER, CLUSTER),)
    assert damage.touches == (Affected(P1, "vda", ((5 * CLUSTER, CLUSTER),)),)


def test_a_range_that_newer_layers_leave_open_touches_them_too(stock):
    image = stock.image(P1)
    for cluster in (3, 4):
        flip(image, stock.place(image, noise(1, 20)[cluster * CLUSTER : cluster * CLUSTER + 64]))
    (damage,) = stock.verify().damage
    assert damage.ranges == ((3 * CLUSTER, 2 * CLUSTER),)
    assert damage.touches == (
        Affected(P1, "vda", ((3 * CLUSTER, 2 * CLUSTER),)),
        Affected(P2, "vda", ((3 * CLUSTER, CLUSTER),)),
        Affected(P3, "vda", ((3 * CLUSTER, CLUSTER),)),
    )


def test_the_short_tail_of_a_disk_is_told_by_its_own_length(stock):
    image = stock.image(P1)
    flip(image, stock.place(image, b"tail" * 256) + 1000)
    (damage,) = stock.verify().damage
    assert damage.ranges == ((40 * CLUSTER, 1024),)
    assert [one.point for one in damage.touches] == [P1, P2, P3]


def test_one_point_is_verified_with_the_layers_it_needs_and_no_other(stock):
    flip(stock.image(P3), stock.place(stock.image(P3), noise(6, 1)[:64]))
    report = stock.verify(P2)
    assert (report.damage, report.layers, report.points) == ((), 4, 1)
    (damage,) = stock.verify("latest").damage
    assert [one.point for one in damage.touches] == [P3]


def test_fast_reads_no_data(stock):
    flip(stock.image(P1), stock.place(stock.image(P1), noise(1, 20)[:64]))
    report = stock.verify(data=False)
    assert (report.damage, report.read_bytes) == ((), 0)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("suffix", ["qcow2", "digests"])
def test_a_lost_file_touches_all_that_stands_on_it(stock, suffix, fast):
    stock.image(P2, suffix=suffix).unlink()
    (damage,) = stock.verify(data=not fast).damage
    whole = ((0, 40 * CLUSTER + 1024),)
    assert damage.touches == (Affected(P2, "vda", whole), Affected(P3, "vda", whole))
    assert damage.kind == ("image" if suffix == "qcow2" else "digests")


@pytest.mark.parametrize("how", ["lost", "damaged"])
def test_a_manifest_that_cannot_be_read_touches_what_stands_on_it(stock, how):
    manifest = stock.image(P1).with_name("manifest.json")
    if how == "lost":
        manifest.unlink()
    else:
        flip(manifest, 40)
    report = stock.verify()
    first = report.damage[0]
    assert (first.kind, first.path) == ("manifest", manifest.parent)
    assert {(one.point, one.disk) for one in first.touches} == {
        (point, disk) for point in (P2, P3) for disk in ("vda", "vdb")
    }
    assert {damage.kind for damage in report.damage[1:]} == {"chain"}


def test_a_missing_point_is_told_by_those_that_stand_on_it(stock):
    shutil.rmtree(stock.image(P1).parent)
    found = stock.verify(data=False).damage
    assert [(each.kind, each.disk) for each in found] == [("history", ""), ("chain", "vda"), ("chain", "vdb")]
    assert [one.point for one in found[1].touches] == [P2, P3]


def test_images_of_two_points_swapped_are_found_with_and_without_their_digest_maps(stock):
    for suffixes in (["qcow2"], ["qcow2", "digests"]):
        for suffix in suffixes:
            _swap(stock.image(P1, "vdb", suffix), stock.image(P2, "vdb", suffix))
        damaged = {damage.path.parent.name for damage in stock.verify().damage}
        assert damaged == {P1, P2}
        for suffix in suffixes:
            _swap(stock.image(P1, "vdb", suffix), stock.image(P2, "vdb", suffix))
    assert stock.verify().damage == ()


def _swap(one: Path, other: Path) -> None:
    aside = one.with_suffix(".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def test_a_truncated_image_is_told_with_the_clusters_that_went(stock):
    image = stock.image(P2)
    at = stock.place(image, noise(4, 1)[:64])
    with image.open("r+b") as file:
        file.truncate(at)
    found = stock.verify().damage
    assert {damage.kind for damage in found} == {"image", "data"}
    (data,) = (damage for damage in found if damage.kind == "data")
    assert (30 * CLUSTER, CLUSTER) in data.ranges


def test_a_cluster_that_was_written_behind_our_back_is_found(stock):
    """It keeps the file's length: the space of a cluster that was dropped is used again."""
    image = stock.image(P3)
    _qemu_io(image, f"discard {6 * CLUSTER} {CLUSTER}", f"write -q -P 5 {7 * CLUSTER} {CLUSTER}")
    found = {damage.message.split(": ", 1)[1]: damage.ranges for damage in stock.verify(data=False).damage}
    assert found["1 cluster stored, but not in the digest map"] == ((7 * CLUSTER, CLUSTER),)


def _qemu_io(image: Path, *commands: str) -> None:
    node = {"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": str(image)}}
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(
        ["qemu-io", *words, f"json:{json.dumps(node)}"], check=True, capture_output=True, timeout=60
    )


def test_an_entry_of_a_table_that_leads_nowhere_costs_its_cluster_and_no_other(stock):
    image = stock.image(P1)
    content = image.read_bytes()
    (first,) = struct.unpack_from(">Q", content, 40)
    second = struct.unpack_from(">Q", content, first)[0] & (1 << 56) - 512
    flip(image, second + 8 * 12 + 6, 1)  # now between two clusters, which QEMU refuses
    found = {damage.kind: damage for damage in stock.verify().damage}
    assert set(found) == {"image", "data"}  # qemu-img check sees it too
    assert found["data"].ranges == ((12 * CLUSTER, CLUSTER),)
    assert [one.point for one in found["data"].touches] == [P1, P2, P3]


def test_a_sample_is_another_one_every_time_and_the_same_for_the_same_seed(builder):
    entry = disk_entry(size=64 * MIB)
    builder.point(P1, (entry, [(at * MIB, noise(at, 16)) for at in range(64)]))
    stock = Stock(builder)
    image = stock.image(P1)
    flip(image, stock.place(image, noise(30, 16)[:64]))
    assert len(stock.verify().damage) == 1
    found = [len(stock.verify(percent=25, seed=seed).damage) for seed in range(12)]
    assert 0 < sum(found) < 12
    assert found == [len(stock.verify(percent=25, seed=seed).damage) for seed in range(12)]
    assert stock.verify(percent=25, seed=1).read_bytes == 16 * MIB
    assert stock.verify(percent=0.01, seed=1).read_bytes == MIB
    assert VerifyScope().seed != VerifyScope().seed


def test_an_unfinished_point_is_no_damage_but_told(stock):
    stock.builder.begin(PointId("20260104T000000Z"))
    report = stock.verify(data=False)
    assert report.damage == ()
    assert report.notes[0].endswith("20260104T000000Z.partial: an unfinished point")


def test_a_vm_or_point_that_is_not_there_is_no_success(stock):
    with pytest.raises(NoSuchPoint):
        stock.verify("20250101T000000Z")
    with pytest.raises(NoSuchPoint, match="vm2"):
        verify(stock.builder.repository, VmName("vm2"), None, VerifyScope(), Silent(), Cancellation())


def test_a_point_asked_for_whose_manifest_is_damaged_is_damage(stock):
    flip(stock.image(P2).with_name("manifest.json"), 10)
    with pytest.raises(DamageFound):
        stock.verify(P2)


def test_a_verify_needs_no_qemu(stock, monkeypatch):
    for program in ("QEMU_IMG", "QEMU_STORAGE_DAEMON"):
        monkeypatch.setenv(program, f"/nowhere/{program}")
    report = stock.verify()
    assert (report.damage, report.layers) == ((), 6)


@pytest.mark.parametrize(("limit", "code"), [("-S -n 20", 0), ("-n 20", 1)])
def test_more_layers_than_files_may_be_open_are_no_damage(builder, limit, code):
    """Up to what the administrator allows; beyond that it is an error.

    The digest maps are large enough for each to stay open while its layer is looked at.
    """
    size = 32 * MIB
    partial = builder.begin(P1)
    image = partial.path / "disk0.qcow2"
    create.create_layer(image, size, None)
    write_image((image,), [(0, noise(1, 257))])
    checksum = digest_map.write(digest_map.path_of(image), size, stored(image, size))
    entries = []
    for number in range(16):
        entry = disk_entry(f"disk{number}", size=size)
        entry = replace(entry, file_bytes=image.stat().st_size, digests=checksum)
        for suffix in ("qcow2", "digests") if number else ():
            (partial.path / f"{entry.name}.{suffix}").hardlink_to(image.with_suffix(f".{suffix}"))
        entries.append(entry)
    partial.commit(builder.manifest(P1, *entries))
    command = [sys.executable, "-m", "backupctl", "verify", "--fast", "--repository", builder.repository.path]
    shell = ["sh", "-c", f'ulimit {limit}; exec "$@"', "sh", *command]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert "DAMAGE" not in done.stdout
    assert ("Too many open files" in done.stderr) == bool(code)


def test_a_request_to_stop_ends_it(stock):
    stop = Cancellation()
    stop.request("SIGTERM")
    with pytest.raises(Interrupted):
        verify(stock.builder.repository, None, None, VerifyScope(), Silent(), stop)


def test_nothing_is_changed_by_it(stock):
    def state():
        return {
            path: (path.read_bytes(), path.stat().st_mtime_ns)
            for path in stock.builder.repository.path.rglob("*")
            if path.is_file()
        }

    before = state()
    stock.verify()
    assert state() == before


def test_a_thousand_flipped_bits_are_a_thousand_found(builder):
    """One bit in each of a thousand stored clusters, in one layer; each is named, and no other."""
    numbers = sorted(random.Random(4).sample(range(2000), 1000))
    content = noise(9, 2000)
    builder.point(
        P1,
        (
            disk_entry(size=2000 * CLUSTER),
            [(at, content[at : at + MIB]) for at in range(0, len(content), MIB)],
        ),
    )
    stock = Stock(builder)
    image = stock.image(P1)
    stored = image.read_bytes()
    place = {stored[at : at + 32]: at for at in range(0, len(stored), CLUSTER)}
    chance = random.Random(5)
    for number in numbers:
        at = place[content[number * CLUSTER : number * CLUSTER + 32]]
        flip(image, at + chance.randrange(CLUSTER), chance.randrange(8))
    (damage,) = stock.verify().damage
    found = [
        cluster
        for offset, length in damage.ranges
        for cluster in range(offset // CLUSTER, (offset + length) // CLUSTER)
    ]
    assert found == numbers


def test_the_layers_of_a_retired_point_are_verified_for_those_that_stand_on_it(stock):
    image = stock.image(P1)
    markers.put(image.parent, markers.RETIRED)
    flip(image, stock.place(image, noise(1, 20)[:64]))
    report = stock.verify()
    assert (report.points, report.layers) == (2, 6)
    (damage,) = report.damage
    assert [one.point for one in damage.touches] == [P2, P3]
    assert len(stock.verify("latest").damage) == 1


def test_an_unfinished_merge_is_damage_only_where_nothing_masks_it(stock):
    """P1 is being overwritten with what P2 stores: clusters 4 to 7, 10 and 30."""
    image = stock.image(P1)
    markers.put(image.parent, markers.RETIRED)
    markers.put(image.parent, markers.merging("vda"))
    _qemu_io(image, f"write -q -P 9 {4 * CLUSTER} {2 * CLUSTER}", f"write -q -P 9 {30 * CLUSTER} {CLUSTER}")
    report = stock.verify()
    assert report.damage == ()
    assert "an unfinished prune" in report.notes[0]
    _qemu_io(image, f"write -q -P 9 {3 * CLUSTER} {CLUSTER}")
    (damage,) = stock.verify().damage
    assert [one.ranges for one in damage.touches] == [((3 * CLUSTER, CLUSTER),)] * 2


def test_a_prune_at_work_is_not_waited_for_for_ever(stock, monkeypatch):
    monkeypatch.setattr("backupctl.operations.verify.run._LOCK_SECONDS", 0.05)
    with locks.directory(stock.image(P2).parent, 0):
        report = stock.verify(data=False)
    assert report.damage == ()
    assert [note for note in report.notes if "a prune is changing it" in note] == list(report.notes[:2])
    with locks.directory(stock.image(P2).parent, 0, shared=True):
        assert stock.verify(data=False).notes == ()


def test_a_point_that_is_pruned_meanwhile_is_no_damage(stock, monkeypatch):
    """The newest goes, after the survey and before its layers' turn."""
    real = Impact.__init__

    def prune(*arguments):
        real(*arguments)
        history.record(stock.image(P3).parent.parent, PointEvent("dropped", P3))
        shutil.rmtree(stock.image(P3).parent)

    monkeypatch.setattr(Impact, "__init__", prune)
    report = stock.verify(data=False)
    assert report.damage == ()
    assert report.notes[-1].endswith(f"{P3}: pruned meanwhile")


def test_a_flipped_bit_in_the_format_of_what_is_below_is_found(stock):
    """backupctl opens the layer below as qcow2 in any case; a stranger's QEMU does as it is told here."""
    image = stock.image(P2)
    begin = stock.place(image, b"qcow2")
    for offset in range(begin, begin + len(b"qcow2")):
        flip(image, offset)
        found = stock.verify(data=False).damage
        assert [(each.path, each.disk) for each in found] == [(image, "vda")]
        assert {touched.point for touched in found[0].touches} == {P2, P3}
        flip(image, offset)
    assert stock.verify().damage == ()
