# SPDX-License-Identifier: GPL-2.0-or-later
"""The summary of a VM says what its manifests say, whatever happened meanwhile and whatever is in it."""

import errno
import os
import random
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import msgspec
import pytest

from backupctl.errors import BackupctlError
from backupctl.names import PointId, VmName
from backupctl.operations import check, usage
from backupctl.operations.prune import run as prune
from backupctl.repository import history, markers, merge, relocate, seal, summary, summary_file
from backupctl.repository.history import PointEvent
from backupctl.repository.repository import Repository
from backupctl.repository.seal import Stamp
from backupctl.repository.summary import Listing
from backupctl.repository.vm_directory import VmDirectory
from backupctl.system import durable
from fixtures import many_points, many_vms
from tests.unit.operations.test_growth import opened
from tests.unit.points import Builder, changing_step, die_at


@cache
def parts() -> many_points.Parts:
    with tempfile.TemporaryDirectory() as name:
        made = many_points.Parts(Path(name), data=True)
        made.remove()
    return made


def commit(builder: Builder, point: PointId, parent: PointId | None = None, vm: str = "vm1") -> None:
    """Commit a point with a tiny image."""
    directory = builder.repository.vm(VmName(vm))
    with directory.lock():
        partial = directory.begin(point, replace(builder.journal(point), vm=VmName(vm)))
        entry = parts().write(partial.path, parent)
        partial.commit(replace(builder.manifest(point, entry), vm=VmName(vm)))


def renew(directory: VmDirectory) -> None:
    with directory.lock():
        summary.renew(directory)


def said(listing: Listing) -> tuple[object, ...]:
    """Return what a listing says."""
    return (
        listing.points,
        listing.retired,
        [(path, err.message) for path, err in listing.damaged],
        [(path, err.message) for path, err in listing.unreadable],
        listing.problems,
    )


def without_summary(directory: VmDirectory) -> Listing:
    """Look at the manifests only, and leave the seal as it is."""
    with mock.patch.object(summary_file, "read", return_value=None):
        return summary.look(directory)


@pytest.fixture
def three(builder: Builder) -> VmDirectory:
    parent = None
    for number in range(3):
        commit(builder, many_points.point_number(number), parent)
        parent = many_points.point_number(number)
    renew(builder.directory)
    return builder.directory


def test_with_a_summary_that_fits_no_manifest_is_opened_and_no_history(three):
    expected = said(without_summary(three))
    with opened() as files:
        found = summary.look(three)
    assert said(found) == expected
    assert found.fits
    assert files["summary"] == 1
    assert files["manifest.json"] == files["history"] == 0


def test_only_we_may_read_it(three):
    assert stat.S_IMODE((three.path / "summary").stat().st_mode) == 0o600


def test_a_summary_that_fits_is_not_written_again(three):
    before = (three.path / "summary").stat()
    renew(three)
    assert (three.path / "summary").stat() == before


def test_a_new_point_is_read_and_nothing_else(builder, three):
    known = summary.look(three)
    commit(builder, many_points.point_number(5))
    with opened() as files:
        read = summary._look(three)
    assert files["manifest.json"] == 1
    assert read.points[:3] == list(known.points)
    assert said(summary.look(three)) == said(without_summary(three))


def test_what_has_changed_since_is_read_anew(three):
    markers.put(three.path / many_points.point_number(1), markers.PROTECTED)
    markers.put(three.path / many_points.point_number(2), markers.RETIRED)
    three.break_seal()
    found = summary.look(three)
    assert [one.protected for one in found.points] == [False, True]
    assert [one.id for one in found.retired] == [many_points.point_number(2)]
    merge.rewrite(
        three.point(many_points.point_number(0)), replace(three.points()[0].manifest, consistency="offline")
    )
    assert summary.look(three).points[0].consistency == "offline"


