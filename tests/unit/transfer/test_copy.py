# SPDX-License-Identifier: GPL-2.0-or-later
import errno
import os
import random
import socket
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from backupctl.digests import clusters
from backupctl.digests.clusters import CLUSTER_BYTES
from backupctl.errors import Interrupted, ReadFailed, WriteFailed
from backupctl.transfer import batch, cluster_map, reader
from backupctl.transfer import copy as copies
from backupctl.transfer.batch import Part
from backupctl.transfer.cluster_map import ClusterMap
from backupctl.transfer.copy import Copied, Copy
from backupctl.transfer.extents import DIRTY, ZERO
from backupctl.transfer.nbd_client import Connection
from backupctl.transfer.rate_limit import TokenBucket
from backupctl.transfer.reader import NbdReader
from backupctl.transfer.sink import open_nbd_sink
from backupctl.transfer.source import Source
from backupctl.transfer.stream import stream
from fixtures.pieces import of_range
from tests.unit.transfer.conftest import noise, qcow2_node, qemu_io, raw_node, tool

MIB = 1 << 20


def source_of(*exports, bitmap=None, stall_seconds=20.0, connections=1) -> Source:
    (export,) = exports
    return Source.connect([export.address] * connections, export.name, bitmap, stall_seconds)


def target_image(tmp_path: Path, size: int) -> Path:
    path = tmp_path / "target.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", path, size)
    return path


def content_of(path: Path) -> bytes:
    tool("qemu-img", "convert", "-O", "raw", path, path.with_suffix(".raw"))
    return path.with_suffix(".raw").read_bytes()


def run(
    source: Source,
    target,
    wanted,
    *,
    limit=None,
    check=lambda: None,
    progress=lambda _done: None,
    stall_seconds=20.0,
) -> Copied:
    with open_nbd_sink(target.address, target.name) as sink:
        return Copy(
            NbdReader(source),
            sink,
            check=check,
            progress=progress,
            limiter=TokenBucket(limit),
            stall_seconds=stall_seconds,
        ).run(wanted)


def data(source: Source) -> list[Part]:
    """Return all but what reads as zeroes."""
    return [part for part in cluster_map.all_parts(source) if not part.zero]


def whole(size: int) -> list[Part]:
    """Return all of a disk as data."""
    return [of_range(0, clusters.count(size), zero=False)]


def length_of(parts: list[Part], size: int) -> int:
    return sum(clusters.bytes_of(part.numbers, size) for part in parts)


def streamed(source: Source, descriptor: int) -> None:
    parts = cluster_map.all_parts(source)
    stream(NbdReader(source), parts, descriptor, check=lambda: None, progress=lambda _done: None)


@pytest.mark.parametrize("connections", [1, 2, 3])
def test_a_full_of_an_odd_sized_disk_is_byte_equal(serve, tmp_path, connections):
    content = bytearray(5 * MIB + 3 * 512)
    content[: 70 * 1024] = noise(70 * 1024)
    content[2 * MIB + 512 : 4 * MIB + 1024] = noise(2 * MIB + 512)
    content[-512:] = noise(512)
    (tmp_path / "disk").write_bytes(content)
    tool("cp", "--sparse=always", tmp_path / "disk", tmp_path / "sparse")
    path = target_image(tmp_path, len(content))
    told: list[int] = []
    export, target = serve(raw_node(tmp_path / "sparse")), serve(qcow2_node(path), writable=True)
    with closing(source_of(export, connections=connections)) as source:
        wanted = data(source)
        copied = run(source, target, wanted, progress=told.append)
    assert copied == Copied(length_of(wanted, len(content)), 0)
    assert copied.copied_bytes < len(content)
    assert told == sorted(told)
    assert told[-1] == copied.copied_bytes
    end(target)
    assert content_of(path) == content


def end(export) -> None:
    export.process.terminate()
    assert export.process.wait(60) == 0


