# SPDX-License-Identifier: GPL-2.0-or-later
import errno
import os
import random
import socket
import time
from contextlib import closing
from pathlib import Path
from typing import Self

import pytest

from backupctl.errors import Interrupted, ReadFailed, WriteFailed
from backupctl.transfer import copy as copies
from backupctl.transfer.copy import Copied, Copy
from backupctl.transfer.extents import DIRTY, ZERO, Extent
from backupctl.transfer.nbd_client import Connection
from backupctl.transfer.polling import Wakeup
from backupctl.transfer.rate_limit import TokenBucket
from backupctl.transfer.sink import open_nbd_sink
from backupctl.transfer.source import Source
from backupctl.transfer.stream import stream
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
            source,
            sink,
            check=check,
            progress=progress,
            limiter=TokenBucket(limit),
            stall_seconds=stall_seconds,
        ).run(wanted)


def data(source: Source) -> list[Extent]:
    """Return all but what reads as zeroes."""
    return [
        Extent(one.offset, one.length, zero=False) for one in source.statuses() if not one.flags[0] & ZERO
    ]


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
    assert copied == Copied(sum(extent.length for extent in wanted), 0)
    assert copied.copied_bytes < len(content)
    assert told == sorted(told)
    assert told[-1] == copied.copied_bytes
    end(target)
    assert content_of(path) == content


def end(export) -> None:
    export.process.terminate()
    assert export.process.wait(20) == 0


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
        wanted = [
            Extent(status.offset, status.length, bool(status.flags[0] & ZERO))
            for status in source.statuses()
            if status.flags[1] & DIRTY
        ]
        copied = run(source, target, wanted)
    end(target)
    end(export)
    assert copied.zero_bytes > 0
    assert copied.copied_bytes > 0
    assert copied.copied_bytes + copied.zero_bytes == sum(extent.length for extent in wanted)
    assert content_of(layer) == content_of(disk) != before
    clean = bytearray(b"\1" * len(before))
    for extent in wanted:
        clean[extent.offset : extent.end] = bytes(extent.length)
    after = (tmp_path / "disk.raw").read_bytes()
    assert all(after[place] == before[place] for place in range(size) if clean[place])


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


def test_read_zeroes_are_stored_as_zeroes_and_take_no_room(serve, tmp_path):
    (tmp_path / "disk").write_bytes(bytes(8 * MIB))
    path = target_image(tmp_path, 8 * MIB)
    export, target = serve(raw_node(tmp_path / "disk")), serve(qcow2_node(path), writable=True)
    with closing(source_of(export)) as source:
        run(source, target, [Extent(0, 8 * MIB, zero=False)])
    end(target)
    assert path.stat().st_blocks * 512 < MIB


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
        run(source, target, [Extent(0, 8 * MIB, zero=False)])
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
        stream(source, out.fileno(), check=lambda: None, progress=lambda _done: None)
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
        stream(source, out.fileno(), check=lambda: None, progress=lambda _done: None)


def test_a_server_that_dies_in_mid_copy_is_an_error(serve, tmp_path):
    (tmp_path / "disk").write_bytes(noise(32 * MIB))
    path = target_image(tmp_path, 32 * MIB)
    export, target = serve(raw_node(tmp_path / "disk")), serve(qcow2_node(path), writable=True)

    def kill(done):
        export.process.kill()

    with closing(source_of(export)) as source, pytest.raises(ReadFailed):
        run(source, target, [Extent(0, 32 * MIB, zero=False)], progress=kill, limit=16 * MIB)


def test_a_target_that_dies_in_mid_copy_is_a_write_error(serve, tmp_path):
    (tmp_path / "disk").write_bytes(noise(32 * MIB))
    path = target_image(tmp_path, 32 * MIB)
    export, target = serve(raw_node(tmp_path / "disk")), serve(qcow2_node(path), writable=True)

    def kill(done):
        target.process.kill()

    with closing(source_of(export)) as source, pytest.raises(WriteFailed):
        run(source, target, [Extent(0, 32 * MIB, zero=False)], progress=kill, limit=16 * MIB)


def test_a_source_that_stalls_is_given_up_in_time(serve, tmp_path):
    (tmp_path / "disk").write_bytes(noise(4 * MIB))
    path = target_image(tmp_path, 4 * MIB)
    export, target = serve(raw_node(tmp_path / "disk")), serve(qcow2_node(path), writable=True)
    source = source_of(export, stall_seconds=1.0)
    export.freeze()
    begun = time.monotonic()
    with pytest.raises(ReadFailed, match="no byte"):
        run(source, target, [Extent(0, 4 * MIB, zero=False)], stall_seconds=1.0)
    source.close()
    assert time.monotonic() - begun < 10


def test_a_target_that_stalls_is_a_write_error(serve, tmp_path):
    (tmp_path / "disk").write_bytes(noise(4 * MIB))
    path = target_image(tmp_path, 4 * MIB)
    export, target = serve(raw_node(tmp_path / "disk")), serve(qcow2_node(path), writable=True)

    def freeze_soon(done):
        if done and not frozen:
            frozen.append(done)
            target.freeze()

    frozen: list[int] = []
    wanted = [Extent(0, 4 * MIB, zero=False)]
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
        run(source, target, [Extent(0, 4 * MIB, zero=False)], check=check)
    assert asked[-1] < 1.5
    assert len(asked) >= 3
    begun = time.monotonic()
    source.close()
    assert time.monotonic() - begun < 5


