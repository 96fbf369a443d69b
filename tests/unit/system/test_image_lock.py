# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's lock on an image, between two open file descriptions."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from backupctl.system import image_lock
from backupctl.system.image_lock import InUse, keep_from_writers


@pytest.fixture
def opened(tmp_path) -> Iterator:
    """Open the same file once more with each call."""
    path = tmp_path / "image"
    path.write_bytes(b"\0" * 4096)
    with ExitStack() as held:

        def open_again() -> int:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            held.callback(os.close, descriptor)
            return descriptor

        yield open_again


def hold(descriptor: int, byte: int) -> None:
    """Lock one byte as QEMU does."""
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, image_lock._flock(fcntl.F_RDLCK, byte))


def test_two_readers_do_not_hinder_each_other(opened):
    keep_from_writers(opened())
    keep_from_writers(opened())


@pytest.mark.parametrize("byte", [101, 103, 200])
def test_a_writer_or_one_that_lets_nobody_read_is_noticed(opened, byte):
    hold(opened(), byte)
    with pytest.raises(InUse):
        keep_from_writers(opened())


@pytest.mark.parametrize("byte", [100, 102, 202])
def test_what_does_no_harm_to_a_reader_is_let_pass(opened, byte):
    hold(opened(), byte)
    keep_from_writers(opened())


def test_a_writer_that_comes_later_finds_the_bytes_that_forbid_it(opened):
    keep_from_writers(opened())
    later = opened()
    for byte in (201, 203):
        asked = image_lock._flock(fcntl.F_WRLCK, byte)
        kind, *_ = image_lock._FLOCK.unpack(fcntl.fcntl(later, fcntl.F_OFD_GETLK, asked))
        assert kind == fcntl.F_RDLCK


def test_a_backup_claims_an_image_alone_until_it_closes_it_and_needs_no_right_to_write(opened, tmp_path):
    first = os.open(tmp_path / "image", os.O_RDONLY | os.O_CREAT)
    assert image_lock.claim(first)
    assert image_lock.claim(first)
    second = opened()
    assert not image_lock.claim(second)
    keep_from_writers(opened())
    os.close(first)
    assert image_lock.claim(second)
    assert not image_lock.claim(opened())