def test_an_incremental_holds_changes_zeroes_and_discards_and_nothing_else(serve, tmp_path):
    """The model: a random disk, then random writes, zeroes and discards recorded by a dirty bitmap."""
    rng = random.Random(7)
    size = 20 * MIB + 512
    disk = tmp_path / "disk.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", disk, size)
    qemu_io(disk, "qcow2", "write -P 1 0 15M", "write -P 2 19M 1M", f"write -P 3 {size - 512} 512")
    before = content_of(disk)
    (tmp_path / "parent.raw").write_bytes(before)
    tool("qemu-img", "bitmap", "--add", disk, "b0")
    commands = []
    for number in range(60):
        length = rng.choice([512, 4096, 65536, 300 * 1024])
        offset = rng.randrange(0, size - length, 512)
        kind = rng.choice([f"write -P {10 + number}", "write -z", "write -z -u", "discard"])
        commands.append(f"{kind} {offset} {length}")
    commands.append(f"write -z {size - 512} 512")
    qemu_io(disk, "qcow2", *commands)
    tool("qemu-img", "bitmap", "--disable", disk, "b0")
    layer = tmp_path / "layer.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", tmp_path / "parent.raw", layer, size)
    node = {**qcow2_node(layer), "backing": raw_node(tmp_path / "parent.raw")}
    export, target = serve(qcow2_node(disk), ["b0"]), serve(node, writable=True)
    with closing(source_of(export, bitmap="b0", connections=2)) as source:
        changed = ClusterMap(size)
        for found in source.statuses():
            dirty, zero = found.flags[1] & DIRTY != 0, found.flags[0] & ZERO != 0
            for mark, these in ((changed.zero, dirty & zero), (changed.data, dirty & ~zero)):
                mark(found.offsets[these], found.lengths[these])
        wanted = list(changed.parts())
        copied = run(source, target, wanted)
    end(target)
    end(export)
    assert copied.zero_bytes > 0
    assert copied.copied_bytes > 0
    assert copied.copied_bytes + copied.zero_bytes == length_of(wanted, size)
    assert content_of(layer) == content_of(disk) != before
    clean = np.ones(clusters.count(size), np.bool_)
    for part in wanted:
        clean[part.numbers] = False
    after = (tmp_path / "disk.raw").read_bytes()
    for number in np.flatnonzero(clean).tolist():
        place = slice(number * CLUSTER_BYTES, (number + 1) * CLUSTER_BYTES)
        assert after[place] == before[place]


def test_data_beyond_4_gib_arrives_where_it_belongs(serve, tmp_path):
    size = (5 << 30) + 512
    disk = tmp_path / "disk"
    disk.touch()
    with disk.open("r+b") as file:
        file.truncate(size)
        for offset, content in ((0, b"first"), ((4 << 30) + 4096, b"beyond"), (size - 512, b"last")):
            file.seek(offset)
            file.write(content)
    path = target_image(tmp_path, size)
    export, target = serve(raw_node(disk)), serve(qcow2_node(path), writable=True)
    with closing(source_of(export)) as source:
        run(source, target, data(source))
    end(target)
    tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", disk, path)


