# SPDX-License-Identifier: GPL-2.0-or-later
"""Images of our own writer, as QEMU sees them."""

import errno
import fcntl
import json
import os
import random
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backupctl.errors import DamageFound, WriteFailed
from backupctl.images import create, qcow2_header, qcow2_writer
from backupctl.images.open_image import OpenImage
from backupctl.images.qcow2_writer import Qcow2Writer
from backupctl.sizes import CLUSTER_BYTES
from backupctl.system import direct_io
from backupctl.system.direct_io import DirectWriter, aligned
from fixtures import builds
from tests.conftest import get_build

TIB = 1 << 40
Kinds = Mapping[int, bool]
"""Cluster's number to whether it holds data; else zeroes."""


def data(number: int) -> bytes:
    """What the tests write into a cluster."""
    return (number + 1).to_bytes(8, "little") * (CLUSTER_BYTES // 8)


def numbers(given: Iterable[int]) -> qcow2_writer.Clusters:
    return np.array(sorted(given), np.uint64)


def write(writer: Qcow2Writer, given: Iterable[int]) -> None:
    """Write clusters, up to 16, as one batch."""
    wanted = sorted(given)
    memory = aligned(16 * CLUSTER_BYTES)
    content = b"".join(map(data, wanted))
    memory[: len(content)] = content
    writer.write(numbers(wanted), [memory[: len(content)]])


def write_all(writer: Qcow2Writer, clusters: int) -> None:
    for start in range(0, clusters, 16):
        write(writer, range(start, start + 16))


def make(path: Path, size: int, kinds: Kinds, backing: str | None = None) -> None:
    """Make an image of these clusters."""
    with OpenImage.create(path) as image:
        with_data = [number for number, holds_data in kinds.items() if holds_data]
        with Qcow2Writer(image, size, backing) as writer:
            for start in range(0, len(with_data), 16):
                write(writer, with_data[start : start + 16])
            writer.zero(numbers(number for number, holds_data in kinds.items() if not holds_data))
            writer.finish()


def tool(version: str, *arguments: object) -> str:
    done = subprocess.run(
        [get_build(version).tool("qemu-img"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_sound(path: Path, version: str = "installed") -> None:
    alone = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "backing": None}
    found = json.loads(tool(version, "check", "--output=json", f"json:{json.dumps(alone)}"))
    assert (found.get("leaks", 0), found.get("corruptions", 0), found["check-errors"]) == (0, 0, 0)
    assert found["image-end-offset"] == path.stat().st_size


@pytest.fixture(params=builds.versions())
def version(request) -> str:
    return str(request.param)


@st.composite
def disks(draw) -> tuple[int, Kinds, int | None]:
    """The size of a disk, its clusters, and the size of a backing file that is all data."""
    clusters = draw(st.sampled_from([1, 2, 7, 100, 8192, 8193, 20000, TIB // CLUSTER_BYTES]))
    size = clusters * CLUSTER_BYTES - draw(st.sampled_from([0, 512, 65024, 4096]))
    near = st.integers(0, min(clusters, 40) - 1)
    places = st.one_of(near, near.map(lambda back: clusters - 1 - back), st.integers(0, clusters - 1))
    kinds = draw(st.dictionaries(places, st.booleans(), max_size=40))
    backing = draw(st.one_of(st.none(), st.integers(1, 60).map(lambda blocks: blocks * 50_176)))
    return size, kinds, backing


def expect(path: Path, size: int, kinds: Kinds, backing: int | None) -> None:
    """Write what the disk must hold to a sparse raw file."""
    with path.open("wb") as file:
        file.write(b"\xbb" * min(backing or 0, size))
        for number, holds_data in kinds.items():
            file.seek(number * CLUSTER_BYTES)
            file.write((data(number) if holds_data else bytes(CLUSTER_BYTES))[: size - file.tell()])
        file.truncate(size)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(disks())
def test_qemu_finds_the_image_sound_and_reads_what_was_written(tmp_path, version, disk):
    size, kinds, backing = disk
    for path in tmp_path.iterdir():
        path.unlink()
    if backing is not None:
        (tmp_path / "below.raw").write_bytes(b"\xbb" * backing)
        tool(version, "convert", "-O", "qcow2", tmp_path / "below.raw", tmp_path / "below")
    make(tmp_path / "made", size, kinds, "below" if backing is not None else None)
    expect(tmp_path / "wanted", size, kinds, backing)
    assert_sound(tmp_path / "made", version)
    tool(version, "compare", "-f", "raw", "-F", "qcow2", tmp_path / "wanted", tmp_path / "made")
    assert qcow2_header.read(tmp_path / "made").size == size


@pytest.mark.parametrize("size", [512, CLUSTER_BYTES, 5 * CLUSTER_BYTES + 512, TIB, 64 * TIB])
@pytest.mark.parametrize("backing", [None, "../20260101T000000Z/vda.qcow2"])
def test_an_image_without_a_cluster(tmp_path, version, size, backing):
    make(tmp_path / "made", size, {}, backing)
    assert_sound(tmp_path / "made", version)
    found = qcow2_header.read(tmp_path / "made")
    assert (found.size, found.cluster, found.backing) == (size, CLUSTER_BYTES, backing or "")
    assert found.backing_format == ("qcow2" if backing else "")


def test_its_header_says_what_qemu_would_write(tmp_path):
    """All but the table of names of features, which is for people, and where the tables are."""
    make(tmp_path / "ours", 12345 * 512, {}, "../20260101T000000Z/vda.qcow2")
    create.create_layer(tmp_path / "its", 12345 * 512, "../20260101T000000Z/vda.qcow2")
    ours, its = ((tmp_path / name).read_bytes()[:65536] for name in ("ours", "its"))
    different = {at for at in range(112) if ours[at] != its[at]}
    assert different <= {*range(8, 16), *range(40, 56)}
    says = [replace(qcow2_header.parse(one, 0), l1_offset=0, refcount_offset=0) for one in (ours, its)]
    assert says[0] == says[1]


def test_all_of_a_disk_is_zeroes(tmp_path, version):
    make(tmp_path / "made", 3 * TIB + 512, dict.fromkeys(range(30000), False))
    assert_sound(tmp_path / "made", version)
    (one, rest) = json.loads(tool(version, "map", "--output=json", tmp_path / "made"))
    assert (one["length"], one["zero"], one["data"]) == (30000 * CLUSTER_BYTES, True, False)
    assert rest["length"] == 3 * TIB + 512 - 30000 * CLUSTER_BYTES


def test_a_disk_of_64_tib(tmp_path, version):
    clusters = 64 * TIB // CLUSTER_BYTES
    kinds = {0: True, 1: False, clusters // 2: True, clusters - 2: False, clusters - 1: True}
    make(tmp_path / "made", 64 * TIB, kinds)
    assert_sound(tmp_path / "made", version)
    extents = json.loads(tool(version, "map", "--output=json", tmp_path / "made"))
    found = [one["start"] // CLUSTER_BYTES for one in extents if one["data"]]
    assert found == [0, clusters // 2, clusters - 1]
    assert (tmp_path / "made").stat().st_size < 4 << 20


def test_a_disk_that_is_too_large_for_qcow2_is_refused(tmp_path):
    with OpenImage.create(tmp_path / "made") as image, pytest.raises(WriteFailed, match="cannot have"):
        Qcow2Writer(image, 1 << 60, None)


def test_more_reference_counts_than_one_block_holds(tmp_path, monkeypatch):
    """The file is sparse: what is written where does not matter here."""
    monkeypatch.setattr(DirectWriter, "set_aside", lambda *_: None)
    for clusters in (32764, 32765, 32766, 70000):
        path = tmp_path / f"made{clusters}"
        with OpenImage.create(path) as image:
            writer = Qcow2Writer(image, 1 << 34, None)
            with monkeypatch.context() as patched:
                patched.setattr(writer._file, "write", lambda *_: None)
                for start in range(0, clusters, 4096):
                    batch = np.arange(start, min(start + 4096, clusters), dtype=np.uint64)
                    writer.write(batch, [memoryview(bytes(len(batch) * CLUSTER_BYTES))])
            writer.finish()
        assert_sound(path)
        path.unlink()


@pytest.mark.parametrize(
    "used", [1, 32766, 32767, 32768, 65533, 65534, 65535, 8192 * 32768 - 8194, 8192 * 32768, 1 << 30]
)
def test_the_reference_counts_cover_themselves(used):
    blocks, table_clusters = qcow2_writer._reference_clusters(used)
    total = used + blocks + table_clusters
    assert (blocks - 1) * 32768 < total <= blocks * 32768
    assert (table_clusters - 1) * 8192 < blocks <= table_clusters * 8192


def test_clusters_in_any_order_from_several_threads_with_few_tables_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(qcow2_writer, "_TABLES_KEPT", 2)
    rng, size = random.Random(3), 10 * 8192 * CLUSTER_BYTES
    wanted = rng.sample(range(10 * 8192), 1200)
    zeroes = rng.sample(sorted(set(range(10 * 8192)) - set(wanted)), 1000)
    with OpenImage.create(tmp_path / "made") as image:
        writer = Qcow2Writer(image, size, None)

        def work(mine: int) -> None:
            for start in range(mine * 8, len(wanted), 32):
                write(writer, wanted[start : start + 8])
            for start in range(mine * 8, len(zeroes), 32):
                writer.zero(numbers(zeroes[start : start + 8]))

        threads = [threading.Thread(target=work, args=(mine,)) for mine in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.finish()
    kinds = dict.fromkeys(wanted, True) | dict.fromkeys(zeroes, False)
    expect(tmp_path / "wanted", size, kinds, None)
    assert_sound(tmp_path / "made")
    tool("installed", "compare", "-f", "raw", tmp_path / "wanted", tmp_path / "made")


def test_what_does_not_fit_is_refused_and_spoils_the_image(tmp_path):
    wrong = [
        lambda writer: writer.zero(numbers([4])),  # beyond the end
        lambda writer: write(writer, [1]),  # twice
        lambda writer: writer.zero(numbers([1])),
        lambda writer: writer.zero(np.array([3, 2], np.uint64)),
        lambda writer: writer.zero(np.array([2, 2], np.uint64)),
        lambda writer: writer.write(numbers([2]), [aligned(512)]),
    ]
    for number, call in enumerate(wrong):
        with OpenImage.create(tmp_path / f"made{number}") as image:
            writer = Qcow2Writer(image, 3 * CLUSTER_BYTES + 512, None)
            write(writer, [1])
            with pytest.raises(ValueError, match="a cluster"):
                call(writer)
            with pytest.raises(WriteFailed, match="not all of the image"):
                writer.finish()
            with pytest.raises(DamageFound):
                image.header()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_no_image_comes_of_a_write_that_failed(tmp_path, monkeypatch, number):
    with OpenImage.create(tmp_path / "made") as image:
        writer = Qcow2Writer(image, 1 << 20, None)
        write(writer, [0])

        def fail(*_):
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patched:
            patched.setattr(writer._file, "write", fail)
            with pytest.raises(WriteFailed, match=os.strerror(number)):
                write(writer, [1])
        write(writer, [2])
        with pytest.raises(WriteFailed, match="not all of the image was written"):
            writer.finish()
        with pytest.raises(DamageFound):
            image.header()


def test_no_image_is_finished_while_a_write_is_under_way(tmp_path, monkeypatch):
    with OpenImage.create(tmp_path / "made") as image:
        writer = Qcow2Writer(image, 1 << 20, None)
        real, hangs, goes_on = writer._file.write, threading.Event(), threading.Event()

        def hang(*arguments):
            hangs.set()
            goes_on.wait()
            real(*arguments)

        monkeypatch.setattr(writer._file, "write", hang)
        thread = threading.Thread(target=write, args=(writer, [0]))
        thread.start()
        hangs.wait()
        with pytest.raises(WriteFailed, match="not all of the image was written"):
            writer.finish()
        goes_on.set()
        thread.join()
        with pytest.raises(DamageFound):
            image.header()


def test_a_finished_image_is_written_no_more(tmp_path):
    with OpenImage.create(tmp_path / "made") as image:
        writer = Qcow2Writer(image, 1 << 20, None)
        write(writer, [0])
        writer.finish()
        with pytest.raises(WriteFailed, match="Bad file descriptor"):
            write(writer, [1])
        with pytest.raises(WriteFailed, match="not all of the image was written"):
            writer.finish()
    assert_sound(tmp_path / "made")


def test_a_full_file_system_is_reported_by_its_name(small_file_system):
    with (
        OpenImage.create(small_file_system / "made") as image,
        Qcow2Writer(image, 1 << 30, None) as writer,
        pytest.raises(WriteFailed) as raised,
    ):
        write_all(writer, 1 << 14)
    assert raised.value.message == "No space left on device"


def test_the_file_takes_no_more_space_than_it_needs(tmp_path):
    make(tmp_path / "made", 1 << 30, dict.fromkeys(range(100), True))
    found = (tmp_path / "made").stat()
    assert found.st_size == (1 + 100 + 1 + 1 + 2) * CLUSTER_BYTES
    assert found.st_blocks * 512 <= found.st_size + CLUSTER_BYTES


@pytest.mark.parametrize("refused", ["open", "pwritev", "preadv"])
def test_the_image_is_the_same_where_direct_io_is_refused(tmp_path, monkeypatch, refused):
    real = getattr(os, refused)

    def refuse(*arguments, **options):
        if refused == "open":
            direct = arguments[1] & os.O_DIRECT
        else:
            direct = fcntl.fcntl(arguments[0], fcntl.F_GETFL) & os.O_DIRECT
        if direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(*arguments, **options)

    monkeypatch.setattr(qcow2_writer, "_TABLES_KEPT", 1)  # else none is read back
    kinds = {number * 4000 % 40000: number % 3 > 0 for number in range(20)}
    make(tmp_path / "direct", 40000 * CLUSTER_BYTES, kinds)
    with monkeypatch.context() as patched:
        patched.setattr(direct_io.os, refused, refuse)
        make(tmp_path / "cached", 40000 * CLUSTER_BYTES, kinds)
    assert (tmp_path / "direct").read_bytes() == (tmp_path / "cached").read_bytes()
    assert_sound(tmp_path / "cached")


# What a power failure leaves.

Written = tuple[int, bytes]


@contextmanager
def steps(monkeypatch) -> Iterator[list[Written | None]]:
    """Record what is written, and None for each flush; setting aside and cutting count as nothing."""
    found: list[Written | None] = []
    real_write, real_sync = DirectWriter.write, DirectWriter.sync

    def noted_write(self, parts, offset):
        found.append((offset, b"".join(map(bytes, parts))))
        real_write(self, parts, offset)

    def noted_sync(self):
        found.append(None)
        real_sync(self)

    with monkeypatch.context() as patched:
        patched.setattr(DirectWriter, "write", noted_write)
        patched.setattr(DirectWriter, "sync", noted_sync)
        yield found


def states(done: list[Written | None], size: int, rng: random.Random) -> Iterator[bytes]:
    """Yield what the file may hold after a power failure at some step.

    What was flushed is there. Of the rest, each sector on its own is there, or is not, or is garbage.
    """
    flushed = max((number + 1 for number, step in enumerate(done) if step is None), default=0)
    content = bytearray(size)
    for step in done[:flushed]:
        if step is not None:
            content[step[0] : step[0] + len(step[1])] = step[1]
    sectors = [
        (offset + at, written[at : at + 512])
        for offset, written in filter(None, done[flushed:])
        for at in range(0, len(written), 512)
    ]
    for _ in range(30):
        state = bytearray(content)
        share, garbage = rng.random(), rng.choice([0, 0, 0.1])
        for offset, sector in sectors:
            if rng.random() < share:
                state[offset : offset + 512] = sector
            elif rng.random() < garbage and sector != content[offset : offset + 512]:
                state[offset : offset + 512] = rng.randbytes(512)
        yield bytes(state)


def test_after_a_power_failure_it_is_complete_or_no_image(tmp_path, monkeypatch):
    with steps(monkeypatch) as done:
        make(tmp_path / "made", 20000 * CLUSTER_BYTES, {0: True, 1: False, 9000: True}, "../below/vda.qcow2")
    whole, rng, complete = (tmp_path / "made").read_bytes(), random.Random(5), 0
    for number in range(len(done) + 1):
        for state in states(done[:number], len(whole), rng):
            try:
                qcow2_header.parse(state, len(state))
            except ValueError:
                continue
            complete += 1
            assert state == whole
    assert complete
    assert done[-1] is None
