# SPDX-License-Identifier: GPL-2.0-or-later
import errno
import fcntl
import gc
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from backupctl.system import direct_io
from backupctl.system.direct_io import DirectReader, DirectWriter, aligned
from backupctl.transfer import batch

MIB = 1 << 20
PAGE = mmap.PAGESIZE


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def refusing(monkeypatch) -> list[int]:
    """A file system that opens for direct I/O, and refuses transfers while it is on; lists the refusals."""
    refused: list[int] = []

    def refuse(real):
        def moved(descriptor, parts, offset):
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                refused.append(offset)
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(descriptor, parts, offset)

        return moved

    monkeypatch.setattr(direct_io.os, "pwritev", refuse(os.pwritev))
    monkeypatch.setattr(direct_io.os, "preadv", refuse(os.preadv))
    return refused


def pattern(size: int, seed: int = 1) -> memoryview:
    memory = aligned(size)
    memory[:] = np.random.default_rng(seed).bytes(size)
    return memory


def test_memory_begins_at_a_page_and_holds_zeroes():
    memory = aligned(3 * PAGE)
    assert np.frombuffer(memory, np.uint8).ctypes.data % PAGE == 0
    assert bytes(memory) == bytes(3 * PAGE)


def test_what_is_written_in_parts_is_read_in_other_parts(file):
    memory, read = pattern(MIB), aligned(MIB)
    writer, reader = DirectWriter(file), DirectReader(file)
    writer.write([memory[: 3 * PAGE], memory[:0], memory[3 * PAGE :]], 5 * PAGE)
    assert reader.read([read[: 64 * PAGE], read[64 * PAGE :]], 5 * PAGE) == MIB
    assert read == memory
    assert os.fstat(file).st_size == MIB + 5 * PAGE


def test_the_file_goes_past_the_page_cache_and_the_first_descriptor_through_it(file):
    writer, reader = DirectWriter(file), DirectReader(file)
    if not writer.direct:
        pytest.skip("no direct I/O on the file system of temporary files")
    writer.write([pattern(PAGE)], 0)
    reader.read([aligned(PAGE)], 0)
    assert writer.direct
    assert reader.direct
    assert len(os.pread(file, 13, 5)) == 13  # neither aligned nor a whole block


def test_a_read_ends_at_the_end_of_the_file(file):
    os.pwrite(file, b"x" * (PAGE + 100), 0)
    read = aligned(3 * PAGE)
    assert DirectReader(file).read([read], 0) == PAGE + 100
    assert bytes(read[: PAGE + 101]) == b"x" * (PAGE + 100) + b"\0"
    assert DirectReader(file).read([read], 8 * PAGE) == 0


def test_what_is_not_aligned_is_written_through_the_cache(file):
    writer = DirectWriter(file)
    writer.write([pattern(PAGE)], 0)
    writer.write([memoryview(b"short")], PAGE)
    writer.write([memoryview(b"odd")], 3)
    assert os.pread(file, 3, 3) == b"odd"
    assert os.pread(file, 9, PAGE) == b"short"


def test_a_file_system_that_refuses_at_the_first_transfer(file, refusing):
    memory, read = pattern(MIB), aligned(MIB)
    writer, reader = DirectWriter(file), DirectReader(file)
    for number in range(100):
        writer.write([memory], number * MIB)
    assert reader.read([read], 99 * MIB) == MIB
    assert read == memory
    assert refusing == [0, 99 * MIB]
    assert not writer.direct
    assert not reader.direct


def test_a_file_system_that_refuses_at_the_opening(file, monkeypatch):
    real = os.open

    def refuse(path, flags, *more):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *more)

    monkeypatch.setattr(direct_io.os, "open", refuse)
    memory, read = pattern(MIB), aligned(MIB)
    DirectWriter(file).write([memory], 0)
    assert DirectReader(file).read([read], 0) == MIB
    assert read == memory


def test_several_threads_are_refused_at_once_and_all_go_on(file, refusing):
    writer, ready = DirectWriter(file), threading.Barrier(8)

    def write(number: int) -> None:
        memory = pattern(MIB, number)
        ready.wait()
        writer.write([memory], number * MIB)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refusing
    for number in range(8):
        assert os.pread(file, MIB, number * MIB) == bytes(pattern(MIB, number))


@pytest.mark.parametrize("step", [PAGE, 3 * PAGE, 100])
def test_a_transfer_that_does_a_part_is_continued(file, monkeypatch, step):
    real_write, real_read = os.pwritev, os.preadv

    def some(parts):
        return [parts[0][:step]]

    monkeypatch.setattr(
        direct_io.os, "pwritev", lambda file, parts, offset: real_write(file, some(parts), offset)
    )
    monkeypatch.setattr(
        direct_io.os, "preadv", lambda file, parts, offset: real_read(file, some(parts), offset)
    )
    memory, read = pattern(32 * PAGE), aligned(32 * PAGE)
    DirectWriter(file).write([memory[: 5 * PAGE], memory[5 * PAGE :]], PAGE)
    assert DirectReader(file).read([read[:PAGE], read[PAGE:]], PAGE) == 32 * PAGE
    assert read == memory


def test_a_write_of_nothing_is_an_error_and_not_a_loop(file, monkeypatch):
    monkeypatch.setattr(direct_io.os, "pwritev", lambda *_: 0)
    with pytest.raises(OSError, match="Input/output error"):
        DirectWriter(file).write([pattern(PAGE)], 0)