def failing_reads(path: Path, offset: int) -> dict:
    """A disk of which one sector can't be read."""
    failure = {"event": "none", "iotype": "read", "sector": offset // 512, "errno": 5, "once": False}
    image = {"driver": "file", "filename": str(path)}
    return {"driver": "raw", "file": {"driver": "blkdebug", "image": image, "inject-error": [failure]}}


@pytest.mark.parametrize("offset", [0, 3 * MIB + 512, 8 * MIB - 512])
def test_a_read_error_is_fatal_and_never_zeroes(serve, tmp_path, offset):
    (tmp_path / "disk").write_bytes(noise(8 * MIB))
    path = target_image(tmp_path, 8 * MIB)
    node = failing_reads(tmp_path / "disk", offset)
    export, target = serve(node), serve(qcow2_node(path), writable=True)
    with closing(source_of(export)) as source, pytest.raises(ReadFailed, match="Input/output error"):
        run(source, target, whole(8 * MIB))
    end(target)
    first = offset - offset % MIB
    assert content_of(path)[first : first + MIB] == bytes(MIB)  # nothing of the failed read was written


@pytest.mark.parametrize("offset", [0, 3 * MIB + 512, 8 * MIB - 512])
def test_a_read_error_ends_a_stream_before_the_bytes_that_could_not_be_read(serve, tmp_path, offset):
    content = noise(8 * MIB)
    (tmp_path / "disk").write_bytes(content)
    export = serve(failing_reads(tmp_path / "disk", offset))
    with (
        (tmp_path / "out").open("wb") as out,
        closing(source_of(export)) as source,
        pytest.raises(ReadFailed, match="Input/output error"),
    ):
        streamed(source, out.fileno())
    assert (tmp_path / "out").read_bytes() == content[: offset - offset % MIB]


def test_a_stream_into_a_file_ends_with_a_sync_whose_error_is_told(serve, tmp_path, monkeypatch):
    """Some file systems tell of a full disk at no earlier time."""
    (tmp_path / "disk").write_bytes(noise(MIB))
    export = serve(raw_node(tmp_path / "disk"))

    def failing(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", failing)
    with (
        (tmp_path / "out").open("wb") as out,
        closing(source_of(export)) as source,
        pytest.raises(WriteFailed, match="No space left"),
    ):
        streamed(source, out.fileno())


def test_a_server_that_dies_in_mid_copy_is_an_error(serve, tmp_path):
    (tmp_path / "disk").write_bytes(noise(32 * MIB))
    path = target_image(tmp_path, 32 * MIB)
    export, target = serve(raw_node(tmp_path / "disk")), serve(qcow2_node(path), writable=True)

    def kill(done):
        export.process.kill()

    with closing(source_of(export)) as source, pytest.raises(ReadFailed):
        run(source, target, whole(32 * MIB), progress=kill, limit=16 * MIB)


def test_a_target_that_dies_in_mid_copy_is_a_write_error(serve, tmp_path):
    (tmp_path / "disk").write_bytes(noise(32 * MIB))
    path = target_image(tmp_path, 32 * MIB)
    export, target = serve(raw_node(tmp_path / "disk")), serve(qcow2_node(path), writable=True)

    def kill(done):
        target.process.kill()

    with closing(source_of(export)) as source, pytest.raises(WriteFailed):
        run(source, target, whole(32 * MIB), progress=kill, limit=16 * MIB)


def test_a_source_that_stalls_is_given_up_in_time(serve, tmp_path):
    (tmp_path / "disk").write_bytes(noise(4 * MIB))
    path = target_image(tmp_path, 4 * MIB)
    export, target = serve(raw_node(tmp_path / "disk")), serve(qcow2_node(path), writable=True)
    source = source_of(export, stall_seconds=1.0)
    export.freeze()
    begun = time.monotonic()
    with pytest.raises(ReadFailed, match="no byte"):
        run(source, target, whole(4 * MIB), stall_seconds=1.0)
    source.close()
    assert time.monotonic() - begun < 30


def test_a_target_that_stalls_is_a_write_error(serve, tmp_path):
    (tmp_path / "disk").write_bytes(noise(4 * MIB))
    path = target_image(tmp_path, 4 * MIB)
    export, target = serve(raw_node(tmp_path / "disk")), serve(qcow2_node(path), writable=True)

    def freeze_soon(done):
        if done and not frozen:
            frozen.append(done)
            target.freeze()

    frozen: list[int] = []
    wanted = whole(4 * MIB)
    with closing(source_of(export)) as source, pytest.raises(WriteFailed, match="no byte"):
        run(source, target, wanted, progress=freeze_soon, limit=4 * MIB, stall_seconds=1.0)
    assert frozen


def test_a_request_to_stop_is_heard_while_the_server_is_silent(serve, tmp_path):
    (tmp_path / "disk").write_bytes(noise(4 * MIB))
    path = target_image(tmp_path, 4 * MIB)
    export, target = serve(raw_node(tmp_path / "disk")), serve(qcow2_node(path), writable=True)
    source = source_of(export)
    export.freeze()
    begun = time.monotonic()
    asked: list[float] = []

    def check():
        asked.append(time.monotonic() - begun)
        if asked[-1] > 0.5:
            raise Interrupted("stopped by SIGTERM")

    with pytest.raises(Interrupted):
        run(source, target, whole(4 * MIB), check=check)
    assert asked[-1] < 10
    assert len(asked) >= 3
    begun = time.monotonic()
    source.close()
    assert time.monotonic() - begun < 20


def test_the_rate_limit_is_kept(serve, tmp_path):
    (tmp_path / "disk").write_bytes(noise(8 * MIB))
    path = target_image(tmp_path, 8 * MIB)
    export, target = serve(raw_node(tmp_path / "disk")), serve(qcow2_node(path), writable=True)
    begun = time.monotonic()
    with closing(source_of(export)) as source:
        run(source, target, whole(8 * MIB), limit=8 * MIB)
    assert 0.7 < time.monotonic() - begun < 30


def test_memory_is_bounded_by_the_batches_in_flight(serve, tmp_path, monkeypatch):
    (tmp_path / "disk").write_bytes(noise(32 * MIB))
    path = target_image(tmp_path, 32 * MIB)
    export, target = serve(raw_node(tmp_path / "disk")), serve(qcow2_node(path), writable=True)
    made: list[memoryview] = []
    real = batch.new_buffers

    def new_buffers() -> list[memoryview]:
        made.extend(found := real())
        return found

    monkeypatch.setattr(batch, "new_buffers", new_buffers)
    with closing(source_of(export)) as source:
        run(source, target, whole(32 * MIB))
    assert 1 < len(made) <= 16  # a multiple of 8, for reader.BATCHES and 8 more
    assert reader.BATCHES <= 8


def test_a_full_target_is_a_write_error_that_says_so(serve, tmp_path, small_file_system):
    (tmp_path / "disk").write_bytes(noise(16 * MIB))
    path = target_image(small_file_system, 16 * MIB)
    export, target = serve(raw_node(tmp_path / "disk")), serve(qcow2_node(path), writable=True)
    try:
        with closing(source_of(export)) as source, pytest.raises(WriteFailed, match="No space left"):
            run(source, target, whole(16 * MIB))
    finally:
        target.process.kill()
        target.process.wait(60)


def test_an_export_that_is_not_there_is_a_read_error(serve, tmp_path):
    (tmp_path / "disk").write_bytes(bytes(512))
    export = serve(raw_node(tmp_path / "disk"))
    with pytest.raises(ReadFailed):
        Source.connect([export.address], "another")
    with pytest.raises(ReadFailed):
        Source.connect([tmp_path / "no.sock"], "disk")


def test_a_server_without_the_bitmap_is_a_read_error(serve, tmp_path):
    (tmp_path / "disk").write_bytes(bytes(512))
    export = serve(raw_node(tmp_path / "disk"))
    with pytest.raises(ReadFailed, match=r"does not offer .*qemu:dirty-bitmap:b0"):
        Source.connect([export.address], export.name, "b0")


def test_a_server_that_never_greets_is_given_up_in_time(tmp_path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "mute"))
        listening.listen()
        begun = time.monotonic()
        with pytest.raises(ReadFailed, match="silent"):
            Source.connect([tmp_path / "mute"], "disk", stall_seconds=0.5)
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0" * 4096])
def test_a_server_that_is_no_nbd_server_is_a_read_error(greeting):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(greeting or b"N")
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(ReadFailed):
            Source.connect([ours], "disk", stall_seconds=5)


def test_a_connected_socket_is_duplicated_so_that_its_owner_can_keep_it(serve, tmp_path):
    (tmp_path / "disk").write_bytes(bytes(512))
    export = serve(raw_node(tmp_path / "disk"))
    with socket.socket(socket.AF_UNIX) as held:
        held.connect(str(export.address))
        with closing(Source.connect([held], export.name)) as source:
            assert source.size == 512
        assert held.fileno() >= 0


def test_a_frozen_server_does_not_hold_up_block_status(serve, tmp_path):
    (tmp_path / "disk").write_bytes(bytes(512))
    export = serve(raw_node(tmp_path / "disk"))
    source = source_of(export, stall_seconds=0.5)
    export.freeze()
    with pytest.raises(ReadFailed, match="silent"):
        list(source.statuses())
    source.close()


def test_a_size_that_is_no_multiple_of_anything(serve, tmp_path):
    (tmp_path / "disk").write_bytes(noise(65536 + 513))
    path = target_image(tmp_path, 65536 + 1024)
    export, target = serve(raw_node(tmp_path / "disk")), serve(qcow2_node(path), writable=True)
    with closing(source_of(export)) as source:
        assert source.size == 65536 + 1024
        run(source, target, data(source))
    end(target)
    assert content_of(path)[: 65536 + 513] == (tmp_path / "disk").read_bytes()


def test_many_pieces_in_flight_do_not_get_into_each_others_buffers(serve, tmp_path):
    content = noise(64 * MIB)
    (tmp_path / "disk").write_bytes(content)
    path = target_image(tmp_path, len(content))
    export, target = serve(raw_node(tmp_path / "disk")), serve(qcow2_node(path), writable=True)
    with closing(source_of(export, connections=2)) as source:
        run(source, target, whole(len(content)))
    end(target)
    assert content_of(path) == content


def test_what_was_written_is_flushed_if_all_went_well_and_a_failed_flush_is_told(
    serve, tmp_path, monkeypatch
):
    target = serve(qcow2_node(target_image(tmp_path, MIB)), writable=True)

    def broken(connection, _seconds):
        raise connection.failure("No space left on device")

    monkeypatch.setattr(Connection, "flush", broken)
    with pytest.raises(WriteFailed, match="No space"), open_nbd_sink(target.address, target.name):
        pass
    with pytest.raises(KeyError), open_nbd_sink(target.address, target.name):
        raise KeyError


class Memory:
    """A sink that is no NBD server. waits: the first write ends only when five others have."""

    def __init__(self, size: int, *, waits: bool = True) -> None:
        self.content = bytearray(b"\xff" * size)
        self._waits = waits
        self.ended: list[int] = []
        self.first: int | None = None
        self._changed = threading.Condition()

    def write(self, numbers, parts) -> None:
        content = b"".join(parts)
        assert len(content) == len(numbers) * CLUSTER_BYTES
        assert numbers.tolist() == sorted(set(numbers.tolist()))
        self._await_others(int(numbers[0]))
        for place, number in enumerate(numbers.tolist()):
            begin, room = number * CLUSTER_BYTES, len(self.content) - number * CLUSTER_BYTES
            cluster = content[place * CLUSTER_BYTES : (place + 1) * CLUSTER_BYTES]
            self.content[begin : begin + CLUSTER_BYTES] = cluster[:room]
        self._end(int(numbers[0]))

    def zero(self, numbers) -> None:
        self._await_others(int(numbers[0]))
        for number in numbers.tolist():
            begin, room = number * CLUSTER_BYTES, len(self.content) - number * CLUSTER_BYTES
            self.content[begin : begin + CLUSTER_BYTES] = bytes(min(room, CLUSTER_BYTES))
        self._end(int(numbers[0]))

    def _await_others(self, number: int) -> None:
        with self._changed:
            if self._waits and self.first is None:
                self.first = number
                assert self._changed.wait_for(lambda: len(self.ended) >= 5, 20)

    def _end(self, number: int) -> None:
        with self._changed:
            self.ended.append(number)
            self._changed.notify_all()


def test_any_sink_can_be_written_to_in_any_order(serve, tmp_path):
    """The seam holds: a copy asks nothing of NBD, and reuses no buffer of a write that has not ended."""
    content = noise(24 * MIB)
    (tmp_path / "disk").write_bytes(content)
    export = serve(raw_node(tmp_path / "disk"))
    sink = Memory(len(content))
    wanted = [of_range(0, 320, zero=False), of_range(320, 336, zero=True), of_range(352, 368, zero=False)]
    with closing(source_of(export, connections=2)) as source:
        copied = Copy(NbdReader(source), sink, check=lambda: None).run(wanted)
    expected = bytearray(b"\xff" * len(content))
    expected[: 20 * MIB] = content[: 20 * MIB]
    expected[20 * MIB : 21 * MIB] = bytes(MIB)
    expected[22 * MIB : 23 * MIB] = content[22 * MIB : 23 * MIB]
    assert sink.content == expected
    assert copied == Copied(21 * MIB, MIB)
    assert sink.first is not None
    assert sink.ended.index(sink.first) >= 5


def test_scattered_clusters_and_a_short_last_one_come_padded_to_their_places(serve, tmp_path, monkeypatch):
    content = noise(24 * MIB + 1536)
    (tmp_path / "disk").write_bytes(content)
    export = serve(raw_node(tmp_path / "disk"))
    sink = Memory(len(content), waits=False)
    scattered = np.array([*range(100, 160, 3), 382, 383, 384], np.uint64)
    # Data first, so that the last batches get buffers that were used before.
    wanted = [of_range(0, 100, zero=False), of_range(160, 380, zero=False), Part(scattered, zero=False)]
    tails = []

    def write(numbers, parts):
        if 384 in numbers:
            place = numbers.tolist().index(384) * CLUSTER_BYTES
            tails.append(b"".join(parts)[place : place + CLUSTER_BYTES])
        Memory.write(sink, numbers, parts)

    monkeypatch.setattr(sink, "write", write)
    with closing(source_of(export)) as source:
        copied = Copy(NbdReader(source), sink, check=lambda: None).run(wanted)
    expected = bytearray(b"\xff" * len(content))
    for number in [*range(100), *range(160, 380), *scattered.tolist()]:
        place = slice(number * CLUSTER_BYTES, (number + 1) * CLUSTER_BYTES)
        expected[place] = content[place]
    assert sink.content == expected
    assert copied == Copied(342 * CLUSTER_BYTES + 1536, 0)
    assert tails == [content[-1536:].ljust(CLUSTER_BYTES, b"\0")]


def test_a_sink_is_called_once_for_several_batches(serve, tmp_path):
    """Each call costs a change of threads, and entries of tables that are one array operation for all."""
    content = noise(24 * MIB)
    (tmp_path / "disk").write_bytes(content)
    export = serve(raw_node(tmp_path / "disk"))
    sink = Memory(len(content), waits=False)
    with closing(source_of(export)) as source:
        Copy(NbdReader(source), sink, check=lambda: None).run(whole(len(content)))
    assert sink.content == content
    assert len(sink.ended) <= 16


def test_a_write_that_any_sink_fails_ends_the_copy(serve, tmp_path):
    (tmp_path / "disk").write_bytes(noise(8 * MIB))
    export = serve(raw_node(tmp_path / "disk"))

    class Full(Memory):
        def write(self, numbers, parts) -> None:
            raise WriteFailed("no space left on device")

    with closing(source_of(export)) as source, pytest.raises(WriteFailed, match="space"):
        Copy(NbdReader(source), Full(8 * MIB), check=lambda: None).run(whole(8 * MIB))


def test_a_sink_that_hangs_is_a_write_error_and_holds_up_nobody(serve, tmp_path, monkeypatch):
    """A write that hangs in the kernel cannot be ended; a roll-back must not wait for it."""
    monkeypatch.setattr(copies, "END_SECONDS", 0.5)
    (tmp_path / "disk").write_bytes(noise(2 * MIB))
    export = serve(raw_node(tmp_path / "disk"))
    hanging = threading.Event()

    class Hanging(Memory):
        def write(self, numbers, parts) -> None:
            hanging.wait(60)

    begun = time.monotonic()
    with (
        closing(source_of(export)) as source,
        pytest.raises(WriteFailed, match=r"no byte moved for 0\.5 s"),
    ):
        Copy(NbdReader(source), Hanging(2 * MIB), check=lambda: None, stall_seconds=0.5).run(whole(2 * MIB))
    assert time.monotonic() - begun < 20
    hanging.set()