@dataclass
class Life:
    """What may happen to the points of a VM, chosen at random."""

    builder: Builder
    random: random.Random
    made: int = 0
    vm: str = "vm1"

    @property
    def directory(self) -> VmDirectory:
        return self.builder.repository.vm(VmName(self.vm))

    def points(self) -> list[PointId]:
        return self.directory.all_points()

    def any(self) -> Path:
        return self.directory.path / self.random.choice(self.points())

    def commit(self) -> None:
        there = [one.id for one in self.directory.scan_points(tolerant=True).points]
        parent = self.random.choice([None, *there])
        commit(self.builder, many_points.point_number(self.made), parent, self.vm)
        self.made += 1

    def renew(self) -> None:
        renew(self.directory)

    def retire(self) -> None:
        point = self.any()
        with self.directory.lock():
            markers.put(point, markers.RETIRED)
            history.record(self.directory.path, PointEvent("dropped", PointId(point.name)))

    def retire_without_a_line(self) -> None:
        with self.directory.lock():
            markers.put(self.any(), markers.RETIRED)

    def protect(self) -> None:
        with suppress(BackupctlError):  # of a point that is damaged
            prune.protect(self.directory, self.any().name)

    def unprotect(self) -> None:
        with suppress(BackupctlError):
            prune.unprotect(self.directory, self.any().name)

    def remove(self) -> None:
        shutil.rmtree(self.any())

    def uncommit(self) -> None:
        point = self.any()
        point.rename(point.with_name(f"{point.name}.partial"))

    def rewrite(self) -> None:
        for point in self.directory.scan_points(tolerant=True).points[:1]:
            merge.rewrite(point, replace(point.manifest, qemu=str(self.random.random())))

    def replace_manifest(self) -> None:
        """By another point's, as a file that was copied to the wrong place."""
        if (source := self.any() / "manifest.json").exists():
            shutil.copy(source, self.any() / "copied")
        for copied in self.directory.path.glob("*/copied"):
            copied.rename(copied.with_name("manifest.json"))

    def damage(self) -> None:
        """In place: neither the file nor its length is another one."""
        path = self.any() / "manifest.json"
        if path.exists():
            content = bytearray(path.read_bytes())
            content[self.random.randrange(len(content))] ^= 1
            path.write_bytes(content)

    def lose_manifest(self) -> None:
        (self.any() / "manifest.json").unlink(missing_ok=True)

    def cut_history(self) -> None:
        path = self.directory.path / "history"
        path.write_bytes(path.read_bytes()[: self.random.randrange(1, path.stat().st_size)])

    def rename(self) -> None:
        new = VmName(f"vm{self.random.randrange(3)}x")
        if new != self.vm:
            with relocate.alone(self.directory):
                relocate.rename(self.directory, new)
            self.vm = new


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_to_a_vm_both_ways_to_look_at_it_tell_the_same(builder, seed):
    """What other hands change inside the directory of a point: after the next renewal."""
    life = Life(builder, random.Random(seed))
    often = [life.commit, life.renew]
    inside = [life.replace_manifest, life.damage, life.lose_manifest]
    seldom: list[Callable[[], None]] = [
        *(life.retire, life.retire_without_a_line, life.protect, life.unprotect, life.remove, life.uncommit),
        *(life.rewrite, life.cut_history, life.rename, *inside),
    ]
    life.commit()
    life.renew()
    believed = is_believed(life.directory)
    for _ in range(30):
        happens = life.random.choice([*often * (1 + seed), *seldom])
        if happens == life.commit or life.points():
            happens()
        if happens in inside:
            life.renew()
        believed += is_believed(life.directory)
        found = summary.look(life.directory)
        assert said(found) == said(without_summary(life.directory)), happens
    assert believed, "or this test shows nothing"


def is_believed(directory: VmDirectory) -> bool:
    """Whether a summary is taken for what it says, without a look at each point."""
    with mock.patch.object(summary, "_look_at_each", side_effect=Compared):
        try:
            summary.look(directory)
        except Compared:
            return False
    return True


class Compared(Exception):
    """Each point was compared."""


def exchanged(vm: Path) -> None:
    """Put a copy in a point's place, under the same name."""
    point = vm / many_points.point_number(1)
    shutil.copytree(point, vm / "copy")
    shutil.rmtree(point)
    (vm / "copy").rename(point)


