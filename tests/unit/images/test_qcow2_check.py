# SPDX-License-Identifier: GPL-2.0-or-later
"""Our own check of an image's tables, compared with `qemu-img check`."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backupctl.errors import DamageFound, RepositoryUnreadable
from backupctl.images import qcow2_check, qcow2_tables
from backupctl.images.open_image import OpenImage
from backupctl.images.qcow2_check import Soundness
from backupctl.images.qcow2_format import COMPRESSED, COPIED
from backupctl.images.qcow2_tables import Tables
from backupctl.sizes import CLUSTER_BYTES
from fixtures import qemu_check
from tests.unit.images.test_qcow2_writer import make

# An image of these: header, 3 clusters of data, 2 L2 tables, L1, table of reference counts, their block.
SIZE = 9000 * CLUSTER_BYTES
KINDS = {0: True, 2: True, 3: False, 8200: True}
DATA, L2, L1, REFCOUNTS, BLOCK, END = (number * CLUSTER_BYTES for number in (1, 4, 6, 7, 8, 9))
ENTRY_2 = L2 + 2 * 8


@pytest.fixture
def image(tmp_path: Path) -> Path:
    make(tmp_path / "image", SIZE, KINDS)
    assert (tmp_path / "image").stat().st_size == END
    return tmp_path / "image"


def both(path: Path) -> tuple[Soundness, Soundness]:
    """What we find, and what QEMU does."""
    with OpenImage.open(path) as image:
        return qcow2_check.check_tables(image), qemu_check.check(image)


def put(path: Path, offset: int, value: int, kind: str = ">Q") -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack(kind, value))


def leak(path: Path) -> None:
    """Add two clusters that nothing uses, one of them with a reference count."""
    with path.open("r+b") as file:
        file.truncate(END + 2 * CLUSTER_BYTES)
    put(path, BLOCK + 9 * 2, 1, ">H")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "nothing": lambda _: None,
    "leak": leak,
    "used cluster has no reference": lambda path: put(path, BLOCK + 2 * 2, 0, ">H"),
    "used cluster has two references": lambda path: put(path, BLOCK + 2 * 2, 2, ">H"),
    "L2 table has no reference": lambda path: put(path, BLOCK + 4 * 2, 0, ">H"),
    "header has no reference": lambda path: put(path, BLOCK, 0, ">H"),
    "block of references is missing": lambda path: put(path, REFCOUNTS, 0),
    "block of references outside": lambda path: put(path, REFCOUNTS, 1 << 40),
    "block of references twice": lambda path: put(path, REFCOUNTS + 8, BLOCK),
    "entry of the references' table reserved": lambda path: put(path, REFCOUNTS, BLOCK | 1),
    "cluster is not stored any more": lambda path: put(path, ENTRY_2, 0),
    "cluster is not marked as copied": lambda path: put(path, ENTRY_2, DATA + CLUSTER_BYTES),
    "cluster is unaligned": lambda path: put(path, ENTRY_2, DATA + CLUSTER_BYTES + 512 | COPIED),
    "cluster lies outside": lambda path: put(path, ENTRY_2, END | COPIED),
    "cluster lies far outside": lambda path: put(path, ENTRY_2, (1 << 55) | COPIED),
    "two clusters in one place": lambda path: put(path, ENTRY_2, DATA | COPIED),
    "cluster in an L2 table": lambda path: put(path, ENTRY_2, L2 | COPIED),
    "entry of L2 reserved": lambda path: put(path, ENTRY_2, DATA + CLUSTER_BYTES | COPIED | 1 << 60 | 2),
    "zeroes with a place": lambda path: put(path, ENTRY_2, DATA + CLUSTER_BYTES | COPIED | 1),
    "zeroes with an unaligned place": lambda path: put(path, ENTRY_2, DATA + 512 | COPIED | 1),
    "L2 table is gone": lambda path: put(path, L1, 0),
    "L2 table lies outside": lambda path: put(path, L1, END | COPIED),
    "L2 table not marked as copied": lambda path: put(path, L1, L2),
    "L2 table twice": lambda path: put(path, L1 + 8, L2 | COPIED),
    "entry of L1 reserved": lambda path: put(path, L1, L2 | COPIED | 1 << 60),
    "table of references lies outside": lambda path: put(path, 48, END + CLUSTER_BYTES),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_errors_and_leaks_are_counted_as_qemu_counts_them(image, damage):
    DAMAGE[damage](image)
    ours, its = both(image)
    assert (ours.errors, ours.leaks) == (its.errors, its.leaks)
    assert ((ours.errors, ours.leaks) == (0, 0)) == (damage in ("nothing", "zeroes with a place"))


def test_a_cluster_that_is_used_twice_is_an_error_even_if_it_is_counted_so(image):
    put(image, ENTRY_2, DATA)
    put(image, L2, DATA)
    put(image, BLOCK + 1 * 2, 2, ">H")
    put(image, BLOCK + 2 * 2, 0, ">H")
    ours, its = both(image)
    assert (its.errors, its.leaks) == (0, 0)
    assert (ours.errors, ours.leaks) == (1, 0)
    assert ours.message == "1 errors in its tables"


def test_a_compressed_cluster_is_an_error(image):
    put(image, ENTRY_2, COMPRESSED | DATA + CLUSTER_BYTES)
    ours, its = both(image)
    assert its.errors == 0
    assert ours.errors == 1


@pytest.mark.parametrize("length", [*range(CLUSTER_BYTES, END, CLUSTER_BYTES), L1 + 8, L2 + 17, END - 1])
def test_an_image_that_was_cut_is_damaged(image, length):
    with image.open("r+b") as file:
        file.truncate(length)
    ours, its = both(image)
    assert bool(ours.errors) == bool(its.errors) == (length <= END - CLUSTER_BYTES)


@pytest.mark.parametrize(
    ("field", "value", "kind", "says"),
    [
        (40, L1 + 512, ">Q", "no L1 table of 2 entries can be at byte"),
        (36, 1 << 23, ">I", "no L1 table of 8388608 entries"),
        (48, REFCOUNTS + 8, ">Q", "no table of reference counts can be at byte"),
        (56, 1 << 20, ">I", "no table of reference counts"),
        (20, 17, ">I", "clusters of 131072 bytes"),
        (4, 2, ">I", "no magic number of qcow2 version 3"),
    ],
)
def test_tables_that_can_not_be_are_damage(image, field, value, kind, says):
    put(image, field, value, kind)
    ours, its = both(image)
    assert (ours.errors, ours.leaks) == (1, 0)
    assert says in ours.message
    assert its.errors or field in (4, 20)


def test_a_file_that_is_too_long_to_be_counted_is_damage(image, monkeypatch):
    monkeypatch.setattr(qcow2_check, "_MOST_CLUSTERS", 8)
    ours, _ = both(image)
    assert (ours.errors, ours.message) == (1, f"no image has {END} bytes")


def test_a_disk_that_cannot_be_read_is_not_damage(image, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(qcow2_tables.os, "preadv", fail)
    with OpenImage.open(image) as opened, pytest.raises(RepositoryUnreadable, match="Input/output error"):
        qcow2_check.check_tables(opened)


def test_it_can_be_cancelled(image):
    class Cancelled(Exception):
        pass

    def cancel():
        raise Cancelled

    with OpenImage.open(image) as opened, pytest.raises(Cancelled):
        qcow2_check.check_tables(opened, cancel)


tables = st.sampled_from([L2, L2 + CLUSTER_BYTES, L1, REFCOUNTS, BLOCK])
places = st.integers(0, 40).map(lambda number: number * 8)
offsets = st.one_of(st.integers(0, 12).map(lambda number: number * CLUSTER_BYTES), st.integers(0, 1 << 56))
flags = st.sampled_from([0, 0, COPIED, COPIED, COPIED | 1, 1, 1 << 60, COMPRESSED])
values = st.one_of(
    st.builds(lambda offset, flag: offset | flag, offsets, flags), st.integers(0, (1 << 64) - 1)
)
damage = st.lists(st.tuples(tables, places, values), min_size=1, max_size=4)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(damage)
def test_whatever_is_in_the_tables_no_error_that_qemu_finds_is_missed(image, damage):
    content = image.read_bytes()
    try:
        for table, place, value in damage:
            put(image, table + place, value)
        ours, its = both(image)
        assert ours.errors or not its.errors
        assert ours.leaks or ours.errors or not its.leaks
    finally:
        image.write_bytes(content)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage)
def test_whatever_is_in_the_tables_what_is_read_lies_in_the_file(image, damage):
    content = image.read_bytes()
    try:
        for table, place, value in damage:
            put(image, table + place, value)
        with OpenImage.open(image) as opened:
            for window in Tables(opened).windows():
                stored = window.offset != 0
                assert (window.offset[stored] < END).all()
                assert (window.offset % CLUSTER_BYTES == 0).all()
                assert not (stored & window.zero | stored & window.lost | window.zero & window.lost).any()
                assert window.first + len(stored) <= 9000
    finally:
        image.write_bytes(content)


def test_a_damaged_entry_costs_its_own_cluster_and_no_other(image):
    for entry in (END | COPIED, DATA + 512 | COPIED, COMPRESSED | DATA, (1 << 55) | COPIED):
        put(image, ENTRY_2, entry)
        with OpenImage.open(image) as opened:
            window = Tables(opened).window(0, 9000)
        assert np.flatnonzero(window.lost).tolist() == [2]
        assert np.flatnonzero(window.offset).tolist() == [0, 8200]
        assert np.flatnonzero(window.zero).tolist() == [3]


@pytest.mark.parametrize("entry", [END | COPIED, L2 + 512 | COPIED])
def test_a_damaged_entry_of_l1_costs_its_own_table_and_no_other(image, entry):
    put(image, L1, entry)
    with OpenImage.open(image) as opened:
        window = Tables(opened).window(0, 9000)
    assert np.flatnonzero(window.lost).tolist() == list(range(8192))
    assert np.flatnonzero(window.offset).tolist() == [8200]


def test_what_is_cut_off_of_a_table_is_lost_and_not_empty(image):
    with image.open("r+b") as file:
        file.truncate(L1 + 8 + 3)
    with OpenImage.open(image) as opened:
        window = Tables(opened).window(0, 9000)
    assert np.flatnonzero(window.offset).tolist() == [0, 2]
    assert np.flatnonzero(window.lost).tolist() == list(range(8192, 9000))
    with image.open("r+b") as file:
        file.truncate(L1 - 1)
    with OpenImage.open(image) as opened:
        assert Tables(opened).window(0, 9000).lost.all()


def test_tables_of_an_image_that_qemu_would_not_open_are_not_read(image):
    put(image, 40, L1 + 512)
    with OpenImage.open(image) as opened, pytest.raises(DamageFound, match="no L1 table"):
        Tables(opened)
