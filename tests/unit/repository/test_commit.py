# SPDX-License-Identifier: GPL-2.0-or-later
"""The commit: the order of its durable steps, a death between any two of them, and each of them failing."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from backupctl.errors import BackupctlError, RepositoryError
from backupctl.repository.manifest import FreezeEntry
from tests.unit.points import P1, P2, Builder, die_at, disk_entry


def prepared(builder: Builder, point=P2):
    partial = builder.begin(point)
    (partial.path / "vda.qcow2").write_bytes(b"a")
    (partial.path / "vda.digests").write_bytes(b"")
    (partial.path / "vdb.qcow2").write_bytes(b"b")
    (partial.path / "vdb.digests").write_bytes(b"")
    return partial, builder.manifest(point, disk_entry("vda"), disk_entry("vdb"))


@pytest.fixture
def steps(monkeypatch) -> list[str]:
    """What was synced, renamed and removed, in order."""
    done: list[str] = []
    real_sync, real_rename, real_unlink = os.fsync, os.rename, os.unlink

    def sync(descriptor):
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        real_sync(descriptor)

    def rename(source, target, **kwargs):
        done.append(f"rename {Path(source).name} {Path(target).name}")
        real_rename(source, target, **kwargs)

    def unlink(path, **kwargs):
        done.append(f"remove {Path(path).name}")
        real_unlink(path, **kwargs)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "unlink", unlink)
    return done


def test_all_that_the_manifest_names_is_synced_before_the_rename_and_the_parent_after_it(
    builder: Builder, steps
):
    first, manifest = prepared(builder, P1)
    first.commit(manifest)
    partial, manifest = prepared(builder)
    steps.clear()
    partial.commit(manifest)
    assert steps == [
        "sync vda.qcow2",
        "sync vda.digests",
        "sync vdb.qcow2",
        "sync vdb.digests",
        "sync manifest.json",
        "remove run.json",
        f"sync {P2}.partial",
        "sync history",
        f"rename {P2}.partial {P2}",
        "sync vm1",
    ]


def test_a_journal_is_replaced_durably(builder: Builder, steps):
    partial, _ = prepared(builder)
    steps.clear()
    partial.note("freeze", froze=True)
    assert [step for step in steps if "remove" not in step] == [
        "sync .run.json.new",
        "rename .run.json.new run.json",
        f"sync {P2}.partial",
    ]


def test_a_new_point_directory_is_durable_before_the_run_goes_on(builder: Builder, steps):
    with builder.directory.lock():
        steps.clear()
        builder.directory.begin(P1, builder.journal(P1))
    assert steps.index("sync vm1") < steps.index("rename .run.json.new run.json")
    assert steps[-1] == f"sync {P1}.partial"


def test_a_death_at_any_step_of_a_run_leaves_a_whole_point_or_a_partial(builder: Builder):
    first, manifest = prepared(builder, P1)
    first.commit(manifest)

    def whole_run():
        partial, second = prepared(builder)
        partial.note("freeze", froze=True)
        partial.commit(second)

    number = 0
    committed = []
    while True:
        ended = die_at(number, whole_run)
        with builder.directory.lock():
            committed.append(builder.directory.is_committed(P2))
            ids = [point.id for point in builder.directory.points()]
            assert ids == ([P1, P2] if committed[-1] else [P1])
            if committed[-1]:
                found = builder.directory.point(P2)
                assert (found.path / "vda.qcow2").read_bytes() == b"a"
                assert builder.directory.pending_points() == []
                found.path.rename(builder.directory.path / f"{P2}.partial")
            for partial in builder.directory.pending_points():
                partial.drop()
            assert sorted(entry.name for entry in builder.directory.path.iterdir()) == [P1, "history", "lock"]
        if ended:
            break
        number += 1
    assert number > 20
    assert committed == sorted(committed)  # once committed, it stays so
    assert True in committed[:-1]


def test_a_death_at_any_step_of_dropping_leaves_a_partial_to_drop_again(builder: Builder):
    number = 0
    ended = False
    while not ended:
        partial, _ = prepared(builder)
        ended = die_at(number, partial.drop)
        left = builder.directory.pending_points()
        assert left == ([] if ended else left)
        assert not builder.directory.is_committed(P2)
        for found in left:
            found.drop()
        assert sorted(entry.name for entry in builder.directory.path.iterdir()) == ["lock"]
        number += 1
    assert number > 3


@pytest.mark.parametrize("once", [True, False], ids=["once", "for good"])
def test_a_failed_sync_is_never_a_commit(builder: Builder, monkeypatch, once):
    real_sync = os.fsync
    count = 0

    def sync(descriptor):
        nonlocal count
        count += 1
        if count == failing or (count > failing and not once):
            raise OSError(5, "Input/output error")
        real_sync(descriptor)

    for failing in range(1, 6):
        partial, manifest = prepared(builder)
        count = 0
        monkeypatch.setattr(os, "fsync", sync)
        with pytest.raises(RepositoryError, match="Input/output error"):
            partial.commit(manifest)
        monkeypatch.setattr(os, "fsync", real_sync)
        assert count >= failing
        assert not builder.directory.is_committed(P2)
        assert builder.directory.pending_points() == [partial]
        partial.drop()


def test_a_manifest_that_names_a_missing_image_is_not_committed(builder: Builder):
    partial, manifest = prepared(builder)
    (partial.path / "vdb.qcow2").unlink()
    with pytest.raises(RepositoryError):
        partial.commit(manifest)
    assert not builder.directory.is_committed(P2)


def test_a_directory_that_can_not_be_looked_at_is_not_taken_for_uncommitted(builder: Builder, monkeypatch):
    prepared(builder)

    def broken(_path):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "lstat", broken)
        with pytest.raises(BackupctlError, match="Input/output"):
            builder.directory.is_committed(P2)


@pytest.mark.parametrize(
    "changes",
    [
        {"qemu": "1" * 200},
        {"disks": ()},
        {"freeze": FreezeEntry("sometimes", "none", None)},
        {"start": "now"},
    ],
    ids=range(4),
)
def test_a_point_that_nobody_could_read_is_not_committed(builder: Builder, changes):
    """What comes from outside gets into the manifest; a point that no run could read again is no point."""
    partial, manifest = prepared(builder)
    with pytest.raises(RepositoryError, match="its manifest is invalid"):
        partial.commit(replace(manifest, **changes))
    assert not builder.directory.is_committed(P2)
