# SPDX-License-Identifier: GPL-2.0-or-later
"""Pruning while others read, and dying, in any order: no merge begins on top of one that isn't at its end."""

import os
import random
import shutil
import struct
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest

from backupctl.cancel import Cancellation
from backupctl.digests import digest_map
from backupctl.digests.clusters import CLUSTER_BYTES
from backupctl.errors import DamageFound, Locked, WriteFailed
from backupctl.images import nbd_server, qcow2_check
from backupctl.operations.prune import run as prune
from backupctl.operations.prune.retention import Rules
from backupctl.operations.verify import layer
from backupctl.operations.verify import run as verify
from backupctl.operations.verify.layer import VerifyScope
from backupctl.progress import Silent
from backupctl.repository import chain, markers, merge, read_locks
from backupctl.repository.repository import Repository
from backupctl.system import durable, locks
from tests.unit.operations.test_prune import converted, history_of, pruned, sectors
from tests.unit.points import P1, P2, P3, Builder, changing_step, die_at, disk_entry, in_memory

SIZE = 8 * CLUSTER_BYTES


@pytest.fixture
def builder(tmp_path) -> Builder:
    return Builder(Repository.create(tmp_path / "repository"))


def three(builder: Builder, clusters: tuple[int, int] = (1, 3), size: int = SIZE) -> bytes:
    """Make a full P1, P2 on it and P3 on that, each of the two with one cluster; returns P3's content."""
    entry, content = disk_entry(size=SIZE), bytearray(b"a" * SIZE)
    builder.point(P1, (entry, [(0, bytes(content))]))
    for point, parent, value, number in ((P2, P1, b"d", clusters[0]), (P3, P2, b"n", clusters[1])):
        stored = value * CLUSTER_BYTES
        content[number * CLUSTER_BYTES : (number + 1) * CLUSTER_BYTES] = stored
        held = size if point == P3 else SIZE
        made = replace(entry, kind="incremental", parent=parent, size=held)
        builder.point(point, (made, [(number * CLUSTER_BYTES, stored)]))
    return bytes(content[:size])


def damage(builder: Builder, **options) -> tuple[verify.Damage, ...]:
    return verify.verify(
        builder.repository, None, None, VerifyScope(), Silent(), Cancellation(), **options
    ).damage


@contextmanager
def read(builder: Builder, point):
    """Hold one point's directory, and no other, as `verify` does."""
    with locks.directory(builder.directory.path / point, 1, shared=True):
        yield


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(prune, "_LOCK_SECONDS", 0.05)


SEEDS = [pytest.param(seed, marks=pytest.mark.slow if seed > 3 else ()) for seed in range(12)]


@pytest.mark.parametrize("seed", SEEDS)
def test_readers_and_deaths_at_any_moment_lose_nothing(builder, monkeypatch, seed):
    rand = random.Random(seed)
    real = locks.directory

    @contextmanager
    def now_and_then_read(path, patience_seconds, *, shared=False):
        if not shared and rand.random() < 0.4:
            raise Locked(f"{path} is being read")
        with real(path, patience_seconds, shared=shared):
            yield

    history = history_of(builder, seed)
    history.take("vda", "vdb", full=True, size=sectors(rand))
    for _ in range(7):
        disks = rand.choice([("vda", "vdb"), ("vda",)])
        history.take(*disks, size=sectors(rand) if rand.random() < 0.4 else None)
        rules = Rules(last=rand.randint(1, 4))
        monkeypatch.setattr(locks, "directory", now_and_then_read)
        if rand.random() < 0.5:
            pruned(builder, rules)
        else:
            die_at(rand.randrange(100), lambda rules=rules: pruned(builder, rules), changing_step)
        monkeypatch.setattr(locks, "directory", real)
        for partial in builder.directory.pending_points():
            partial.drop()  # as each run's recovery does
        history.check()
        prune.long_chains(builder.directory, 1)  # finds no damage either
    assert pruned(builder).left == ()
    history.check()


def test_a_layer_takes_nothing_in_before_it_was_exchanged_itself(builder, monkeypatch):
    """P2 is in P1's image and waits for a reader of P2; P3, merged now, would be thrown away with it."""
    content = three(builder)
    real, skip = merge.Merge.describe, prune._Steps._skip
    reader = ExitStack()

    def describe(one, image):
        done = real(one, image)
        reader.enter_context(read(builder, one.point.id))
        return done

    def skipped(work, upper, disk, why):
        skip(work, upper, disk, why)
        reader.close()

    monkeypatch.setattr(merge.Merge, "describe", describe)
    monkeypatch.setattr(prune._Steps, "_skip", skipped)
    assert [line for line in pruned(builder).left if "not exchanged" in line]
    monkeypatch.undo()
    assert pruned(builder).left == ()
    assert converted(builder.directory.point(P3), "vda") == content
    assert damage(builder) == ()


