# SPDX-License-Identifier: GPL-2.0-or-later
"""Pruning: whatever goes, each point that stays holds the same bytes, after a death anywhere too."""

import os
import random
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from backupctl.cancel import Cancellation
from backupctl.digests.clusters import CLUSTER_BYTES
from backupctl.digests.digest_map import DigestMap
from backupctl.errors import DamageFound, NoSuchPoint, UsageError
from backupctl.names import PointId, next_point_id, point_time
from backupctl.operations.prune import run as prune
from backupctl.operations.prune.retention import Rules
from backupctl.operations.verify import run as verify
from backupctl.operations.verify.layer import VerifyScope
from backupctl.progress import Silent
from backupctl.repository import chain, markers, merge, read_locks
from backupctl.repository.pending_point import PendingPoint
from backupctl.repository.point import Point
from backupctl.repository.repository import Repository
from backupctl.system import locks
from backupctl.transfer.sink import NbdSink
from tests.unit.points import P1, Builder, changing_step, die_at, disk_entry

LAST = Rules(last=1)


def pruned(builder: Builder, rules: Rules = LAST, **options) -> prune.PruneReport:
    return prune.prune(builder.directory, rules, Silent(), Cancellation(), **options)


@dataclass
class History:
    """Points of disks that are written to, grow and shrink, and what each of them holds."""

    builder: Builder
    random: random.Random
    content: dict[str, bytes] = field(default_factory=dict)
    held: dict[PointId, dict[str, bytes]] = field(default_factory=dict)
    newest: dict[str, PointId] = field(default_factory=dict)
    point: PointId | None = None

    def take(
        self, *disks: str, full: bool = False, since: PointId | None = None, size: int | None = None
    ) -> PointId:
        """Make a point of some disks, after random writes to each; size: what they have from now on."""
        made = next_point_id(point_time(P1), self.point)
        entries = []
        for disk in disks:
            parent = None if full else since or self.newest.get(disk)
            before = self.held[parent][disk] if parent else b""
            after = self._written(self.content.get(disk, b""), size or len(self.content[disk]))
            entry = disk_entry(disk, parent, len(after))
            entries.append((entry, _difference(before, after, everything=parent is None)))
            self.content[disk] = after
            self.newest[disk] = made
        self.builder.point(made, *entries)
        self.held[made] = {disk: self.content[disk] for disk in disks}
        self.point = made
        return made

    def _written(self, before: bytes, size: int) -> bytes:
        content = bytearray(before[:size].ljust(size, b"\0"))
        for _ in range(self.random.randint(0, 5)):
            offset = self.random.randrange(size)
            length = min(self.random.randint(1, 3 * CLUSTER_BYTES), size - offset)
            value = self.random.choice((0, self.random.randint(1, 255)))
            content[offset : offset + length] = bytes([value]) * length
        return bytes(content)

    def check(self, directory: Path | None = None) -> None:
        """Each point is byte-equal, by QEMU's own tools and by what the digests tell; all verifies."""
        vm = self.builder.directory
        for point in vm.points():
            for entry in point.manifest.disks:
                want = self.held[point.id][entry.name]
                assert converted(point, entry.name) == want, f"{entry.name} of {point.id}"
        report = verify.verify(
            self.builder.repository, vm.name, None, VerifyScope(), Silent(), Cancellation()
        )
        assert report.damage == ()


def _difference(before: bytes, after: bytes, *, everything: bool) -> list[tuple[int, bytes]]:
    """Return what a backup would store: clusters that differ from what shows through from below."""
    found = []
    for offset in range(0, len(after), CLUSTER_BYTES):
        new = after[offset : offset + CLUSTER_BYTES]
        old = before[offset : offset + CLUSTER_BYTES].ljust(CLUSTER_BYTES, b"\0")
        if any(new) if everything else new.ljust(CLUSTER_BYTES, b"\0") != old:
            found.append((offset, new))
    return found


def converted(point: Point, disk: str) -> bytes:
    """Read a disk as a stranger would: through the links that the images themselves name."""
    raw = point.path.parent.parent / "converted.raw"
    image = point.path / f"{disk}.qcow2"
    subprocess.run(["qemu-img", "convert", "-U", "-O", "raw", image, raw], check=True, timeout=60)
    content = raw.read_bytes()
    raw.unlink()
    return content


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    return Builder(Repository.create(tmp_path / "repository"))


def history_of(builder: Builder, seed: int) -> History:
    return History(builder, random.Random(seed))


