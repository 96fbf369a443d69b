# SPDX-License-Identifier: GPL-2.0-or-later
"""`restore --only-changed`: the target is byte-equal at the end, and only what differed was written."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backupctl.cancel import Cancellation
from backupctl.digests.clusters import CLUSTER_BYTES
from backupctl.errors import DamageFound, Interrupted, UsageError
from backupctl.operations.restore import in_place
from backupctl.operations.restore.in_place import restore
from backupctl.operations.restore.request import RestoreRequest
from backupctl.progress import Reporter, Silent
from backupctl.system import durable
from fixtures.machine import Disk, Machine
from tests.unit.operations.test_restore_whole import as_raw, tree
from tests.unit.points import P1, P2, Builder, disk_entry, in_memory

SIZE = 40 * CLUSTER_BYTES + 512


def run(
    builder: Builder,
    to: object,
    *,
    point: str = "latest",
    stop: Cancellation | None = None,
    reporter: Reporter | None = None,
    **options,
):
    """By the manifest the disk was qcow2; who has it raw must say so."""
    kind = "raw" if str(to).endswith(".raw") else None
    wanted = {"image_format": kind, **options}
    chosen = builder.directory.point(point).id
    request = RestoreRequest(directory=builder.directory, point=chosen, to=str(to), **wanted)
    return restore(request, reporter or Silent(), stop or Cancellation())


@pytest.fixture
def disk(builder: Builder) -> tuple[Builder, bytes]:
    """A chain of two over a disk with data, zeroes, holes, and a last cluster that is short."""
    chance = random.Random(5)
    first = [(at * CLUSTER_BYTES, chance.randbytes(CLUSTER_BYTES)) for at in range(0, 30, 2)]
    builder.point(P1, (disk_entry(size=SIZE), [*first, (SIZE - 512, b"t" * 512)]))
    second = [(4 * CLUSTER_BYTES, bytes(CLUSTER_BYTES)), (9 * CLUSTER_BYTES + 77, b"n" * 5000)]
    builder.point(P2, (disk_entry(size=SIZE, parent=P1), second))
    return builder, as_raw_of(builder)


def as_raw_of(builder: Builder) -> bytes:
    raw = builder.repository.path.parent / "wanted"
    image = builder.directory.path / P2 / "vda.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True, timeout=60)
    return raw.read_bytes()


def spoil(content: bytes, *clusters: int) -> bytes:
    """Change one byte in each of some clusters."""
    changed = bytearray(content)
    for cluster in clusters:
        changed[cluster * CLUSTER_BYTES] ^= 0xFF
    return bytes(changed)


def make(target: Path, content: bytes, image_format: str) -> None:
    raw = target.with_name("made.raw")
    raw.write_bytes(content)
    command = ["qemu-img", "convert", "-f", "raw", "-O", image_format, raw, target]
    subprocess.run(command, check=True, timeout=60)
    raw.unlink()


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_only_the_clusters_that_differ_are_written(disk, tmp_path, image_format):
    """Data, zeroes and the short last cluster each got spoilt; everything else is left as it is."""
    builder, content = disk
    target = tmp_path / f"vda.{image_format}"
    make(target, spoil(content, 0, 1, 4, 9, 39, 40), image_format)
    before = tree(builder.repository.path)
    (report,) = run(builder, target).images
    assert as_raw(target) == content
    assert report.written_bytes == 5 * CLUSTER_BYTES + 512
    assert report.same_bytes == SIZE - report.written_bytes
    assert tree(builder.repository.path) == before
    checked = subprocess.run(
        ["qemu-img", "check", "-f", image_format, target], capture_output=True, timeout=60, check=False
    )
    assert checked.returncode in (0, 63)  # 63: raw has nothing to check


def test_what_is_right_already_is_not_touched(disk, tmp_path):
    builder, content = disk
    target = tmp_path / "vda.raw"
    target.write_bytes(content)
    os.utime(target, (1, 1))
    (report,) = run(builder, tmp_path, image_format="raw").images
    assert (report.written_bytes, report.same_bytes) == (0, SIZE)
    assert target.stat().st_mtime == 1


def test_it_compares_what_is_on_the_disk(disk, tmp_path, monkeypatch):
    """After a sync that failed the kernel shows in memory, as written, what never reached the disk."""
    builder, content = disk
    target = tmp_path / "vda.raw"
    target.write_bytes(content)
    durable.sync_and_forget(target)
    if in_memory(target):
        pytest.skip("this file system has its files in memory only")
    target.read_bytes()
    seen, real = [], in_place._differing

    def differing(work, address):
        seen.append(in_memory(target))
        return real(work, address)

    monkeypatch.setattr(in_place, "_differing", differing)
    run(builder, target)
    assert seen == [False]


@pytest.mark.parametrize("seed", range(4))
def test_whatever_stood_there_it_becomes_the_point(disk, tmp_path, seed):
    builder, content = disk
    chance = random.Random(seed)
    other = bytearray(content)
    for _ in range(12):
        at, length = chance.randrange(SIZE), chance.choice([1, 512, 70_000])
        other[at : at + length] = chance.choice([bytes(length), chance.randbytes(length)])
    image_format = chance.choice(["raw", "qcow2"])
    target = tmp_path / f"vda.{image_format}"
    make(target, bytes(other[:SIZE]), image_format)
    run(builder, target)
    assert as_raw(target) == content


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("more", [-3 * CLUSTER_BYTES, -512, 512, 5 * CLUSTER_BYTES])
def test_a_file_gets_the_disk_s_size(disk, tmp_path, image_format, more):
    builder, content = disk
    target = tmp_path / f"vda.{image_format}"
    make(target, (content + b"x" * 8 * CLUSTER_BYTES)[: SIZE + more], image_format)
    (report,) = run(builder, target).images
    assert as_raw(target) == content
    assert report.written_bytes <= 4 * CLUSTER_BYTES


def test_the_older_point_comes_back_as_well(disk, tmp_path):
    builder, content = disk
    target = tmp_path / "vda.raw"
    target.write_bytes(content)
    (report,) = run(builder, target, point=P1).images
    older = target.read_bytes()
    run(builder, target)
    assert target.read_bytes() == content
    assert older != content
    assert report.written_bytes == 2 * CLUSTER_BYTES


def test_a_block_device_gets_what_differs_and_keeps_what_is_behind(disk, loop_device):
    builder, content = disk
    device = loop_device(SIZE + 3 * CLUSTER_BYTES, filled=b"\xee")
    (first,) = run(builder, device).images
    found = Path(device).read_bytes()
    assert found[:SIZE] == content
    assert set(found[SIZE:]) == {0xEE}
    assert first.written_bytes == SIZE
    (second,) = run(builder, device).images
    assert second.written_bytes == 0


def test_a_block_device_in_use_or_too_small_is_refused(disk, loop_device):
    builder, _ = disk
    small = loop_device(SIZE - 512, filled=b"\xee")
    with pytest.raises(UsageError, match="needs"):
        run(builder, small)
    assert set(Path(small).read_bytes()) == {0xEE}
    busy = loop_device(SIZE, filled=b"\xee")
    held = os.open(busy, os.O_RDONLY | os.O_EXCL)
    try:
        with pytest.raises(UsageError, match="in use"):
            run(builder, busy)
    finally:
        os.close(held)
    assert set(Path(busy).read_bytes()) == {0xEE}


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_the_disk_of_a_running_vm_is_refused_untouched(disk, tmp_path, build, image_format):
    builder, content = disk
    target = tmp_path / f"vda.{image_format}"
    make(target, spoil(content, 3), image_format)
    with Machine(build, [Disk("vda", target, image_format)]):
        before = target.read_bytes()
        with pytest.raises(UsageError, match="in use by another process"):
            run(builder, target)
        assert target.read_bytes() == before
    run(builder, target)
    assert as_raw(target) == content


def test_damaged_data_is_never_written(disk, tmp_path):
    """A byte of the stored data flipped: the target's cluster keeps what it had."""
    builder, content = disk
    image = builder.directory.path / P1 / "vda.qcow2"
    stored = image.read_bytes()
    at = stored.index(content[2 * CLUSTER_BYTES : 2 * CLUSTER_BYTES + 64])
    image.write_bytes(stored[:at] + bytes([stored[at] ^ 1]) + stored[at + 1 :])
    target = tmp_path / "vda.raw"
    was = spoil(content, 2)
    target.write_bytes(was)
    with pytest.raises(DamageFound, match=f"bytes {2 * CLUSTER_BYTES}-"):
        run(builder, target)
    assert target.read_bytes() == was
    target.write_bytes(content)
    assert run(builder, target).images[0].written_bytes == 0, (
        "what is right needs nothing from the damaged image"
    )


