# SPDX-License-Identifier: GPL-2.0-or-later
"""Where our own reader of qcow2 tables finds what, compared with `qemu-img map`."""

import json
import subprocess
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backupctl.images import create
from backupctl.images.open_image import OpenImage
from backupctl.images.qcow2_tables import Tables
from backupctl.sizes import CLUSTER_BYTES
from fixtures import qemu_check
from tests.unit.images.test_qcow2_writer import disks, make

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
Found = dict[int, int]
"""Cluster's number to the place of its data; 0: zeroes."""


def tool(*arguments: object) -> str:
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def alone(path: Path) -> str:
    """The name by which QEMU's tools open an image without those below it."""
    return f"json:{json.dumps({'driver': 'qcow2', 'file.filename': str(path), 'backing': None})}"


def by_io(path: Path, *commands: str) -> None:
    """Have QEMU write into an image, without those below it."""
    tool("qemu-io", alone(path), *(part for command in commands for part in ("-c", command)))


def by_qemu(path: Path) -> Found:
    """What QEMU finds in an image, without those below it."""
    found = {}
    for one in json.loads(tool("qemu-img", "map", "--output=json", alone(path))):
        if not one["present"]:
            continue
        first, end = one["start"] // CLUSTER_BYTES, -(-(one["start"] + one["length"]) // CLUSTER_BYTES)
        for number in range(first, end):
            found[number] = one["offset"] + (number - first) * CLUSTER_BYTES if one["data"] else 0
    return found


def by_us(path: Path) -> Found:
    with OpenImage.open(path) as image:
        tables = Tables(image)
        found = {}
        for window in tables.windows():
            assert not window.lost.any()
            assert not (window.zero & (window.offset != 0)).any()
            for at in np.flatnonzero(window.zero | (window.offset != 0)).tolist():
                found[window.first + at] = int(window.offset[at])
        return found


numbers_near = st.one_of(st.integers(0, 40), st.integers(8180, 8200), st.integers(0, 20000))
actions = st.one_of(
    st.tuples(st.sampled_from(["write -P 7", "write -z", "write -zu", "discard"]), numbers_near),
    st.tuples(st.just("resize"), st.integers(8000, 30000)),
)


def play(path: Path, size: int, played: list[tuple[str, int]]) -> None:
    """Have QEMU write one or a few clusters at a time, and resize the image now and then."""
    waiting = []
    for action, number in played:
        if action == "resize":
            by_io(path, *waiting)
            waiting, size = [], number * CLUSTER_BYTES + number % 3 * 512
            tool("qemu-img", "resize", "--shrink", alone(path), size)
        elif number < size // CLUSTER_BYTES:
            length = min(CLUSTER_BYTES * (1 + number % 3), size - number * CLUSTER_BYTES)
            waiting.append(f"{action} {number * CLUSTER_BYTES} {length // 512 * 512}")
    by_io(path, *waiting)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.booleans(), disks(), st.lists(actions, max_size=25))
def test_what_qemu_wrote_and_resized_is_found_where_qemu_finds_it(tmp_path, ours, disk, played):
    """In an image of our writer, and in one of QEMU's: as a merge in place and a resize leave them."""
    size, kinds, backing = disk
    path, link = tmp_path / "image", "below" if backing else None
    path.unlink(missing_ok=True)
    if ours:
        make(path, size, kinds, link)
    else:
        create.create_layer(path, size, link)
    play(path, size, played)
    assert by_us(path) == by_qemu(path)
    with OpenImage.open(path) as image:
        found = qemu_check.check(image)
    assert (found.errors, found.leaks) == (0, 0)


def test_what_was_written_through_a_server_is_found_where_qemu_finds_it(two_points):
    builder, _ = two_points
    for point in builder.directory.points():
        path = point.path / "vda.qcow2"
        assert by_us(path) == by_qemu(path) != {}


def test_a_disk_of_64_tib_is_read_by_what_it_stores(tmp_path):
    last = (64 << 40) // CLUSTER_BYTES - 1
    make(tmp_path / "image", 64 << 40, {0: True, last // 2: False, last: True})
    assert by_us(tmp_path / "image") == by_qemu(tmp_path / "image") == {0: 65536, last // 2: 0, last: 131072}


def test_a_window_may_begin_and_end_anywhere(tmp_path):
    kinds = {number: number % 2 == 0 for number in (0, 3, 8191, 8192, 8195, 20000)}
    make(tmp_path / "image", 20001 * CLUSTER_BYTES - 512, kinds)
    whole = by_us(tmp_path / "image")
    with OpenImage.open(tmp_path / "image") as image:
        tables = Tables(image)
        assert tables.clusters == 20001
        for first, count in [
            (0, 20001),
            (3, 1),
            (8191, 2),
            (8190, 12000),
            (20000, 16),
            (20001, 1),
            (50000, 9),
        ]:
            window = tables.window(first, count)
            assert len(window.offset) == max(min(count, 20001 - first), 0)
            stored = (window.zero | (window.offset != 0)).nonzero()[0] + first
            assert stored.tolist() == sorted(number for number in whole if first <= number < first + count)