CHANGES: dict[str, Callable[[Path], object]] = {
    "removed": lambda vm: shutil.rmtree(vm / many_points.point_number(1)),
    "added": lambda vm: shutil.copytree(vm / many_points.point_number(1), vm / many_points.point_number(7)),
    "renamed": lambda vm: (vm / many_points.point_number(1)).rename(vm / many_points.point_number(8)),
    "exchanged": exchanged,
    "two exchanged": lambda vm: [
        (vm / old).rename(vm / new)
        for old, new in zip(
            [many_points.point_number(0), many_points.point_number(1), "aside"],
            ["aside", many_points.point_number(0), many_points.point_number(1)],
            strict=True,
        )
    ],
    "history cut": lambda vm: os.truncate(vm / "history", 300),
    "history exchanged": lambda vm: (
        shutil.copy(vm / "history", vm / "h"),
        (vm / "h").rename(vm / "history"),
    ),
    "the newest has no manifest": lambda vm: (vm / many_points.point_number(2) / "manifest.json").unlink(),
    "the newest is marked by hand": lambda vm: (vm / many_points.point_number(2) / "protected").touch(),
    "the directory copied": lambda vm: (
        vm.rename(vm.with_name("old")),
        shutil.copytree(vm.with_name("old"), vm),
        shutil.copystat(vm.with_name("old"), vm),
    ),
    "the dates put back": lambda vm: [
        (
            shutil.rmtree(vm / many_points.point_number(1)),
            os.utime(vm, ns=(found.st_atime_ns, found.st_mtime_ns)),
        )
        for found in [vm.stat()]
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_point_that_comes_goes_or_is_exchanged_breaks_the_seal(three, change):
    assert is_believed(three)
    CHANGES[change](three.path)
    assert not is_believed(three)
    assert said(summary.look(three)) == said(without_summary(three))


@pytest.mark.parametrize("shift_ns", [0, 1])
def test_a_change_in_the_tick_in_which_the_seal_was_made_is_seen(three, monkeypatch, shift_ns):
    """The kernel then sets the same time of change; the time of modification is another one."""
    real = os.lstat
    renew(three)
    sealed = real(three.path)
    shutil.rmtree(three.path / many_points.point_number(1))

    def same_tick(path: Path) -> SimpleNamespace:
        found = real(path)
        assert found.st_ctime_ns > sealed.st_ctime_ns
        modified = sealed.st_ctime_ns + shift_ns
        return SimpleNamespace(
            st_mode=found.st_mode,
            st_ino=found.st_ino,
            st_mtime_ns=modified,
            st_ctime_ns=sealed.st_ctime_ns,
        )

    monkeypatch.setattr(os, "lstat", same_tick)
    assert not is_believed(three)


def test_a_file_system_that_does_not_keep_dates_gets_no_seal(three, monkeypatch):
    monkeypatch.setattr(os, "utime", lambda *_arguments, **_options: None)
    (three.path / "something").write_text("")
    renew(three)
    assert summary.look(three).fits
    assert not is_believed(three)


def test_what_changes_a_point_while_the_seal_is_made_is_seen(three, monkeypatch):
    """Somebody protects a point, which takes no lock of the VM, at any moment of a renewal."""
    moments = ["date", "write_seal"]
    for number, name in enumerate(moments):
        module = seal if name == "date" else summary_file
        real = getattr(module, name)

        def meanwhile(*arguments: Any, _real: Any = real, _number: int = number) -> Any:
            prune.protect(three, many_points.point_number(_number))
            return _real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, meanwhile)
            renew(three)
        assert summary.look(three).points[number].protected


def test_whoever_takes_the_lock_breaks_the_seal_before_the_first_change(three):
    assert is_believed(three)
    with three.lock():
        assert not is_believed(three)
        summary.renew(three)
        assert is_believed(three)


def test_a_point_is_shown_as_protected_at_once_and_the_summary_is_believed(three):
    prune.protect(three, many_points.point_number(0))
    assert is_believed(three)
    assert [one.protected for one in summary.look(three).points] == [True, False, False]
    prune.unprotect(three, many_points.point_number(0))
    assert is_believed(three)
    assert not any(one.protected for one in summary.look(three).points)


def test_during_a_run_a_point_that_is_protected_is_shown_as_that(three):
    with three.lock():
        summary.renew(three)
        with mock.patch.object(summary, "renew_if_free"):  # the run has the lock
            prune.protect(three, many_points.point_number(0))
        assert [one.protected for one in summary.look(three).points] == [True, False, False]


def test_a_point_protected_while_a_run_seals_is_shown_as_protected(three, monkeypatch):
    """The run seals right before the marker is set, having seen the point without it."""
    real = markers.put

    def sealing(directory: Path, marker: str) -> None:
        renew(three)
        assert is_believed(three)
        real(directory, marker)

    monkeypatch.setattr(markers, "put", sealing)
    with mock.patch.object(summary, "renew_if_free"):
        prune.protect(three, many_points.point_number(0))
    assert summary.look(three).points[0].protected


def test_a_manifest_that_vanished_from_an_older_point_is_told_after_the_next_renewal(tmp_path):
    """As docs/monitoring.md says: until then `check` looks at what the newest point needs."""
    vm = many_points.make(tmp_path / "repository", [2, 2])
    renew(vm)
    limits, now = check.Limits(check.timedelta(days=36500)), check.datetime.now(check.UTC)
    (vm.path / many_points.point_number(0) / "manifest.json").unlink()
    assert check.examine(vm, limits, now).level is check.Level.OK
    assert vm.scan_points().damaged, "who reads the points finds it"
    renew(vm)
    assert check.examine(vm, limits, now).level is check.Level.CRITICAL


def test_a_run_that_was_killed_long_ago_is_told(three):
    """A directory in which an unfinished point lies is never sealed."""
    (three.path / "20260301T000000Z.partial").mkdir()
    renew(three)
    limits, now = check.Limits(check.timedelta(days=36500)), check.datetime.now(check.UTC)
    found = check.examine(three, limits, now)
    assert found.level is check.Level.WARNING
    assert "did not finish" in found.findings[0].text


def test_a_manifest_that_vanished_below_the_newest_point_is_told_at_once(tmp_path):
    vm = many_points.make(tmp_path / "repository", [2, 3])
    renew(vm)
    (vm.path / many_points.point_number(2) / "manifest.json").unlink()
    limits, now = check.Limits(check.timedelta(days=36500)), check.datetime.now(check.UTC)
    found = check.examine(vm, limits, now)
    assert found.level is check.Level.CRITICAL
    assert "manifest" in found.findings[0].text


def test_a_copy_of_a_repository_by_hard_links_is_not_changed(three, tmp_path):
    os.link(three.path / "summary", tmp_path / "copy")
    before = (tmp_path / "copy").read_bytes()
    renew(three)
    assert (tmp_path / "copy").read_bytes() == before


@pytest.mark.parametrize("junk", [b"", b"0", b" " * 95, b"9" * 95, b"\xff" * 200, b"1 2 3 4"])
def test_a_seal_that_a_crash_has_torn_is_none(three, junk):
    path = three.path / "summary"
    stored = summary_file.read(three)
    assert stored is not None
    path.write_bytes(path.read_bytes()[: stored.end] + junk)
    assert not is_believed(three)
    assert said(summary.look(three)) == said(without_summary(three))


def calls(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> int:
    """Count how often an action asks the file system for anything."""
    count = 0
    with monkeypatch.context() as patch:
        for name in ("stat", "lstat", "fstat", "listdir", "scandir", "open"):
            real = getattr(os, name)

            def counting(*arguments: Any, _real: Any = real, **options: Any) -> Any:
                nonlocal count
                count += 1
                return _real(*arguments, **options)

            patch.setattr(os, name, counting)
        action()
    return count


def test_what_a_look_and_a_check_ask_of_the_file_system_does_not_grow_with_the_points(tmp_path, monkeypatch):
    limits, now = check.Limits(check.timedelta(days=36500)), check.datetime.now(check.UTC)
    counts = []
    for chains in (2, 12):
        vm = many_points.make(tmp_path / str(chains), [5] * chains)
        renew(vm)
        looked = calls(monkeypatch, lambda vm=vm: summary.look(vm))
        checked = calls(monkeypatch, lambda vm=vm: check.examine(vm, limits, now))
        counts.append((looked, checked))
    assert counts[0] == counts[1]
    assert counts[0][0] <= 8
    assert counts[0][1] <= 50


BAD: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: os.truncate(path, 200),
    "one byte changed": lambda path: path.write_bytes(path.read_bytes().replace(b"full", b"fulk", 1)),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "a link to a good one": lambda path: (path.rename(path.with_name("good")), path.symlink_to("good")),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "deep": lambda path: signed(path, b"[" * 100_000),
    "not JSON": lambda path: signed(path, b"\xff\x00"),
    "another format": lambda path: changed(path, "format", 1),
    "another VM": lambda path: changed(path, "vm", "vm2"),
    "another repository": lambda path: changed(path, "repository", "0" * 32),
    "no points": lambda path: (unsealed(path), changed(path, "points", [])),
    "a field more": lambda path: changed(path, "more", 1),
    "negative": lambda path: in_a_point(path, 7, -1),
    "beyond all time": lambda path: in_a_point(path, 7, 1 << 60),
    "a number for a text": lambda path: in_a_point(path, 6, 7),
    "a point that is not there": lambda path: in_a_point(path, 0, "20300101T000000Z"),
    "not a point": lambda path: in_a_point(path, 0, "../../etc"),
    "another inode": lambda path: in_a_point(path, 1, [1, 2, 3, 4, 5]),
}


def signed(path: Path, content: bytes) -> None:
    """Write a file with this content, and with the seal that it had, as if it were of it."""
    line = path.read_bytes().split(b"\n")[2]
    stamp = Stamp(*map(int, line.split()[:3]))
    found = path.stat()
    path.write_bytes(summary_file.document(content))
    content_checksum = summary_file.checksum_of(content)
    with path.open("ab") as file:
        file.write(summary_file.seal_line(content_checksum, stamp))
    assert path.stat().st_ino == found.st_ino, "so the seal is whole"


def content_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(path.read_bytes().split(b"\n")[1])
    return found


def changed(path: Path, name: str, value: object) -> None:
    signed(path, msgspec.json.encode({**content_of(path), name: value}))


def unsealed(path: Path) -> None:
    os.utime(path.parent)


def in_a_point(path: Path, field: int, value: object) -> None:
    unsealed(path)
    points = content_of(path)["points"]
    points[1][field] = value
    changed(path, "points", points)


@pytest.mark.parametrize("bad", BAD)
def test_a_file_that_can_not_be_used_is_as_good_as_none(three, bad):
    expected = said(without_summary(three))
    BAD[bad](three.path / "summary")
    found = summary.look(three)
    assert said(found) == expected
    assert not found.fits
    if (three.path / "summary").is_dir():
        return
    renew(three)
    assert summary.look(three).fits, "it is made anew"


def test_a_run_that_can_not_write_it_does_not_fail_and_leaves_nothing(builder, three, monkeypatch):
    def full(path: Path, content: bytes) -> None:
        path.with_name(f".{path.name}.new").write_bytes(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    commit(builder, many_points.point_number(7))
    before = (three.path / "summary").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(durable, "replace", full)
        renew(three)
    assert (three.path / "summary").read_bytes() == before
    assert not (three.path / ".summary.new").exists()
    assert said(summary.look(three)) == said(without_summary(three))


def test_a_point_that_changed_in_this_tick_of_the_clock_is_left_out(builder, three, monkeypatch):
    """A second change in the same tick would leave the same dates."""
    commit(builder, many_points.point_number(8))
    monkeypatch.setattr(summary, "_TICK_SECONDS", 3600.0)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    renew(three)
    assert content_of(three.path / "summary")["points"] == []
    assert said(summary.look(three)) == said(without_summary(three))


def test_wherever_a_renewal_is_killed_the_same_is_told(builder, three):
    commit(builder, many_points.point_number(9))
    expected = said(without_summary(three))
    number = 0
    while not die_at(number, lambda: renew(three), changing_step):
        assert said(summary.look(three)) == expected
        number += 1
    assert number >= 4
    assert summary.look(three).fits


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """40 VMs with 50 points each, in chains of 10."""
    repository = many_vms.make(tmp_path_factory.mktemp("many") / "repository", 40, 50, 10)
    many_vms.summarise(repository)
    return repository


def test_a_list_of_many_vms_opens_a_file_for_each(many):
    with opened() as files:
        found = [summary.look(many.vm(name)) for name in many.vms()]
    assert sum(len(one.points) for one in found) == 2000
    assert files["summary"] == 40
    assert files["manifest.json"] == files["history"] == 0
    chains = usage.chain_bytes(found[0].points)
    assert chains[found[0].points[9].id] == 10 * 65536


def test_a_check_of_many_vms_reads_the_newest_point_of_each(many):
    limits = check.Limits(check.timedelta(hours=26))
    with opened() as files:
        found = [check.examine(many.vm(name), limits, check.datetime.now(check.UTC)) for name in many.vms()]
    assert {one.level for one in found} == {check.Level.OK}
    assert files["manifest.json"] == 40
    assert files["history"] == 0


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda newest, below: os.truncate(newest / "vda.digests", 5), "vda.digests"),
        (lambda newest, below: os.truncate(newest / "vda.qcow2", 5), "vda.qcow2"),
        (lambda newest, below: os.truncate(below / "vda.digests", 0), "length is 0 bytes"),
        (lambda newest, below: os.truncate(below / "vda.qcow2", 70000), "manifest says"),
        (lambda newest, below: (below / "vda.qcow2").unlink(), "No such file"),
        (lambda newest, below: shutil.rmtree(below), "is missing"),
        (lambda newest, below: (newest / "manifest.json").write_text("{}"), "manifest"),
    ],
)
def test_a_check_by_the_summary_finds_a_chain_of_the_newest_point_that_is_cut(tmp_path, spoil, why):
    vm = many_points.make(tmp_path / "repository", [6])
    renew(vm)
    limits, now = check.Limits(check.timedelta(days=36500)), check.datetime.now(check.UTC)
    assert check.examine(vm, limits, now).level is check.Level.OK
    assert summary.look(vm).fits
    spoil(vm.path / many_points.point_number(5), vm.path / many_points.point_number(2))
    found = check.examine(vm, limits, now)
    assert found.level is check.Level.CRITICAL
    assert why in " ".join(one.text for one in found.findings)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda point: os.truncate(point / "vda.qcow2", 70000),
        lambda point: os.truncate(point / "vda.digests", 0),
        lambda point: (point / "vda.qcow2").write_bytes(bytes((point / "vda.qcow2").stat().st_size)),
    ],
)
def test_of_a_vm_with_a_damaged_layer_everything_is_read_each_time(tmp_path, spoil):
    """Also of one that the newest point does not need."""
    vm = many_points.make(tmp_path / "repository", [2, 2])
    spoil(vm.path / many_points.point_number(0))
    renew(vm)
    assert not summary.look(vm).fits
    found = check.examine(vm, check.Limits(check.timedelta(days=36500)), check.datetime.now(check.UTC))
    assert "2 points damaged" in found.findings[0].text


def test_what_a_renewal_asks_of_the_file_system_grows_in_a_line_with_the_points(tmp_path, monkeypatch):
    counts = []
    for points in (10, 40):
        vm = many_points.make(tmp_path / str(points), [10] * (points // 10))
        counts.append(calls(monkeypatch, lambda vm=vm: renew(vm)))
    assert counts[1] <= 4 * counts[0] + 20, counts
