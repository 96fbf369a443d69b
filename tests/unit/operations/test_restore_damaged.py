# SPDX-License-Identifier: GPL-2.0-or-later
"""What a restore does with damaged data: refuse it, and leave nothing that looks complete."""

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from backupctl.errors import DamageFound
from tests.unit.operations.test_restore_whole import as_raw, run, start_to_stdout
from tests.unit.points import P1, P2, Builder, disk_entry

CLUSTER = 65536
SIZE = 40 * CLUSTER + 512
CONTENT = random.Random(3).randbytes(SIZE)
SPOILT = 30


@pytest.fixture
def image(builder: Builder) -> Path:
    """The image of a full of 40 clusters and a bit, sound as yet."""
    builder.point(
        P1, (disk_entry(size=SIZE), [(0, CONTENT[: 16 * CLUSTER]), (16 * CLUSTER, CONTENT[16 * CLUSTER :])])
    )
    return builder.directory.path / P1 / "vda.qcow2"


def place_of(image: Path, cluster: int) -> int:
    found = image.read_bytes().find(CONTENT[cluster * CLUSTER : cluster * CLUSTER + 64])
    assert found > 0
    return found


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.fixture
def spoilt(image) -> Path:
    """The image with four bytes of one cluster changed."""
    overwrite(image, place_of(image, SPOILT) + 100, b"ruin")
    return image


def with_ruin() -> bytes:
    at = SPOILT * CLUSTER + 100
    return CONTENT[:at] + b"ruin" + CONTENT[at + 4 :]


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_damaged_data_is_refused_by_range_and_nothing_is_left(builder, spoilt, tmp_path, image_format):
    with pytest.raises(
        DamageFound, match=f"vda of vm1 .* {SPOILT * CLUSTER}-{(SPOILT + 1) * CLUSTER - 1}"
    ) as found:
        run(builder.directory.point(P1), tmp_path / "out", image_format=image_format)
    assert found.value.next_command.startswith(f"backupctl verify vm1 {P1}")
    assert [path.name for path in (tmp_path / "out").iterdir()] == []


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_damage_is_restored_if_that_is_allowed_and_is_named(builder, spoilt, tmp_path, image_format):
    report = run(
        builder.directory.point(P1), tmp_path / "out.img", image_format=image_format, allow_damage=True
    )
    found = tmp_path / "out.img"
    assert (found.read_bytes() if image_format == "raw" else as_raw(found)) == with_ruin()
    assert report.images[0].damaged == ((SPOILT * CLUSTER, CLUSTER),)
    assert report.images[0].unverified == ""


def test_a_cluster_that_cannot_be_read_is_zeroes_if_damage_is_allowed_and_no_other(builder, image, tmp_path):
    content = image.read_bytes()
    (first,) = struct.unpack_from(">Q", content, 40)
    second = struct.unpack_from(">Q", content, first)[0] & (1 << 56) - 512
    entry = second + 8 * 20
    (value,) = struct.unpack_from(">Q", content, entry)
    overwrite(image, entry, struct.pack(">Q", value | 512))  # points between two clusters: QEMU refuses it
    with pytest.raises(DamageFound, match="is damaged"):
        run(builder.directory.point(P1), tmp_path / "out.raw")
    assert not (tmp_path / "out.raw").exists()
    report = run(builder.directory.point(P1), tmp_path / "out.raw", allow_damage=True)
    hole = slice(20 * CLUSTER, 21 * CLUSTER)
    expected = bytearray(CONTENT)
    expected[hole] = bytes(CLUSTER)
    assert (tmp_path / "out.raw").read_bytes() == expected
    assert report.images[0].damaged == ((20 * CLUSTER, CLUSTER),)


def test_without_its_digests_nothing_is_restored_unless_damage_is_allowed(builder, image, tmp_path):
    image.with_suffix(".digests").unlink()
    with pytest.raises(DamageFound, match="digest"):
        run(builder.directory.point(P1), tmp_path / "out.raw")
    assert not (tmp_path / "out.raw").exists()
    report = run(builder.directory.point(P1), tmp_path / "out.raw", allow_damage=True)
    assert (tmp_path / "out.raw").read_bytes() == CONTENT
    assert "digest" in report.images[0].unverified


def test_a_cluster_that_went_from_the_image_is_no_hole(builder, image, tmp_path):
    content = image.read_bytes()
    (first,) = struct.unpack_from(">Q", content, 40)
    second = struct.unpack_from(">Q", content, first)[0] & (1 << 56) - 512
    overwrite(image, second + 8 * 25, bytes(8))
    with pytest.raises(DamageFound, match=f"{25 * CLUSTER}-{26 * CLUSTER - 1}"):
        run(builder.directory.point(P1), tmp_path / "out.raw")


def test_a_device_that_was_refused_halfway_does_not_look_complete(builder, spoilt, loop_device):
    device = Path(loop_device(SIZE, filled=b"\xff"))
    point = builder.directory.point(P1)
    refusing = run_onto_device(point, device)
    assert refusing.returncode == 4, refusing.stderr
    assert not any(device.read_bytes()[: 1 << 20])


ONTO_DEVICE = """
import sys
from pathlib import Path
from backupctl.names import PointId, VmName
from backupctl.errors import DamageFound
from backupctl.operations.restore.disk import DiskReader
from backupctl.cancel import Cancellation
from backupctl.repository import chain
from backupctl.targets import output
from backupctl.repository.repository import Repository
directory = Repository.open(Path(sys.argv[1])).vm(VmName("vm1"))
point = directory.point("latest")
layers = chain.layers(directory, point, "vda")
reading = DiskReader(directory.name, point.id, layers, Cancellation(), lambda _done: None)
try:
    with output.device(Path(sys.argv[2]), reading.size) as target:
        reading.into_image(target, "raw", onto_device=True)
except DamageFound as err:
    sys.exit(4)
"""


