# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM that is renamed or removed in the repository: by one rename each, whole after a kill at any step."""

import shutil
import threading

import pytest

from backupctl.cancel import Cancellation
from backupctl.errors import DamageFound, Locked, NoSuchPoint, Refused, TargetExists, UsageError
from backupctl.names import VmName
from backupctl.operations import remove_vm
from backupctl.operations.prune import run as prune
from backupctl.operations.remove_vm import RemovalAllowed
from backupctl.operations.verify import run as verify
from backupctl.operations.verify.layer import VerifyScope
from backupctl.progress import Silent
from backupctl.repository import audit, former_names, markers, read_locks, relocate
from backupctl.repository.vm_directory import VmDirectory
from tests.unit.operations.test_prune import converted
from tests.unit.points import P1, P2, P3, Builder, any_step, die_at, disk_entry

OLD, NEW = VmName("vm1"), VmName("vm2")
NOTHING = RemovalAllowed()


def renamed(builder: Builder, old=OLD, new=NEW, *, dry_run=False) -> bool:
    return remove_vm.rename(builder.repository, old, new, dry_run=dry_run)


def directory(builder: Builder, name: VmName) -> VmDirectory:
    return builder.repository.vm(name)


def names(builder: Builder) -> list[str]:
    return sorted(path.name for path in builder.repository.path.iterdir())


def whole(found: VmDirectory, content: bytes) -> None:
    assert [point.id for point in found.points()] == [P1, P2]
    assert converted(found.point(P2), "vda") == content
    assert audit.problems(found) == ()


def test_a_renamed_vm_has_its_points_and_they_verify(two_points):
    builder, content = two_points
    assert renamed(builder, dry_run=True)
    assert names(builder) == ["repository.json", "vm1"]
    assert renamed(builder)
    assert names(builder) == ["repository.json", "vm2"]
    whole(directory(builder, NEW), content)
    report = verify.verify(builder.repository, NEW, None, VerifyScope(), Silent(), Cancellation())
    assert (report.damage, report.points) == ((), 2)


def test_a_renamed_vm_is_pruned_and_renamed_back(two_points):
    builder, content = two_points
    renamed(builder)
    prune.prune(directory(builder, NEW), prune.Rules(last=1), Silent(), Cancellation())
    assert converted(directory(builder, NEW).point("latest"), "vda") == content
    renamed(builder, NEW, OLD)
    assert converted(directory(builder, OLD).point("latest"), "vda") == content
    assert [one.name for one in former_names.read(directory(builder, OLD).path)] == [OLD, NEW]


def test_a_point_of_the_old_name_that_is_younger_than_the_rename_is_not_taken(two_points):
    builder, _ = two_points
    renamed(builder)
    made = builder.point(P3, (disk_entry(), [(0, b"x")]))  # of a new vm1
    shutil.copytree(made.path, directory(builder, NEW).path / P3)
    with pytest.raises(DamageFound, match="belongs to another point, VM or repository"):
        directory(builder, NEW).point(P3)


def test_a_damaged_list_of_former_names_is_damage(two_points):
    builder, _ = two_points
    renamed(builder)
    path = directory(builder, NEW).path / former_names.FILE_NAME
    path.write_text(path.read_text().replace("vm1", "vm3"))
    with pytest.raises(DamageFound, match="former-names: the checksum does not match"):
        directory(builder, NEW).point(P1)


def test_what_cannot_be_renamed_is_refused(two_points):
    builder, content = two_points
    with pytest.raises(UsageError, match="the same"):
        renamed(builder, new=OLD)
    with pytest.raises(NoSuchPoint):
        renamed(builder, old=VmName("web"))
    directory(builder, NEW).path.mkdir()
    with pytest.raises(TargetExists):
        renamed(builder)
    with relocate.alone(builder.directory), pytest.raises(TargetExists):
        relocate.rename(builder.directory, NEW)  # not even an empty directory is replaced
    directory(builder, NEW).path.rmdir()
    builder.begin(P3)
    with pytest.raises(Refused, match="did not end") as caught:
        renamed(builder)
    assert caught.value.next_command == "backupctl recover vm1"
    whole(builder.directory, content)


