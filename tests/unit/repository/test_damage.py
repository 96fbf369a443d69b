# SPDX-License-Identifier: GPL-2.0-or-later
"""Damage by chance: whatever is done to a repository, verify finds it and restore never gives wrong bytes.

Seeded. Every case is also a check of what verify says: each disk of a point that can't be restored must be
among those that it names.
"""

import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from backupctl.cancel import Cancellation
from backupctl.errors import BackupctlError, DamageFound
from backupctl.names import PointId, VmName
from backupctl.operations.restore.request import RestoreRequest
from backupctl.operations.restore.whole import restore
from backupctl.operations.verify.layer import VerifyScope
from backupctl.operations.verify.run import VerifyReport, verify
from backupctl.progress import Silent
from backupctl.repository.repository import Repository
from tests.unit.points import P1, P2, P3, Builder, disk_entry

CLUSTER = 65536
POINTS = (P1, P2, P3)
DISKS = {"vda": 12 * CLUSTER + 1024, "vdb": 6 * CLUSTER}
VM = VmName("vm1")
Damage = Callable[[Path, random.Random], str]


@dataclass
class Sound:
    """A repository, and what each disk held at each point."""

    path: Path
    held: dict[tuple[PointId, str], bytes]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Sound:
    """A full and two incrementals of two disks, each with data and zeroes of its own in every layer."""
    builder = Builder(Repository.create(tmp_path_factory.mktemp("sound") / "repository"))
    chance = random.Random(1)
    now = {name: bytearray(size) for name, size in DISKS.items()}
    held = {}
    for point, parent in zip(POINTS, (None, P1, P2), strict=True):
        layers = []
        for name, size in DISKS.items():
            writes = [(at * CLUSTER, chance.randbytes(CLUSTER)) for at in chance.sample(range(5), 3)]
            writes += [(5 * CLUSTER, bytes(CLUSTER))] if parent else [(5 * CLUSTER, b"old" * 1000)]
            writes += [(size - 1024, chance.randbytes(1024))]
            for offset, content in writes:
                now[name][offset : offset + len(content)] = content
            entry = disk_entry(name, size=size)
            kind = "incremental" if parent else "full"
            layers.append((replace(entry, kind=kind, parent=parent), writes))
            held[point, name] = bytes(now[name])
        builder.point(point, *layers)
    return Sound(builder.repository.path, held)


def flip_data(directory: Path, chance: random.Random) -> str:
    image = some(directory, chance, "qcow2")
    content = image.read_bytes()
    used = [at for at in range(CLUSTER, len(content), CLUSTER) if len(set(content[at : at + CLUSTER])) > 200]
    at = chance.choice(used)
    stored = len(content[at : at + CLUSTER].rstrip(b"\0"))  # what lies behind the disk's end is nobody's
    return flip(image, at + chance.randrange(stored), chance)


def flip_tables(directory: Path, chance: random.Random) -> str:
    """In the bytes that mean something: the fixed header, L1, L2, reference counts."""
    image = some(directory, chance, "qcow2")
    content = image.read_bytes()
    (first,) = struct.unpack_from(">Q", content, 40)
    (counts_table,) = struct.unpack_from(">Q", content, 48)
    (counts,) = struct.unpack_from(">Q", content, counts_table)
    (second,) = struct.unpack_from(">Q", content, first)
    second &= (1 << 56) - 512
    entries = [at for at in range(second, second + 13 * 8, 8) if any(content[at : at + 8])]
    places = [
        chance.choice([*range(36), *range(40, 104)]),
        first + chance.randrange(8),
        chance.choice(entries) + chance.randrange(2, 6),
        counts_table + chance.randrange(8),
        counts + chance.randrange(8),
    ]
    return flip(image, chance.choice(places), chance)


def flip_papers(directory: Path, chance: random.Random) -> str:
    papers = chance.choice(
        [some(directory, chance, "digests"), directory / chance.choice(POINTS) / "manifest.json"]
    )
    return flip(papers, chance.randrange(papers.stat().st_size), chance)


def truncate(directory: Path, chance: random.Random) -> str:
    file = some_file(directory, chance)
    length = chance.randrange(file.stat().st_size)
    with file.open("r+b") as opened:
        opened.truncate(length)
    return f"{file} cut to {length}"