@pytest.mark.parametrize("clusters", [(1, 3), (1, 1)])
def test_a_layer_that_took_another_in_is_not_merged_before_that_ended(builder, clusters):
    content = three(builder, clusters)
    prune.protect(builder.directory, P1)
    with read(builder, P3):
        assert len(pruned(builder).left) == 1
        prune.unprotect(builder.directory, P1)
        report = pruned(builder)
        assert (report.merged, report.damage) == ((), ())
        assert converted(builder.directory.point(P3), "vda") == content
    assert pruned(builder).left == ()
    assert converted(builder.directory.point(P3), "vda") == content
    assert damage(builder) == ()


def test_a_death_after_the_image_was_cut_is_finished_although_more_is_dropped_now(builder, monkeypatch):
    content = three(builder, clusters=(6, 1), size=4 * CLUSTER_BYTES)
    prune.protect(builder.directory, P1)

    def die(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(digest_map, "write_parts", die)
        with pytest.raises(KeyboardInterrupt):
            pruned(builder)
    prune.unprotect(builder.directory, P1)
    assert pruned(builder).left == ()
    assert converted(builder.directory.point(P3), "vda") == content
    assert damage(builder) == ()


def test_a_death_after_the_image_was_moved_leaves_the_way_to_what_is_below(builder, monkeypatch):
    """P3's manifest still stands on P2: were P2 to go now, readers of P3 would not find, and hold, P1."""
    content = three(builder)
    prune.protect(builder.directory, P1)
    real = merge._move

    def die_after_it(source, target):
        real(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(merge, "_move", die_after_it)
        with pytest.raises(KeyboardInterrupt):
            pruned(builder)
    with read(builder, P3):
        assert len(pruned(builder).left) == 1
    with (
        read_locks.reading(builder.directory, P3),
        pytest.raises(Locked),
        locks.directory(builder.directory.path / P1, 0),
    ):
        pass
    assert pruned(builder).left == ()
    assert builder.directory.point(P3).manifest.parent == P1
    assert converted(builder.directory.point(P3), "vda") == content


def test_an_image_that_is_not_the_merged_one_is_not_moved(builder, monkeypatch):
    content = three(builder)
    prune.protect(builder.directory, P1)
    with monkeypatch.context() as patched:
        patched.setattr(
            prune._Steps, "_switch", lambda work, point, entry: work._skip(point, entry.name, "later")
        )
        pruned(builder)
    image = builder.directory.path / P2 / "vda.qcow2"
    shutil.copyfile(image, image.with_suffix(".kept"))
    with image.open("ab") as file:
        file.write(bytes(CLUSTER_BYTES))
    with pytest.raises(DamageFound, match="length is"):
        pruned(builder)
    assert image.exists()
    assert converted(builder.directory.point(P3), "vda") == content
    image.with_suffix(".kept").rename(image)
    assert pruned(builder).left == ()
    assert converted(builder.directory.point(P3), "vda") == content


def test_a_hard_linked_copy_keeps_its_bytes(builder, tmp_path):
    content = three(builder)
    subprocess.run(["cp", "-al", builder.repository.path, tmp_path / "copy"], check=True)
    copy = Builder(Repository.open(tmp_path / "copy"))
    before = {point: converted(copy.directory.point(point), "vda") for point in (P1, P2, P3)}
    assert pruned(builder).left == ()
    assert converted(builder.directory.point(P3), "vda") == content
    assert damage(builder) == damage(copy) == ()
    assert {point: converted(copy.directory.point(point), "vda") for point in before} == before


def table_of(content: bytes) -> int:
    """Return where the second level table of a small qcow2 lies."""
    (first,) = struct.unpack_from(">Q", content, 40)
    (second,) = struct.unpack_from(">Q", content, first)
    return int(second) & (1 << 56) - 512


def test_an_image_whose_tables_call_used_clusters_free_is_not_written_to(builder):
    """QEMU would take them for what is merged: all that stands on the image would lose what they hold."""
    entry = disk_entry(size=SIZE)
    builder.point(P1, (entry, [(0, b"a" * CLUSTER_BYTES * 4)]))
    new = (6 * CLUSTER_BYTES, b"n" * CLUSTER_BYTES)
    builder.point(P2, (replace(entry, kind="incremental", parent=P1), [new]))
    image = builder.directory.path / P1 / "vda.qcow2"
    stored = bytearray(image.read_bytes())
    (table,) = struct.unpack_from(">Q", stored, 48)
    (counts,) = struct.unpack_from(">Q", stored, table)
    struct.pack_into(">H", stored, counts + 2 * (stored.index(b"a" * 512) // CLUSTER_BYTES), 0)
    image.write_bytes(stored)
    assert damage(builder)
    content = converted(builder.directory.point(P2), "vda")
    assert pruned(builder).left == ()
    assert converted(builder.directory.point(P2), "vda") == content
    assert damage(builder) == ()


def test_a_merge_that_is_begun_again_reads_the_image_from_the_disk(builder, monkeypatch):
    """After a sync that failed the kernel shows in memory, as written, what never reached the disk."""
    content = three(builder)
    image = builder.directory.path / P1 / "vda.qcow2"
    seen, real = [], qcow2_check.check_tables

    def fail(image):
        raise WriteFailed(f"{image.path}: Input/output error")

    def check(image):
        seen.append(in_memory(image.path))
        return real(image)

    with monkeypatch.context() as patched:
        patched.setattr(nbd_server, "complete", fail)
        with pytest.raises(WriteFailed):
            pruned(builder)
    durable.sync_and_forget(image)
    if in_memory(image):
        pytest.skip("this file system has its files in memory only")
    image.read_bytes()
    monkeypatch.setattr(qcow2_check, "check_tables", check)
    assert pruned(builder).left == ()
    assert not seen[0]
    assert converted(builder.directory.point(P3), "vda") == content


def test_a_layer_that_can_not_be_read_is_damage_and_holds_up_no_other(builder):
    history = history_of(builder, 3)
    history.content.update(vda=b"a" * SIZE, vdb=b"a" * SIZE)
    history.take("vda", "vdb", full=True, size=SIZE)
    history.content.update(vda=b"b" * SIZE, vdb=b"b" * SIZE)
    newest = history.take("vda", "vdb")
    image = builder.directory.path / newest / "vda.qcow2"
    stored = bytearray(image.read_bytes())
    stored[table_of(stored) + 6] ^= 2  # now between two clusters, which QEMU refuses
    image.write_bytes(stored)
    report = pruned(builder)
    assert len(report.damage) == 1
    assert [merged.disk for merged in report.merged] == ["vdb"]
    stored[table_of(stored) + 6] ^= 2
    image.write_bytes(stored)
    assert pruned(builder).left == ()
    history.check()


def test_a_merge_that_finds_no_room_does_not_keep_what_there_was(small_file_system):
    builder = Builder(Repository.create(small_file_system / "repository"))
    content = three(builder)
    image = builder.directory.path / P1 / "vda.qcow2"
    copy = small_file_system / "copy"
    os.link(image, copy)  # so the merged image has to be a new one
    room = os.statvfs(small_file_system)
    free = room.f_bavail * room.f_bsize
    (small_file_system / "others").write_bytes(bytes(free - 5 * CLUSTER_BYTES))
    command = [sys.executable, "-m", "backupctl", "prune", "vm1", "--keep-last", "1"]
    command += ["--repository", builder.repository.path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "No space left" in done.stderr) == (1, True), done.stderr
    room = os.statvfs(small_file_system)
    assert room.f_bavail * room.f_bsize > 4 * CLUSTER_BYTES
    (small_file_system / "others").unlink()
    assert pruned(builder).left == ()
    assert converted(builder.directory.point(P3), "vda") == content


@pytest.mark.parametrize("place", ["before a layer", "within it"])
def test_a_prune_in_the_middle_of_a_verify_is_no_damage(builder, monkeypatch, tmp_path, place):
    """Whether it comes to its end or dies at any step of it."""
    history = history_of(builder, 5)
    for number in range(3):
        history.content.update(vda=os.urandom(SIZE), vdb=os.urandom(SIZE))
        history.take("vda", "vdb", full=number == 0)
    first, second, third = history.held
    prune.protect(builder.directory, first)
    with read(builder, third):
        assert len(pruned(builder).left) == 2
    shutil.copytree(builder.repository.path, tmp_path / "kept")
    real_held, real_tables = verify._VmCheck._locked, layer.LayerCheck._check_tables

    def held(work, point):
        if point.id == second and place == "before a layer":
            steps.append(die_at(deaths, lambda: pruned(builder), changing_step))
        return real_held(work, point)

    def tables(one, image):
        if second in str(one.layer.path) and place == "within it":
            steps.append(die_at(deaths, lambda: pruned(builder), changing_step))
        real_tables(one, image)

    monkeypatch.setattr(verify._VmCheck, "_locked", held)
    monkeypatch.setattr(layer.LayerCheck, "_check_tables", tables)
    for deaths in range(0, 150, 5):
        shutil.rmtree(builder.repository.path)
        shutil.copytree(tmp_path / "kept", builder.repository.path)
        steps = []
        assert damage(builder) == (), f"step {deaths}"
        assert steps
        if all(steps):
            break
    else:
        pytest.fail("the prune never came to its end")


def test_a_layer_that_is_read_is_not_exchanged_under_its_reader(builder):
    three(builder)
    prune.protect(builder.directory, P1)
    with read(builder, P3):
        pruned(builder)
    with read(builder, P2):
        assert any("not exchanged" in line for line in pruned(builder).left)
        assert (builder.directory.path / P2 / "vda.qcow2").exists()
    assert pruned(builder).left == ()
    chain.layers(builder.directory, builder.directory.point(P3), "vda")
    assert not markers.has(builder.directory.path / P3, markers.merging("vda"))
