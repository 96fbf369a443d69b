# SPDX-License-Identifier: GPL-2.0-or-later
"""A copy whose files have holes where the original has zeroes is the same repository to everybody.

Every stored cluster here has 4 KiB of data, somewhere in it, so each gets holes before and behind them.
"""

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from backupctl.cancel import Cancellation
from backupctl.digests.clusters import CLUSTER_BYTES
from backupctl.images import nbd_server
from backupctl.names import PointId
from backupctl.operations.diff import diff
from backupctl.operations.prune import run as prune
from backupctl.operations.prune.retention import Rules
from backupctl.operations.restore import in_place
from backupctl.operations.restore.request import RestoreRequest
from backupctl.operations.restore.whole import restore
from backupctl.operations.verify.layer import VerifyScope
from backupctl.operations.verify.run import VerifyReport, verify
from backupctl.progress import Silent
from backupctl.repository import chain
from backupctl.repository.repository import Repository
from tests.unit.points import P1, P2, P3, Builder, disk_entry

SIZE = 20 * CLUSTER_BYTES + 512
P4 = PointId("20260104T000000Z")


def _copy(command: str, source: Path, target: Path) -> None:
    subprocess.run([*command.split(), source, target], check=True, timeout=60)


def _dig(source: Path, target: Path) -> None:
    """Let the file system find the zeroes of each file of a copy."""
    shutil.copytree(source, target)
    for path in filter(Path.is_file, target.rglob("*")):
        subprocess.run(["fallocate", "--dig-holes", path], check=True, timeout=60)


def _punch(source: Path, target: Path) -> None:
    """Punch a hole into just one cluster of each image, where it is zeroes."""
    shutil.copytree(source, target)
    for path in target.rglob("*.qcow2"):
        content = path.read_bytes()
        at = next(
            at for at in range(5 * CLUSTER_BYTES, len(content), 4096) if not any(content[at : at + 4096])
        )
        command = ["fallocate", "--punch-hole", "--offset", str(at), "--length", "4096", path]
        subprocess.run(command, check=True, timeout=60)


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "cp --sparse=always": lambda source, target: _copy("cp -a --sparse=always", source, target),
    "fallocate --dig-holes": _dig,
    "fallocate --punch-hole": _punch,
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """A chain of three."""
    builder = Builder(Repository.create(tmp_path_factory.mktemp("original") / "repository"))
    chance = random.Random(3)

    def cluster() -> bytes:
        at = chance.randrange(16) * 4096
        return (bytes(at) + chance.randbytes(4096)).ljust(CLUSTER_BYTES, b"\0")

    def writes(*numbers: int) -> list[tuple[int, bytes]]:
        return [(number * CLUSTER_BYTES, cluster()) for number in numbers]

    builder.point(P1, (disk_entry(size=SIZE), [*writes(*range(16)), (SIZE - 512, b"t" * 512)]))
    zeroes = (9 * CLUSTER_BYTES, bytes(CLUSTER_BYTES))
    builder.point(P2, (disk_entry(size=SIZE, parent=P1), [*writes(1, 2, 18), zeroes]))
    builder.point(P3, (disk_entry(size=SIZE, parent=P2), writes(2, 3)))
    return builder


@pytest.fixture
def copied(original: Builder, request: pytest.FixtureRequest, tmp_path: Path) -> Builder:
    way = getattr(request, "param", "cp --sparse=always")
    WAYS[way](original.repository.path, tmp_path / "copy")
    return Builder(Repository.open(tmp_path / "copy"))


def proven(builder: Builder, depth: VerifyScope | None = None) -> VerifyReport:
    report = verify(builder.repository, None, None, depth or VerifyScope(), Silent(), Cancellation())
    assert [damage.message for damage in report.damage] == []
    return report


def content(builder: Builder, point: PointId, into: Path) -> bytes:
    """Restore a point; it is proven by its digests."""
    request = RestoreRequest(
        directory=builder.directory, point=point, to=str(into), image_format="raw", overwrite=True
    )
    restore(request, Silent(), Cancellation())
    return into.read_bytes()


@pytest.mark.parametrize("copied", WAYS, indirect=True)
def test_a_copy_with_holes_is_sound_and_each_cluster_is_read_once(original, copied):
    assert proven(copied).read_bytes == proven(original).read_bytes
    proven(copied, VerifyScope(data=False))
    proven(copied, VerifyScope(percent=50, seed=1))


def test_a_copy_with_holes_is_restored_compared_and_brought_back(original, copied, tmp_path):
    held = {point: content(original, point, tmp_path / "o.raw") for point in (P1, P2, P3)}
    assert {point: content(copied, point, tmp_path / "c.raw") for point in held} == held
    found = diff(
        copied.directory,
        copied.directory.point(P1),
        copied.directory.point(P3),
        disk=None,
        stop=Cancellation(),
    )
    changed = [at for at in range(0, SIZE, CLUSTER_BYTES) if held[P1][at:][:65536] != held[P3][at:][:65536]]
    assert found.disks[0].changed_bytes == len(changed) * CLUSTER_BYTES
    target = tmp_path / "vda.raw"
    _copy("cp --sparse=always", tmp_path / "c.raw", target)  # P3's content, with holes of its own
    with target.open("r+b") as file:
        file.seek(7 * CLUSTER_BYTES)
        file.write(b"other")
    request = RestoreRequest(directory=copied.directory, point=P3, to=str(target), image_format="raw")
    (report,) = in_place.restore(request, Silent(), Cancellation()).images
    assert (report.written_bytes, target.read_bytes()) == (CLUSTER_BYTES, held[P3])


def test_a_copy_with_holes_shows_its_bytes_by_nbd(original, copied, tmp_path):
    held = content(original, P3, tmp_path / "o.raw")
    layers = chain.paths(copied.directory, copied.directory.point(P3), "vda")
    with nbd_server.serve(layers) as address:
        uri = f"nbd+unix:///{nbd_server.EXPORT}?socket={address}"
        subprocess.run(["qemu-img", "convert", "-O", "raw", uri, tmp_path / "s"], check=True, timeout=60)
    assert (tmp_path / "s").read_bytes() == held


def test_points_are_added_to_a_copy_with_holes_and_merged_into_it(copied, tmp_path):
    held = bytearray(content(copied, P3, tmp_path / "c.raw"))
    new = os.urandom(4096).ljust(CLUSTER_BYTES, b"\0")
    held[11 * CLUSTER_BYTES : 12 * CLUSTER_BYTES] = new
    copied.point(P4, (disk_entry(size=SIZE, parent=P3), [(11 * CLUSTER_BYTES, new)]))
    report = prune.prune(copied.directory, Rules(last=1), Silent(), Cancellation())
    assert (report.damage, report.left, len(report.merged)) == ((), (), 3)
    proven(copied)
    assert content(copied, P4, tmp_path / "after.raw") == held