def test_a_damaged_digest_map_stops_it_before_anything_is_changed(disk, tmp_path):
    builder, content = disk
    path = builder.directory.path / P1 / "vda.digests"
    path.write_bytes(path.read_bytes()[:-1])
    target = tmp_path / "vda.raw"
    target.write_bytes(content[:-512])
    with pytest.raises(DamageFound, match="digest map"):
        run(builder, target)
    assert target.read_bytes() == content[:-512]


def test_a_stop_in_the_middle_says_so_and_the_next_run_finishes(disk, tmp_path):
    builder, content = disk
    target = tmp_path / "vda.qcow2"
    make(target, bytes(SIZE), "qcow2")

    class StopsLate(Silent):
        def event(self, event):
            if event.text.startswith("write"):
                stop.request("SIGTERM")

    def till_stopped():
        for _ in range(50):  # the copy looks ten times a second, and may be done before it does
            run(builder, target, stop=stop, reporter=StopsLate())
            make(target, bytes(SIZE), "qcow2")

    stop = Cancellation()
    with pytest.raises(Interrupted):
        till_stopped()
    run(builder, target)
    assert as_raw(target) == content


KILLED = """
import os, signal, sys, threading
from pathlib import Path
from backupctl.operations.restore import in_place
from backupctl.operations.restore.request import RestoreRequest
from backupctl.names import VmName
from backupctl.cancel import Cancellation
from backupctl.progress import Reporter, Silent
from backupctl.repository.repository import Repository
from backupctl.transfer.nbd_client import Connection
lock = threading.Lock()
repository, target, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
write = Connection.start_write
def counted(self, buffer, offset):
    # Die before one more write than `number` is begun: those that fly are ended, or not.
    global number
    with lock:
        if number == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        number -= 1
    return write(self, buffer, offset)
Connection.start_write = counted
directory = Repository.open(Path(repository)).vm(VmName("vm1"))
point = directory.point("latest").id
request = RestoreRequest(directory=directory, point=point, to=target, image_format=sys.argv[4])
in_place.restore(request, Silent(), Cancellation())
"""


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("number", [1, 3])
def test_killed_after_some_writes_the_same_again_finishes(disk, tmp_path, image_format, number):
    builder, content = disk
    target = tmp_path / f"vda.{image_format}"
    make(target, spoil(content, *range(0, 40, 3)), image_format)
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(builder.repository.path), str(target), str(number), image_format],
        timeout=60,
        check=False,
        capture_output=True,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert [report.written_bytes > 0 for report in _again(builder, target)] == [True]
    assert as_raw(target) == content


