# SPDX-License-Identifier: GPL-2.0-or-later
"""Real guests, booted by the test and ended here."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fixtures import builds
from fixtures import guest as guests
from fixtures.builds import Build
from fixtures.debian import CannotBeHad
from fixtures.guest import Disk, Guest
from fixtures.sshd import Account, Sshd
from tests.conftest import MIB, Cli, make_cli


@pytest.fixture
def sshd(tmp_path: Path, held: ExitStack) -> Sshd:
    """The other host, which is this machine behind an sshd of its own."""
    return started_sshd(tmp_path, held, None)


@pytest.fixture
def account_sshd(tmp_path: Path, held: ExitStack) -> Sshd:
    """The same, where a user logs in who has no rights but to its own files, and may enter tmp_path."""
    # A number of its own for each process of tests: they all look into /tmp for what their user left there.
    return started_sshd(tmp_path, held, Account(number=200_000 + os.getpid()))


def started_sshd(directory: Path, held: ExitStack, account: Account | None) -> Sshd:
    """Return an sshd that runs, for this account; one that cannot be had skips the test, unless required."""
    try:
        made = Sshd(directory / "sshd", account)
        held.callback(made.close)
        made.start()
    except CannotBeHad as err:
        if builds.required():
            pytest.fail(f"required here: {err}")
        pytest.skip(str(err))
    return made


@pytest.fixture
def boot(tmp_path: Path, held: ExitStack) -> Callable[..., tuple[Guest, Cli]]:
    """Boot a guest whose disks vda, vdb, … hold a file system: `guest, cli = boot(build, iothread=True)`."""

    def boot(
        build: Build, size: int = 256 * MIB, *, disks: int = 1, used: bool = False, **disk_options: Any
    ) -> tuple[Guest, Cli]:
        try:
            guests.images()
        except CannotBeHad as err:
            if os.environ.get("BACKUPCTL_REQUIRE_QEMU"):
                pytest.fail(f"the test guest is required here: {err}")
            pytest.skip(f"the test guest can't be had: {err}")
        image_format = disk_options.get("format", "qcow2")
        made = []
        for letter in "abcdefgh"[:disks]:
            path = tmp_path / f"vd{letter}.{image_format}"
            guests.make_disk(path, size, build.tool("qemu-img"), image_format, used=used)
            made.append(Disk(f"vd{letter}", path, **disk_options))
        guest = Guest(build, made)
        held.callback(guest.close)
        guest.start()
        return guest, make_cli(guest, tmp_path)

    return boot