@pytest.mark.parametrize("work", [renamed, lambda builder: remove_vm.remove(builder.directory, NOTHING)])
def test_nothing_is_moved_under_a_reader_or_a_run(two_points, work, monkeypatch):
    builder, content = two_points
    monkeypatch.setattr(relocate, "_LOCK_SECONDS", 0.05)
    with read_locks.reading(builder.directory, P2), pytest.raises(Locked, match="in use"):
        work(builder)
    monkeypatch.setattr(VmDirectory.lock.__wrapped__, "__defaults__", (0.05,))
    with builder.directory.lock(), pytest.raises(Locked, match="another run"):
        work(builder)
    whole(builder.directory, content)


def test_a_run_that_waited_for_the_lock_of_a_renamed_vm_does_not_begin(two_points):
    builder, _ = two_points
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            with builder.directory.lock(30):
                pass
        except BaseException as err:
            caught.append(err)

    with relocate.alone(builder.directory):
        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join(0.3)
        relocate.rename(builder.directory, NEW)
    waiting.join(30)
    assert isinstance(caught[0], Locked)
    assert "renamed or removed" in caught[0].message
    assert names(builder) == ["repository.json", "vm2"]


def test_a_kill_at_any_step_of_a_rename_leaves_one_name_and_the_same_command_finishes(two_points, tmp_path):
    builder, content = two_points
    shutil.copytree(builder.repository.path, tmp_path / "kept")
    done, number = False, -1
    while not done:
        number += 1
        shutil.rmtree(builder.repository.path)
        shutil.copytree(tmp_path / "kept", builder.repository.path)
        done = die_at(number, lambda: renamed(builder), any_step)
        there = [name for name in (OLD, NEW) if directory(builder, name).exists()]
        assert len(there) == 1, f"step {number}"
        whole(directory(builder, there[0]), content)
        renamed(builder)
        whole(directory(builder, NEW), content)
    assert number > 10


def test_a_removed_vm_is_gone_and_others_stay(two_points):
    builder, _ = two_points
    directory(builder, NEW).path.mkdir()
    planned = remove_vm.plan(builder.directory, NOTHING)
    assert names(builder) == ["repository.json", "vm1", "vm2"]
    done = remove_vm.remove(builder.directory, NOTHING)
    assert done == planned
    assert (done.points, done.finished) == ((P1, P2), False)
    assert done.freed_bytes > 70_000
    assert names(builder) == ["repository.json", "vm2"]
    with pytest.raises(NoSuchPoint):
        remove_vm.remove(builder.directory, NOTHING)


def test_what_must_not_be_removed_without_a_word_stays(two_points):
    builder, content = two_points
    prune.protect(builder.directory, P1)
    with pytest.raises(UsageError, match="protected"):
        remove_vm.remove(builder.directory, NOTHING)
    builder.begin(P3)
    with pytest.raises(Refused, match="did not end"):
        remove_vm.remove(builder.directory, RemovalAllowed(protected=True))
    whole(builder.directory, content)
    done = remove_vm.remove(builder.directory, RemovalAllowed(protected=True, unfinished=True))
    assert (done.protected, done.unfinished) == ((P1,), (P3,))
    assert names(builder) == ["repository.json"]


def test_what_a_killed_prune_was_removing_is_not_an_unfinished_run(two_points):
    builder, _ = two_points
    markers.put(builder.begin(P3).path, markers.RETIRED)
    assert remove_vm.remove(builder.directory, NOTHING).unfinished == ()


def test_a_kill_at_any_step_of_a_removal_leaves_all_or_nothing_and_the_same_command_finishes(
    two_points, tmp_path
):
    builder, content = two_points
    other = builder.repository.path / ".removed-vm1-x-01234567"  # of a VM vm1-x
    other.mkdir()
    shutil.copytree(builder.repository.path, tmp_path / "kept")
    done, number = False, -1
    while not done:
        number += 1
        shutil.rmtree(builder.repository.path)
        shutil.copytree(tmp_path / "kept", builder.repository.path)
        done = die_at(number, lambda: remove_vm.remove(builder.directory, NOTHING), any_step)
        if builder.directory.exists():
            whole(builder.directory, content)
        elif not relocate.removed(builder.directory):
            assert names(builder) == [other.name, "repository.json"]
            continue
        assert builder.repository.vms() in ([], [OLD])
        assert remove_vm.remove(builder.directory, NOTHING).vm == OLD
        assert names(builder) == [other.name, "repository.json"], f"step {number}"
    assert number > 10