def sectors(rand: random.Random) -> int:
    return 512 * rand.randint(1, 10 * CLUSTER_BYTES // 512)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_dropped_each_point_that_stays_is_byte_equal(builder, seed):
    """Disks that grow and shrink at any sector, differentials, runs that leave a disk out."""
    rand = random.Random(seed)
    history = history_of(builder, seed)
    history.take("vda", "vdb", full=True, size=sectors(rand))
    for _ in range(7):
        disks = rand.choice([("vda", "vdb"), ("vda",), ("vdb",)])
        changed = rand.random() < 0.4
        since = rand.choice(
            [None, *(one.id for one in builder.directory.points() if set(disks) <= set(history.held[one.id]))]
        )
        history.take(
            *disks,
            full=rand.random() < 0.1,
            since=since if rand.random() < 0.2 else None,
            size=sectors(rand) if changed else None,
        )
        if rand.random() < 0.3:
            pruned(builder, Rules(last=rand.randint(1, 4)))
            history.check()
    report = pruned(builder, Rules(last=2))
    history.check()
    kept = {one.point for one in report.decisions if one.keep}
    assert {point.id for point in builder.directory.points()} == kept
    assert report.left == ()


def test_a_chain_is_merged_from_below_and_its_directories_go(builder):
    history = history_of(builder, 1)
    points = [history.take("vda", full=number == 0, size=1 << 20) for number in range(5)]
    report = pruned(builder, Rules(last=2))
    assert list(report.dropped) == list(report.removed) == points[:3]
    assert sorted(path.name for path in builder.directory.path.iterdir()) == [
        *points[3:],
        "history",
        "lock",
        "summary",
    ]
    kept = builder.directory.point(points[3]).manifest
    assert (kept.kind, kept.parent, kept.disks[0].kind) == ("full", None, "full")
    history.check()


def test_a_disk_that_shrank_and_grew_again_does_not_get_its_old_data_back(builder):
    """Where the dropped point had ended, its parent holds data that must not show through."""
    history = history_of(builder, 2)
    history.content["vda"] = b"old" * CLUSTER_BYTES * 2
    history.take("vda", full=True, size=6 * CLUSTER_BYTES)
    middle = history.take("vda", size=CLUSTER_BYTES + 512)
    history.take("vda", size=5 * CLUSTER_BYTES + 1024)
    builder_rules = Rules(last=1)
    markers.put(builder.directory.path / P1, markers.PROTECTED)
    report = pruned(builder, builder_rules)
    assert report.removed == (middle,)
    history.check()


def test_the_maps_below_a_new_image_are_opened_a_few_times_and_not_for_each_part_of_it(builder, monkeypatch):
    """Each time all of a map is checked, and the one at the bottom of a large disk is large."""
    history = history_of(builder, 2)
    history.content["vda"] = b"old" * CLUSTER_BYTES * 8
    for size in (24, 1, 20):
        history.take("vda", full=size == 24, size=size * CLUSTER_BYTES)
    markers.put(builder.directory.path / P1, markers.PROTECTED)
    opened, real = [], DigestMap.open.__func__
    monkeypatch.setattr(
        DigestMap,
        "open",
        classmethod(lambda cls, path, *more: (opened.append(path), real(cls, path, *more))[1]),
    )
    monkeypatch.setattr(merge, "WINDOW_CLUSTERS", 1)
    assert len(pruned(builder).merged) == 1
    assert sum(P1 in path.parts for path in opened) <= 6
    history.check()


def test_what_two_differentials_stand_on_waits_until_one_is_left(builder):
    history = history_of(builder, 3)
    base = history.take("vda", full=True, size=1 << 20)
    first = history.take("vda")
    history.take("vda", since=base)
    protected = builder.directory.path / first
    markers.put(protected, markers.PROTECTED)
    assert pruned(builder).removed == ()
    with pytest.raises(NoSuchPoint):
        builder.directory.point(base)
    history.check()
    markers.remove(protected, markers.PROTECTED)
    assert set(pruned(builder).removed) == {base, first}
    history.check()


def test_the_newest_point_of_a_disk_that_is_left_out_stays(builder):
    history = history_of(builder, 4)
    history.take("vda", "vdb", full=True, size=1 << 20)
    both = history.take("vda", "vdb")
    for _ in range(3):
        last = history.take("vda")
    pruned(builder)
    assert [point.id for point in builder.directory.points()] == [both, last]
    history.check()


def test_a_dry_run_says_what_is_then_done_and_touches_nothing(builder):
    history = history_of(builder, 5)
    for number in range(5):
        history.take("vda", full=number == 0, size=1 << 20)
    before = sorted(path for path in builder.directory.path.rglob("*"))
    planned = prune.plan(builder.directory, Rules(last=2))
    assert sorted(path for path in builder.directory.path.rglob("*")) == before
    report = pruned(builder, Rules(last=2))
    assert report.decisions == planned
    assert [point.id for point in builder.directory.points()] == [one.point for one in planned if one.keep]


def test_no_rule_is_an_error_and_never_everything(builder):
    history_of(builder, 6).take("vda", full=True, size=1 << 20)
    with pytest.raises(UsageError, match="--keep-last"):
        pruned(builder, Rules())
    assert len(builder.directory.points()) == 1


def test_a_vm_that_was_never_backed_up_is_not_made(builder):
    for deed in (lambda: pruned(builder), lambda: prune.plan(builder.directory, LAST)):
        with pytest.raises(NoSuchPoint):
            deed()
    assert not builder.directory.path.exists()


def test_a_point_that_is_read_is_left_for_the_next_prune(builder):
    history = history_of(builder, 7)
    old = history.take("vda", full=True, size=1 << 20)
    history.take("vda")
    with read_locks.reading(builder.directory, old):
        report = pruned(builder)
        assert report.removed == ()
        assert "in use" in report.left[0]
        assert builder.directory.point(old).id == old
    assert pruned(builder).removed == (old,)
    history.check()


def test_a_reader_that_comes_during_the_merge_sees_the_same_bytes(builder, monkeypatch):
    """And the exchange of the images waits for it, and is done by the next prune."""
    history = history_of(builder, 8)
    for number in range(2):
        history.take("vda", full=number == 0, size=1 << 20)
    newest = builder.directory.point("latest")
    real, seen = merge.Merge.describe, []

    def read_meanwhile(one, image):
        seen.append(converted(newest, "vda"))
        described = real(one, image)
        reader.enter_context(read_locks.reading(builder.directory, newest.id))
        chain.layers(builder.directory, builder.directory.point(newest.id), "vda")
        return described

    monkeypatch.setattr(merge.Merge, "describe", read_meanwhile)
    monkeypatch.setattr(prune, "_LOCK_SECONDS", 0.1)
    with ExitStack() as reader:
        report = pruned(builder)
        assert "not exchanged" in report.left[0]
        history.check()
    assert seen == [history.held[newest.id]["vda"]]
    assert pruned(builder).left == ()
    history.check()
    assert len(builder.directory.points()) == len(list(builder.directory.path.glob("2*"))) == 1


def test_a_damaged_layer_is_not_merged(builder):
    history = history_of(builder, 9)
    history.take("vda", full=True, size=1 << 20)
    history.random = random.Random(1)
    history.content["vda"] = b"x" * (1 << 20)
    newest = history.take("vda")
    image = builder.directory.path / newest / "vda.qcow2"
    content = bytearray(image.read_bytes())
    place = content.rindex(b"x" * 512)
    content[place] ^= 1
    image.write_bytes(content)
    report = pruned(builder)
    assert len(report.damage) == 1
    assert "damaged" in report.damage[0]
    assert report.removed == ()
    content[place] ^= 1
    image.write_bytes(content)
    assert pruned(builder).damage == ()
    history.check()


def test_nothing_is_pruned_while_a_manifest_is_damaged(builder):
    """Its point may stand on what would go."""
    history = history_of(builder, 10)
    for number in range(3):
        history.take("vda", full=number == 0, size=1 << 20)
    (builder.directory.path / history.point / "manifest.json").write_text("{}")
    with pytest.raises(DamageFound, match="nothing is pruned"):
        pruned(builder)
    assert len(builder.directory.scan_points().points) == 2


def test_protect_and_unprotect(builder):
    history = history_of(builder, 11)
    old = history.take("vda", full=True, size=1 << 20)
    history.take("vda")
    assert prune.protect(builder.directory, old) == old
    assert pruned(builder).dropped == ()
    prune.unprotect(builder.directory, old)
    assert pruned(builder).dropped == (old,)
    with pytest.raises(NoSuchPoint):
        prune.protect(builder.directory, old)


def test_a_point_that_is_pruned_while_it_gets_protected_is_told(builder, monkeypatch):
    point = history_of(builder, 11).take("vda", full=True, size=1 << 20)
    real = locks.directory

    def too_late(path, patience_seconds, **options):
        PendingPoint(builder.directory.path, builder.directory.name, point).uncommit()
        return real(path, patience_seconds, **options)

    monkeypatch.setattr(locks, "directory", too_late)
    with pytest.raises(NoSuchPoint):
        prune.protect(builder.directory, point)


def test_a_merge_costs_the_layer_and_not_the_full(builder, monkeypatch):
    history = history_of(builder, 12)
    size = 64 << 20
    history.content["vda"] = os.urandom(size)
    history.random.randint = lambda *_: 0
    begin = written_by_children()
    history.take("vda", full=True, size=size)
    assert written_by_children() - begin > size
    history.content["vda"] = history.content["vda"][:-CLUSTER_BYTES] + b"n" * CLUSTER_BYTES
    history.take("vda")
    before = written_by_children()
    report = pruned(builder)
    assert [one.written_bytes for one in report.merged] == [CLUSTER_BYTES]
    assert written_by_children() - before < 2 << 20
    history.check()


def written_by_children() -> int:
    """Return the bytes that we and our finished children have written to files."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def test_chains_that_are_too_long_are_told(builder):
    history = history_of(builder, 13)
    for number in range(4):
        history.take("vda", full=number == 0, size=1 << 20)
    report = pruned(builder, Rules(last=4), max_chain=2)
    assert [text.split(":")[1] for text in report.long_chains] == [" 3 layers", " 4 layers"]


def story(builder: Builder, shape: str) -> History:
    """Make points of which the middle ones go."""
    history = history_of(builder, 14)
    size = 3 * CLUSTER_BYTES + 512
    history.take("vda", full=True, size=size)
    history.take("vda")
    if shape == "grown":
        history.take("vda", size=CLUSTER_BYTES)
        history.take("vda", size=size + 2 * CLUSTER_BYTES)
        markers.put(builder.directory.path / P1, markers.PROTECTED)
    elif shape == "two disks":
        history.take("vda", "vdb", size=size)
        history.take("vda", "vdb")
    else:
        history.take("vda", size=size - CLUSTER_BYTES)
    return history


def deaths(builder: Builder, shape: str, directory: Path, stride: int) -> int:
    """Die before every `stride`th step of a prune, look at what is there, prune again; returns the cases."""
    history = story(builder, shape)
    path, kept = builder.repository.path, directory / "kept"
    shutil.copytree(path, kept)
    whole, number = False, -stride
    while not whole:
        number += stride
        shutil.rmtree(path)
        shutil.copytree(kept, path)
        whole = die_at(number, lambda: pruned(builder), changing_step)
        assert builder.directory.point("latest").id == history.point
        history.check()
        report = pruned(builder)
        assert report.left == (), f"step {number}"
        history.check()
        for partial in builder.directory.pending_points():
            partial.drop()  # as each run's recovery does
        names = {path.name for path in builder.directory.path.iterdir()} - {"lock", "history", "summary"}
        assert names == {one.point for one in report.decisions if one.keep}, f"step {number}"
    return number // stride


@pytest.mark.parametrize("size_mib", [6, 4])
def test_a_death_while_bytes_are_written_loses_nothing(builder, size_mib):
    """Some of the layer is in the lower image by then, which may have another size than before."""
    history = history_of(builder, 15)
    for number, mib in enumerate((4, 5, size_mib)):
        history.content["vda"] = os.urandom(mib << 20)
        history.take("vda", full=number == 0, size=mib << 20)
    for writes in range(1, 9, 2):

        def work(left: int = writes) -> None:
            real = NbdSink.write

            def write(sink, *arguments):
                nonlocal left
                left -= 1
                if left == 0:
                    os._exit(9)
                real(sink, *arguments)

            NbdSink.write = write
            pruned(builder)

        assert not die_at(sys.maxsize, work)
        assert any(builder.directory.path.rglob("*.merging"))
        history.check()
    pruned(builder)
    history.check()
    assert len(builder.directory.points()) == len(list(builder.directory.path.glob("2*"))) == 1


@pytest.mark.parametrize("shape", ["chain", "grown"])
def test_a_death_loses_nothing_and_the_next_prune_finishes(builder, shape, tmp_path, record_property):
    cases = deaths(builder, shape, tmp_path, 7)
    record_property("cases", (f"deaths in a prune, a sample: {shape}", cases))
    assert cases > 3


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("shape", ["chain", "grown", "two disks"])
def test_a_death_at_every_step_loses_nothing_and_the_next_prune_finishes(
    builder, shape, tmp_path, record_property
):
    cases = deaths(builder, shape, tmp_path, 1)
    record_property("cases", (f"deaths in a prune: {shape}", cases))
    assert cases > 20