def test_the_rate_limit_is_kept(serve, tmp_path):
    (tmp_path / "disk").write_bytes(noise(8 * MIB))
    path = target_image(tmp_path, 8 * MIB)
    export, target = serve(raw_node(tmp_path / "disk")), serve(qcow2_node(path), writable=True)
    begun = time.monotonic()
    with closing(source_of(export)) as source:
        run(source, target, [Extent(0, 8 * MIB, zero=False)], limit=8 * MIB)
    assert 0.7 < time.monotonic() - begun < 5


def test_memory_is_bounded_by_the_requests_in_flight(serve, tmp_path, monkeypatch):
    (tmp_path / "disk").write_bytes(noise(32 * MIB))
    path = target_image(tmp_path, 32 * MIB)
    export, target = serve(raw_node(tmp_path / "disk")), serve(qcow2_node(path), writable=True)
    most = 0

    class Watched(copies._RunningCopy):
        def _advance(self) -> bool:
            nonlocal most
            most = max(most, sum(chunk.extent.length for chunk in self._in_flight))
            return super()._advance()

    monkeypatch.setattr(copies, "_RunningCopy", Watched)
    with closing(source_of(export)) as source:
        run(source, target, [Extent(0, 32 * MIB, zero=False)])
    assert MIB < most <= copies.DEPTH * MIB


def test_a_full_target_is_a_write_error_that_says_so(serve, tmp_path, small_file_system):
    (tmp_path / "disk").write_bytes(noise(16 * MIB))
    path = target_image(small_file_system, 16 * MIB)
    export, target = serve(raw_node(tmp_path / "disk")), serve(qcow2_node(path), writable=True)
    try:
        with closing(source_of(export)) as source, pytest.raises(WriteFailed, match="No space left"):
            run(source, target, [Extent(0, 16 * MIB, zero=False)])
    finally:
        target.process.kill()
        target.process.wait(10)


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
    assert time.monotonic() - begun < 10


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
        run(source, target, [Extent(0, len(content), zero=False)])
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
    """A sink that is no NBD server: a write ends only when it is polled, and five end before the first."""

    def __init__(self, size: int) -> None:
        self.content = bytearray(b"\xff" * size)
        self.first: Extent | None = None
        self.waiting: list[tuple[Extent, memoryview | None]] = []
        self.ended: list[Extent] = []
        self._wakeup = Wakeup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._wakeup.__exit__(*raised)

    @property
    def pollables(self):
        return (self,)

    def events(self) -> int:
        return self._wakeup.events()

    def fileno(self) -> int:
        return self._wakeup.fileno()

    def on_events(self, events: int) -> None:
        self._wakeup.on_events(events)
        if len(self.waiting) == 1 and len(self.ended) < 5:
            return
        extent, content = self.waiting.pop()
        self.content[extent.offset : extent.end] = bytes(extent.length) if content is None else content
        self.ended.append(extent)
        if self.waiting:
            self._wakeup.set()

    def write(self, extent: Extent, content: memoryview):
        return self._start(extent, content)

    def zero(self, extent: Extent):
        return self._start(extent, None)

    def _start(self, extent: Extent, content: memoryview | None):
        self.first = self.first or extent
        self.waiting.append((extent, content))
        self._wakeup.set()
        return lambda: extent in self.ended

    def flush(self, seconds: float) -> None:
        raise AssertionError("whoever opened the sink flushes it")


def test_any_sink_can_be_written_to_in_any_order(serve, tmp_path):
    """The seam holds: a copy asks nothing of NBD, and reuses no buffer of a write that has not ended."""
    content = noise(24 * MIB)
    (tmp_path / "disk").write_bytes(content)
    export = serve(raw_node(tmp_path / "disk"))
    wanted = [Extent(0, 20 * MIB, zero=False), Extent(20 * MIB, MIB, zero=True), Extent(22 * MIB, MIB, False)]
    with Memory(len(content)) as sink, closing(source_of(export, connections=2)) as source:
        copied = Copy(source, sink, check=lambda: None).run(wanted)
    expected = bytearray(b"\xff" * len(content))
    expected[: 20 * MIB] = content[: 20 * MIB]
    expected[20 * MIB : 21 * MIB] = bytes(MIB)
    expected[22 * MIB : 23 * MIB] = content[22 * MIB : 23 * MIB]
    assert sink.content == expected
    assert copied == Copied(21 * MIB, MIB)
    assert sink.first is not None
    assert sink.ended.index(sink.first) >= 5


def test_a_write_that_any_sink_fails_ends_the_copy(serve, tmp_path):
    (tmp_path / "disk").write_bytes(noise(8 * MIB))
    export = serve(raw_node(tmp_path / "disk"))

    class Full(Memory):
        def _start(self, extent: Extent, content: memoryview | None):
            def has_ended() -> bool:
                raise WriteFailed("no space left on device")

            return has_ended

    with (
        Full(8 * MIB) as sink,
        closing(source_of(export)) as source,
        pytest.raises(WriteFailed, match="space"),
    ):
        Copy(source, sink, check=lambda: None).run([Extent(0, 8 * MIB, zero=False)])


def test_a_sink_that_stalls_is_a_write_error(serve, tmp_path):
    (tmp_path / "disk").write_bytes(noise(2 * MIB))
    export = serve(raw_node(tmp_path / "disk"))

    class Stalled(Memory):
        def on_events(self, events: int) -> None:
            self._wakeup.on_events(events)

    with (
        Stalled(2 * MIB) as sink,
        closing(source_of(export)) as source,
        pytest.raises(WriteFailed, match=r"no byte moved for 0\.5 s"),
    ):
        Copy(source, sink, check=lambda: None, stall_seconds=0.5).run([Extent(0, 2 * MIB, zero=False)])