def lose(directory: Path, chance: random.Random) -> str:
    file = some_file(directory, chance)
    file.unlink()
    return f"{file} lost"


def lose_point(directory: Path, chance: random.Random) -> str:
    point = directory / chance.choice(POINTS)
    shutil.rmtree(point)
    return f"{point} lost"


def swap(directory: Path, chance: random.Random) -> str:
    """Between points or between disks, with or without the digest maps; or the manifests."""
    one, other = chance.sample(POINTS, 2)
    disk = chance.choice(list(DISKS))
    pairs: list[tuple[Path, Path]] = []
    how = chance.choice(["points", "disks", "manifests"])
    for suffix in chance.choice([["qcow2"], ["digests"], ["qcow2", "digests"]]):
        if how == "points":
            pairs.append((directory / one / f"{disk}.{suffix}", directory / other / f"{disk}.{suffix}"))
        elif how == "disks":
            pairs.append((directory / one / f"vda.{suffix}", directory / one / f"vdb.{suffix}"))
    for this, that in pairs or [(directory / one / "manifest.json", directory / other / "manifest.json")]:
        content = this.read_bytes()
        this.write_bytes(that.read_bytes())
        that.write_bytes(content)
    return f"{how} swapped: {pairs or (one, other)}"


def some(directory: Path, chance: random.Random, suffix: str) -> Path:
    return directory / chance.choice(POINTS) / f"{chance.choice(list(DISKS))}.{suffix}"


def some_file(directory: Path, chance: random.Random) -> Path:
    manifest = directory / chance.choice(POINTS) / "manifest.json"
    return chance.choice([some(directory, chance, "qcow2"), some(directory, chance, "digests"), manifest])


def flip(file: Path, offset: int, chance: random.Random) -> str:
    bit = chance.randrange(8)
    with file.open("r+b") as opened:
        opened.seek(offset)
        (byte,) = opened.read(1)
        opened.seek(offset)
        opened.write(bytes([byte ^ 1 << bit]))
    return f"{file}: bit {bit} of byte {offset} flipped"


KINDS: tuple[Damage, ...] = (flip_data, flip_tables, flip_papers, truncate, lose, lose_point, swap)


def check(sound: Sound, case: int, tmp_path: Path) -> None:
    """One case: damage a copy, verify, restore all that there is."""
    chance = random.Random(case)
    path = tmp_path / "repository"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(sound.path, path)
    told = f"case {case}: {KINDS[case % len(KINDS)](path / VM, chance)}"
    report = verify(Repository.open(path), None, None, VerifyScope(), Silent(), Cancellation())
    assert report.damage or report.notes, told
    named = damaged_by(report)
    target = tmp_path / "out.raw"
    for (point, disk), content in sound.held.items():
        err = failure(path, point, disk, target)
        there = (path / VM / point).exists()
        if err is None:
            assert target.read_bytes() == content, f"{told}: {point} {disk} was restored wrong"
            target.unlink()
            continue
        assert not target.exists(), told
        assert isinstance(err, DamageFound) or not there, f"{told}: {err!r}"
        assert (point, disk) in named or not there, f"{told}: {point} {disk} can't be restored: {err}"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["repository"], told


def failure(path: Path, point: PointId, disk: str, target: Path) -> BackupctlError | None:
    """Restore a disk; returns the error, if it was refused."""
    try:
        directory = Repository.open(path).vm(VM)
        held = directory.point(point).id
        request = RestoreRequest(
            directory=directory, point=held, to=str(target), disk=disk, image_format="raw"
        )
        restore(request, Silent(), Cancellation())
    except BackupctlError as err:
        return err
    return None


def damaged_by(report: VerifyReport) -> set[tuple[str, str]]:
    """The disks of points that verify calls damaged."""
    found = {(one.point, one.disk) for damage in report.damage for one in damage.touches}
    for damage in report.damage:
        if damage.kind == "manifest":
            found |= {(damage.path.name, disk) for disk in DISKS}
    return found


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=[kind.__name__ for kind in KINDS])
def test_some_damage_of_every_kind_is_found_and_never_restored(sound, tmp_path, kind):
    for case in range(kind, 21, len(KINDS)):
        check(sound, case, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_damage_at_two_hundred_places_is_found_and_never_restored(sound, tmp_path):
    for case in range(200):
        check(sound, case, tmp_path)
    print("200 damaged repositories: 200 found, none restored wrong")