def run_onto_device(point, device: Path) -> "subprocess.CompletedProcess[str]":
    """Restore onto a device as `restore --force` does."""
    command = [sys.executable, "-c", ONTO_DEVICE, str(point.path.parent.parent), str(device)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_sound_device_is_written_whole(builder, image, loop_device):
    device = Path(loop_device(SIZE, filled=b"\xff"))
    assert run_onto_device(builder.directory.point(P1), device).returncode == 0
    assert device.read_bytes() == CONTENT


def test_a_pipe_gets_nothing_of_the_damaged_piece(builder, spoilt):
    child = start_to_stdout(builder, subprocess.PIPE)
    found, said = child.communicate(timeout=60)
    assert child.returncode != 0
    assert b"DamageFound" in said
    assert len(found) <= SPOILT * CLUSTER
    assert found == CONTENT[: len(found)]


def command(builder: Builder, *arguments: str) -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, "-m", "backupctl", *arguments, "--repository", str(builder.repository.path)]
    environment = {name: text for name, text in os.environ.items() if name != "BACKUPCTL_CONFIG"}
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_the_command_line_tells_of_damage_by_its_exit_code(builder, spoilt, tmp_path):
    to = str(tmp_path / "out.raw")
    done = command(builder, "restore", "vm1", "--to", to)
    assert (done.returncode, Path(to).exists()) == (4, False)
    assert "next:  backupctl verify vm1" in done.stderr
    done = command(builder, "restore", "vm1", "--to", to, "--allow-damage", "--json")
    assert (done.returncode, Path(to).exists()) == (4, True)
    (disk,) = json.loads(done.stdout)["disks"]
    assert disk["damaged"] == [{"offset": SPOILT * CLUSTER, "length": CLUSTER}]
    assert "restored with damaged data" in done.stderr


@pytest.mark.parametrize("old", [None, b"old"], ids=["a new file", "over an old one"])
@pytest.mark.parametrize("digests", [True, False], ids=["damaged data", "no digests"])
def test_force_overwrites_and_lets_no_damage_through(builder, spoilt, tmp_path, old, digests):
    """What it let through before is refused, and the error names the option that does."""
    to = tmp_path / "out.raw"
    if old is not None:
        to.write_bytes(old)
    if not digests:
        spoilt.with_suffix(".digests").unlink()
    done = command(builder, "restore", "vm1", "--to", str(to), "--force")
    assert done.returncode == 4
    assert "restore --allow-damage" in done.stderr
    assert (to.read_bytes() if to.exists() else None) == old


def test_damage_that_is_allowed_overwrites_nothing(builder, spoilt, tmp_path):
    to = tmp_path / "out.raw"
    to.write_bytes(b"old")
    done = command(builder, "restore", "vm1", "--to", str(to), "--allow-damage")
    assert (done.returncode, to.read_bytes()) == (2, b"old")
    (following,) = [line for line in done.stderr.splitlines() if "next:" in line]
    assert "--force" in following
    assert "--allow-damage" in following
    done = command(builder, "restore", "vm1", "--to", str(to), "--allow-damage", "--force")
    assert (done.returncode, to.read_bytes()) == (4, with_ruin())


def test_a_thin_restore_reads_no_data_and_can_allow_no_damage(builder, image, tmp_path):
    done = command(builder, "restore", "vm1", "--to", str(tmp_path / "t"), "--thin", "--allow-damage")
    assert (done.returncode, (tmp_path / "t").exists()) == (2, False)


def test_verify_on_the_command_line(builder, image):
    done = command(builder, "verify", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["damage"] == []
    assert "no damage" in command(builder, "verify", "vm1", "latest").stdout
    overwrite(image, place_of(image, SPOILT), b"ruin")
    done = command(builder, "verify", "vm1", "--json")
    assert done.returncode == 4
    document = json.loads(done.stdout)
    (damage,) = document["damage"]
    assert damage["ranges"] == [{"offset": SPOILT * CLUSTER, "length": CLUSTER}]
    assert damage["touches"] == [{"point": P1, "disk": "vda", "ranges": damage["ranges"]}]
    assert document["read_bytes"] == 41 * CLUSTER
    done = command(builder, "verify", "vm1")
    assert done.returncode == 4
    assert f"touches vm1 {P1} vda: {SPOILT * CLUSTER}-{(SPOILT + 1) * CLUSTER - 1}" in done.stdout
    assert command(builder, "verify", "--fast").returncode == 0


@pytest.mark.parametrize("wrong", [["--fast", "--sample", "5"], ["--seed", "1"], ["--sample", "0"]])
def test_options_that_make_no_sense_are_refused(builder, image, wrong):
    assert command(builder, "verify", *wrong).returncode == 2


def test_a_sample_tells_its_seed(builder, image):
    done = command(builder, "verify", "--sample", "10", "--json")
    assert f"--seed {json.loads(done.stdout)['seed']}" in done.stderr


def test_damage_beside_a_result_leaves_one_document_on_stdout(builder, image):
    builder.point(P2, (disk_entry(size=SIZE), []))
    overwrite(image.with_name("manifest.json"), 40, b"ruin")
    done = command(builder, "list", "vm1", "--json")
    assert done.returncode == 4
    assert [point["point"] for point in json.loads(done.stdout)] == [P2]
    assert "checksum" in done.stderr or "JSON" in done.stderr