def _again(builder: Builder, target: Path):
    """The dead run's QEMU ends with it, but perhaps a moment later."""
    for _ in range(50):
        try:
            return run(builder, target).images
        except UsageError:
            time.sleep(0.1)
    return run(builder, target).images


def test_what_is_not_there_or_not_what_it_is_called_is_refused(disk, tmp_path):
    builder, content = disk
    with pytest.raises(UsageError, match="does not exist"):
        run(builder, tmp_path / "vda.raw")
    with pytest.raises(UsageError, match="standard output"):
        run(builder, "-")
    (tmp_path / "vda.qcow2").write_bytes(content)
    with pytest.raises(UsageError, match="not a valid qcow2 image") as caught:
        run(builder, tmp_path / "vda.qcow2")
    assert "--format raw" in caught.value.next_command
    inside = builder.directory.path / P1 / "vda.qcow2"
    (tmp_path / "link.qcow2").symlink_to(inside)
    for path in (inside, tmp_path / "link.qcow2"):
        with pytest.raises(UsageError, match="repository"):
            run(builder, path)


def test_a_link_leads_to_the_image_and_stays(disk, tmp_path):
    builder, content = disk
    make(tmp_path / "real.qcow2", bytes(SIZE), "qcow2")
    (tmp_path / "web").symlink_to("real.qcow2")
    (report,) = run(builder, tmp_path / "web").images
    assert as_raw(tmp_path / "real.qcow2") == content
    assert (tmp_path / "web").is_symlink()
    assert report.path == tmp_path / "real.qcow2"


