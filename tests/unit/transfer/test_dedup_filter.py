# SPDX-License-Identifier: GPL-2.0-or-later
import json
import os
import subprocess
import tracemalloc
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from backupctl.digests.clusters import CLUSTER_BYTES, EffectiveContent
from backupctl.digests.hashing import of_piece
from backupctl.transfer.cluster_map import ClusterMap
from backupctl.transfer.copy import Copied, Copy
from backupctl.transfer.dedup_filter import DedupFilter
from backupctl.transfer.extents import Extent
from backupctl.transfer.sink import open_nbd_sink
from backupctl.transfer.source import Source
from tests.unit.transfer.conftest import qcow2_node, raw_node, tool

UNIT = CLUSTER_BYTES // 4
DATA = st.sampled_from([b"\0", b"a", b"b"])


def content_of(kinds: list[bytes]) -> bytes:
    return b"".join(kind * CLUSTER_BYTES for kind in kinds)


def test_a_digest_is_blake3_of_the_cluster_and_zero_for_zeroes():
    data = os.urandom(CLUSTER_BYTES)
    found = of_piece(3 * CLUSTER_BYTES, memoryview(data + bytes(CLUSTER_BYTES) + b"tail"))
    assert found["cluster"].tolist() == [3, 4, 5]
    raw = [bytes(record)[8:] for record in found]
    assert raw[0] == blake3(data).digest(16)
    assert raw[1] == bytes(16)
    assert raw[2] == blake3(b"tail".ljust(CLUSTER_BYTES, b"\0")).digest(16)


@pytest.mark.parametrize("length", [CLUSTER_BYTES, 512])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_one_byte_tells_a_cluster_from_zeroes(length, place):
    data = bytearray(length)
    assert bytes(of_piece(0, memoryview(data))[0])[8:] == bytes(16)
    data[place] = 1
    assert bytes(of_piece(0, memoryview(data))[0])[8:] == blake3(data.ljust(CLUSTER_BYTES, b"\0")).digest(16)


@given(st.lists(DATA, min_size=1, max_size=16), st.lists(DATA, min_size=16, max_size=16), st.booleans())
def test_what_passes_is_what_differs_from_the_layers_below(kinds, before, known_zero):
    if known_zero:
        kinds = [b"\0"] * len(kinds)
    content = content_of(kinds)
    below = of_piece(0, memoryview(content_of(before)))
    recorder = DedupFilter(EffectiveContent([(below, 16 * CLUSTER_BYTES)], len(content)))
    passed = recorder(Extent(0, len(content), known_zero), None if known_zero else memoryview(content))
    after = bytearray(content_of(before[: len(kinds)]))
    for extent in passed:
        new = bytes(extent.length) if extent.zero else content[extent.offset : extent.end]
        assert new == content[extent.offset : extent.end]
        after[extent.offset : extent.end] = new
    assert bytes(after) == content
    different = [number for number, kind in enumerate(kinds) if kind != before[number]]
    assert kept(recorder) == of_piece(0, memoryview(content))[different].tolist()
    assert recorder.count() == len(different)
    assert recorder.unchanged_bytes == len(content) - len(different) * CLUSTER_BYTES


def test_a_copy_through_a_recorder_stores_only_what_is_new(serve, tmp_path):
    """Half of the clusters are as in the parent, one became zeroes, the disk's tail is short."""
    before = os.urandom(40 * CLUSTER_BYTES + 1024)
    now = bytearray(before)
    now[5 * CLUSTER_BYTES : 6 * CLUSTER_BYTES] = bytes(CLUSTER_BYTES)
    now[20 * CLUSTER_BYTES + 7] ^= 1
    now[-1] ^= 1
    (tmp_path / "parent.raw").write_bytes(before)
    (tmp_path / "disk.raw").write_bytes(now)
    layer = tmp_path / "layer.qcow2"
    parent = tmp_path / "parent.raw"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", parent, layer, len(now))
    source_export = serve(raw_node(tmp_path / "disk.raw"))
    target = serve({**qcow2_node(layer), "backing": raw_node(parent)}, writable=True)
    recorder = DedupFilter(EffectiveContent([(of_piece(0, memoryview(before)), len(before))], len(now)))
    wanted = [Extent(0, len(now), zero=False)]
    with (
        closing(Source.connect([source_export.address] * 2, source_export.name)) as source,
        open_nbd_sink(target.address, target.name) as sink,
    ):
        copied = Copy(source, sink, check=lambda: None, filter_chunk=recorder).run(wanted)
    target.process.terminate()
    assert target.process.wait(20) == 0
    assert copied == Copied(len(now), 0)
    assert stored(layer) == {5, 20, 40} == {cluster for cluster, _, _ in kept(recorder)}
    tool("qemu-img", "convert", "-O", "raw", layer, tmp_path / "after.raw")
    assert (tmp_path / "after.raw").read_bytes()[: len(now)] == now


def kept(recorder: DedupFilter) -> list[tuple[int, int, int]]:
    with closing(recorder):
        return [record for part in recorder.parts() for record in part.tolist()]


def stored(layer: Path) -> set[int]:
    """Return the clusters that a layer itself holds."""
    done = subprocess.run(
        ["qemu-img", "map", "--output=json", str(layer)], check=True, capture_output=True, timeout=60
    )
    return {
        number
        for run in json.loads(done.stdout)
        if run["depth"] == 0
        for number in range(
            run["start"] // CLUSTER_BYTES, -(-(run["start"] + run["length"]) // CLUSTER_BYTES)
        )
    }


PIECES = st.lists(st.tuples(st.integers(0, 9 * UNIT), st.integers(1, 40 * UNIT), st.booleans()), max_size=12)


@given(PIECES, st.integers(1, 60 * CLUSTER_BYTES))
def test_marks_cover_all_that_was_named_and_call_zero_only_what_is(ranges, size):
    marks, named, zero, offset = ClusterMap(size), set(), set(), 0
    for gap, length, is_zero in ranges:
        offset += gap
        end = min(offset + length, size)
        if offset >= end:
            break
        (marks.zero if is_zero else marks.data)(offset, end - offset)
        named |= set(range(offset // CLUSTER_BYTES, -(-end // CLUSTER_BYTES)))
        stop = -(-end // CLUSTER_BYTES) if end == size else end // CLUSTER_BYTES
        if is_zero:
            zero |= set(range(-(-offset // CLUSTER_BYTES), stop))
        offset = end
    found = list(marks.extents())
    assert all(one.end <= two.offset for one, two in pairwise(found))
    assert clusters_of(found) == named
    assert clusters_of(extent for extent in found if extent.zero) == zero
    assert all(extent.end <= size for extent in found)
    assert marks.marked_bytes() == sum(extent.length for extent in found)


def clusters_of(some) -> set[int]:
    return {
        number
        for extent in some
        for number in range(extent.offset // CLUSTER_BYTES, -(-extent.end // CLUSTER_BYTES))
    }


def test_a_disk_of_a_tebibyte_in_fragments_costs_a_byte_for_each_cluster():
    size = 1 << 40
    tracemalloc.start()
    try:
        marks = ClusterMap(size)
        for offset in range(0, size, 1 << 24):
            marks.data(offset, 4096)
        assert marks.marked_bytes() == (size >> 24) * CLUSTER_BYTES
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally:
        tracemalloc.stop()