def test_an_error_of_the_disk_is_not_tried_again(file, monkeypatch):
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(direct_io.os, "pwritev", fail)
    with pytest.raises(OSError, match="Input/output error"):
        DirectWriter(file).write([pattern(PAGE)], 0)
    assert len(calls) == 1


def test_space_is_set_aside_ahead_and_given_back(file):
    writer = DirectWriter(file)
    writer.set_aside(MIB)
    ahead = os.fstat(file).st_size
    if not ahead:
        pytest.skip("the file system of temporary files sets nothing aside")
    assert MIB < ahead <= 300 * MIB
    writer.set_aside(2 * MIB)
    assert os.fstat(file).st_size == ahead
    writer.set_aside(ahead + 1)
    assert ahead < os.fstat(file).st_size <= 2 * ahead
    writer.write([pattern(MIB)], 0)
    writer.cut(MIB)
    assert os.fstat(file).st_size == MIB
    assert os.fstat(file).st_blocks * 512 <= MIB + 64 * 1024


def test_no_space_is_set_aside_that_others_may_need(file, monkeypatch):
    monkeypatch.setattr(direct_io, "_free_bytes", lambda _: 255 * MIB)
    writer = DirectWriter(file)
    writer.set_aside(MIB)
    assert os.fstat(file).st_size == 0
    monkeypatch.setattr(direct_io, "_free_bytes", lambda _: 1 << 40)
    writer.set_aside(2 * MIB)  # space that others freed is seen at the next step
    assert os.fstat(file).st_size == 0
    writer.set_aside(100 * MIB)
    assert os.fstat(file).st_size > 100 * MIB


def test_space_that_was_half_set_aside_is_given_back(file, monkeypatch):
    class Libc:
        @staticmethod
        def fallocate64(descriptor, _mode, offset, _length):
            os.posix_fallocate(descriptor, offset.value, 2 * MIB)  # some of it, as ext4 does
            return -1

    monkeypatch.setattr(direct_io, "_LIBC", Libc)
    monkeypatch.setattr(direct_io.ctypes, "get_errno", lambda: errno.ENOSPC)
    writer = DirectWriter(file)
    writer.set_aside(MIB)
    assert os.fstat(file).st_size == MIB
    writer.set_aside(1 << 40)  # not tried again: it would take what others under the same quota need
    assert os.fstat(file).st_size == MIB


def test_a_full_file_system_is_reported(small_file_system):
    descriptor = os.open(small_file_system / "file", os.O_RDWR | os.O_CREAT, 0o600)
    memory = pattern(MIB)
    with DirectWriter(descriptor) as writer:
        for number in range(3):
            writer.set_aside((number + 1) * MIB)
            writer.write([memory], number * MIB)
        with pytest.raises(OSError, match="No space left on device"):
            writer.write([memory, memory], 3 * MIB)
    os.close(descriptor)


def test_a_write_that_hung_does_not_go_on_in_another_file(tmp_path, file, monkeypatch):
    """Whoever gave up closes the file, and its number is given to the next one that is opened."""
    real, hangs, goes_on = os.pwritev, threading.Event(), threading.Event()

    def hang(descriptor, parts, offset):
        if not hangs.is_set():
            hangs.set()
            real(descriptor, [parts[0][:PAGE]], offset)
            goes_on.wait()
            return PAGE
        return real(descriptor, parts, offset)

    monkeypatch.setattr(direct_io.os, "pwritev", hang)
    given = os.dup(file)
    writer = DirectWriter(given)
    thread = threading.Thread(target=writer.write, args=([pattern(MIB)], 0))
    thread.start()
    hangs.wait()
    os.close(given)
    writer.close()
    others = [os.open(tmp_path / f"other{number}", os.O_RDWR | os.O_CREAT, 0o600) for number in range(8)]
    goes_on.set()
    thread.join()
    assert given in others
    assert all(os.fstat(other).st_size == 0 for other in others)
    assert os.pread(file, MIB, 0) == bytes(pattern(MIB))
    for other in others:
        os.close(other)


def test_its_descriptor_is_closed_once_and_used_no_more(file):
    gc.collect()
    before = os.listdir("/proc/self/fd")
    with DirectWriter(file) as writer:
        assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    assert os.listdir("/proc/self/fd") == before
    writer.close()
    for call in (writer.sync, lambda: writer.cut(0), lambda: writer.write([pattern(PAGE)], 0)):
        with pytest.raises(OSError, match="Bad file descriptor"):
            call()


def test_its_descriptor_is_closed_with_the_last_holder(file):
    gc.collect()
    before = os.listdir("/proc/self/fd")
    reader = DirectReader(file)
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    del reader
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages")
def test_memory_for_batches_is_of_huge_pages_where_the_kernel_has_them():
    """A batch is then pinned as one page for direct I/O, not as 256."""

    buffers = batch.new_buffers()
    assert {len(one) for one in buffers} == {batch.BATCH_BYTES}
    address = np.frombuffer(buffers[0], np.uint8).ctypes.data
    flags: list[str] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *words = line.split()
        if "-" in name and not name.endswith(":"):
            first, stop = (int(limit, 16) for limit in name.split("-"))
        elif name == "VmFlags:" and first <= address < stop:
            flags = words
    assert "hg" in flags