@pytest.mark.parametrize("feature", ["backing", "data-file"])
def test_an_image_of_two_files_is_changed_in_place_when_the_user_names_that(disk, tmp_path, feature):
    builder, content = disk
    target, other = tmp_path / "vda.qcow2", tmp_path / "other.raw"
    other.write_bytes(spoil(content, 1, 9))
    options = {"backing": ["-b", other, "-F", "raw"], "data-file": ["-o", f"data_file={other}"]}[feature]
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *options, target, str(SIZE)]
    subprocess.run(command, check=True, timeout=60)
    with pytest.raises(UsageError, match=r"other\.raw") as caught:
        run(builder, target)
    assert f"--allow-image-feature {feature}" in caught.value.next_command
    (report,) = run(builder, target, allowed=[feature]).images
    assert as_raw(target) == content
    if feature == "backing":
        assert report.written_bytes == 2 * CLUSTER_BYTES
        assert other.read_bytes() == spoil(content, 1, 9)


def test_an_encrypted_or_corrupt_image_is_refused_with_a_way_out(disk, tmp_path):
    builder, _ = disk
    target = tmp_path / "vda.qcow2"
    make(target, bytes(SIZE), "qcow2")
    plain = target.read_bytes()
    for at, value, words, way in ((35, 1, "encrypted", "new file"), (79, 2, "corrupt", "qemu-img check")):
        spoilt = plain[:at] + bytes([value]) + plain[at + 1 :]
        target.write_bytes(spoilt)
        with pytest.raises(UsageError, match=words) as caught:
            run(builder, target, allowed=["encryption"])
        assert way in caught.value.next_command + caught.value.hint
        assert target.read_bytes() == spoilt


def test_an_image_of_somebody_elses_is_resized_and_changed_as_well(disk, tmp_path):
    """qemu-img runs with the owner's rights, and nobody but us may enter the directory."""
    builder, content = disk
    target = tmp_path / "vda.qcow2"
    make(target, bytes(CLUSTER_BYTES), "qcow2")
    if os.geteuid() == 0:
        os.chown(target, 4711, 4711)
    target.chmod(0o600)
    run(builder, target)
    assert as_raw(target) == content


def test_an_image_whose_name_others_could_turn_is_not_changed_by_root(disk, tmp_path):
    """Whoever owns the directory could have us write into any file, by a link."""
    if os.geteuid() != 0:
        pytest.skip("only root can be led to files of others")
    builder, content = disk
    target, victim = tmp_path / "theirs" / "vda.raw", tmp_path / "victim"
    victim.write_bytes(spoil(content, 1))
    target.parent.mkdir()
    target.symlink_to(victim)
    os.chown(target.parent, 4711, 4711)
    with pytest.raises(UsageError, match="belongs to user 4711"):
        run(builder, target)
    assert victim.read_bytes() == spoil(content, 1)


def test_two_names_of_one_image_are_not_taken_for_two(builder: Builder, tmp_path):
    builder.point(P1, (disk_entry("vda"), [(0, b"A")]), (disk_entry("vdb"), [(0, b"B")]))
    make(tmp_path / "vda.qcow2", bytes(1 << 20), "qcow2")
    os.link(tmp_path / "vda.qcow2", tmp_path / "vdb.qcow2")
    before = (tmp_path / "vda.qcow2").read_bytes()
    with pytest.raises(UsageError, match="several disks"):
        run(builder, tmp_path)
    assert (tmp_path / "vda.qcow2").read_bytes() == before


def test_one_missing_target_stops_all_before_anything_is_changed(builder: Builder, tmp_path):
    builder.point(P1, (disk_entry("vda"), [(0, b"A")]), (disk_entry("vdb"), []))
    (tmp_path / "vda.raw").write_bytes(bytes(1 << 20))
    with pytest.raises(UsageError, match=r"vdb\.raw does not exist"):
        run(builder, tmp_path, image_format="raw")
    assert not any((tmp_path / "vda.raw").read_bytes())


def test_the_command_tells_what_was_written(disk, tmp_path):
    builder, content = disk
    target = tmp_path / "vda.raw"
    target.write_bytes(spoil(content, 7))
    base = [sys.executable, "-m", "backupctl", "restore", "vm1", P2, "--to", str(target), "--only-changed"]
    base += ["--format", "raw"]
    base += ["--repository", str(builder.repository.path)]
    done = subprocess.run(base, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "64.0 KiB written, 2.4 MiB already identical" in done.stdout
    done = subprocess.run([*base, "--json"], capture_output=True, text=True, timeout=60, check=False)
    assert json.loads(done.stdout)["disks"][0]["written_bytes"] == 0
    assert target.read_bytes() == content
    for option in ("--force", "--allow-damage"):
        done = subprocess.run([*base, option], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, option in done.stderr) == (2, True)
