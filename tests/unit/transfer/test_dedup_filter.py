# SPDX-License-Identifier: GPL-2.0-or-later
import json
import os
import subprocess
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from backupctl.digests import hashing
from backupctl.digests.clusters import CLUSTER_BYTES, EffectiveContent
from backupctl.digests.record_table import RecordTable
from backupctl.transfer.copy import Copied, Copy
from backupctl.transfer.dedup_filter import DedupFilter
from backupctl.transfer.reader import NbdReader
from backupctl.transfer.sink import open_nbd_sink
from backupctl.transfer.source import Source
from fixtures.pieces import of_piece, of_range
from tests.unit.transfer.conftest import qcow2_node, raw_node, tool

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


@given(
    st.lists(DATA, min_size=1, max_size=16),
    st.lists(DATA, min_size=16, max_size=16),
    st.lists(st.integers(0, 15), min_size=1, unique=True),
    st.booleans(),
)
def test_what_passes_is_what_differs_from_the_layers_below(kinds, before, places, known_zero):
    kinds = [b"\0" if known_zero else kind for kind in kinds]
    numbers = np.array(sorted(place for place in places if place < len(kinds)), np.uint64)
    if not len(numbers):
        return
    content = content_of([kinds[number] for number in numbers.tolist()])
    below = of_piece(0, memoryview(content_of(before)))
    table = RecordTable()
    dedup = DedupFilter(EffectiveContent([(below, 16 * CLUSTER_BYTES)], 16 * CLUSTER_BYTES), table)
    wanted = dedup(hashing.of_content(numbers, None if known_zero else memoryview(content)))
    different = [number for number in numbers.tolist() if kinds[number] != before[number]]
    zero = [number for number in different if kinds[number] == b"\0"]
    assert numbers[wanted.data | wanted.zero].tolist() == different
    assert numbers[wanted.zero].tolist() == zero
    assert not (wanted.data & wanted.zero).any()
    every = of_piece(0, memoryview(content_of(kinds)))
    assert kept(table) == every[different].tolist()
    assert table.count == len(different)
    assert dedup.unchanged_bytes == (len(numbers) - len(different)) * CLUSTER_BYTES


def test_a_copy_through_the_filter_stores_only_what_is_new(serve, tmp_path):
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
    table = RecordTable()
    below = EffectiveContent([(of_piece(0, memoryview(before)), len(before))], len(now))
    dedup = DedupFilter(below, table)
    with (
        closing(Source.connect([source_export.address] * 2, source_export.name)) as source,
        open_nbd_sink(target.address, target.name) as sink,
    ):
        wanted = [of_range(0, 41, zero=False)]
        copied = Copy(NbdReader(source), sink, check=lambda: None, filter_records=dedup).run(wanted)
    target.process.terminate()
    assert target.process.wait(60) == 0
    assert copied == Copied(len(now), 0)
    assert dedup.unchanged_bytes == 38 * CLUSTER_BYTES
    assert stored(layer) == {5, 20, 40} == {cluster for cluster, _, _ in kept(table)}
    tool("qemu-img", "convert", "-O", "raw", layer, tmp_path / "after.raw")
    assert (tmp_path / "after.raw").read_bytes()[: len(now)] == now


def test_read_zeroes_are_stored_as_zeroes_and_take_no_room(serve, tmp_path):
    (tmp_path / "disk").write_bytes(bytes(128 * CLUSTER_BYTES))
    (tmp_path / "parent.raw").write_bytes(os.urandom(128 * CLUSTER_BYTES))
    layer, parent = tmp_path / "layer.qcow2", tmp_path / "parent.raw"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", parent, layer)
    below = EffectiveContent([(of_piece(0, memoryview(parent.read_bytes())), 128 * CLUSTER_BYTES)], 8 << 20)
    export = serve(raw_node(tmp_path / "disk"))
    target = serve({**qcow2_node(layer), "backing": raw_node(parent)}, writable=True)
    with (
        closing(Source.connect([export.address], export.name)) as source,
        open_nbd_sink(target.address, target.name) as sink,
    ):
        dedup = DedupFilter(below, RecordTable())
        wanted = [of_range(0, 128, zero=False)]
        Copy(NbdReader(source), sink, check=lambda: None, filter_records=dedup).run(wanted)
    target.process.terminate()
    assert target.process.wait(60) == 0
    assert layer.stat().st_blocks * 512 < 1 << 20
    tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", tmp_path / "disk", layer)


def kept(table: RecordTable) -> list[tuple[int, int, int]]:
    return [record for part in table.parts() for record in part.tolist()]


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
