# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures of all unit tests: repositories with points; small file systems and block devices."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.points import builder, two_points

__all__ = ["builder", "two_points"]


def _needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may mount and make loop devices")


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB in memory."""
    _needs_root()
    mounted = tmp_path / "small"
    mounted.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4M", "backupctl-test", str(mounted)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"can't mount here: {done.stderr.strip()}")
    try:
        yield mounted
    finally:
        subprocess.run(["umount", str(mounted)], check=True, timeout=30)


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Makes loop devices of a given size, filled with one byte."""
    _needs_root()
    made: list[str] = []

    def make(size_bytes: int, filled: bytes = b"\0") -> str:
        file = tmp_path / f"device{len(made)}"
        file.write_bytes(filled * size_bytes)
        done = subprocess.run(
            ["losetup", "--find", "--show", str(file)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"no loop device to be had: {done.stderr.strip()}")
        made.append(done.stdout.strip())
        return made[-1]

    try:
        yield make
    finally:
        for device in made:
            subprocess.run(["losetup", "--detach", device], check=True, timeout=30)
