# SPDX-License-Identifier: GPL-2.0-or-later
"""The directories for sockets, where the user's temporary directory is no good for that."""

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backupctl.errors import Failed, Refused
from backupctl.names import VmName
from backupctl.operations.backup import prepare
from backupctl.options import QmpAccess, Timeouts, VmConfig
from backupctl.system import private_dir
from backupctl.system.address import Address
from backupctl.vm.qmp.driver import QmpDriver

ODD = os.fsdecode(b"o\xff")


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bc-") as name:
        yield Path(name)


def named(short: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = short / name
    made.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(made))
    return made


@pytest.mark.parametrize("name", ["x" * 100, ODD], ids=["too long", "no utf-8"])
def test_a_temporary_directory_that_no_socket_can_lie_in_is_passed_over(short, monkeypatch, name):
    made = named(short, name, monkeypatch)
    private_dir.check()
    with private_dir.directory() as directory, socket.socket(socket.AF_UNIX) as listener:
        assert made not in directory.parents
        assert directory.stat().st_mode & 0o777 == 0o700
        (directory / "public").mkdir()
        listener.bind(str(directory / "public" / "nbd.sock"))
    assert not directory.exists()
    assert list(made.iterdir()) == []


def test_the_longest_temporary_directory_that_is_used_has_room_for_the_longest_socket(short, monkeypatch):
    room = private_dir._SOCKET_BYTES - len(private_dir._LONGEST) - len(str(short)) - 1
    made = named(short, "x" * room, monkeypatch)
    with private_dir.directory() as directory, socket.socket(socket.AF_UNIX) as listener:
        assert directory.parent == made
        (directory / "public").mkdir()
        listener.bind(str(directory / "public" / "nbd.sock"))


@pytest.mark.parametrize("name", ["x" * 100, ODD], ids=["too long", "no utf-8"])
def test_without_any_directory_for_a_socket_it_is_a_typed_error(short, monkeypatch, name):
    named(short, name, monkeypatch)
    monkeypatch.setattr(private_dir, "_ELSEWHERE", ("/nowhere",))
    with pytest.raises(Failed, match=r"cannot use the temporary directory.*set TMPDIR"):
        private_dir.check()


def test_a_temporary_directory_that_takes_no_socket_is_told_before_a_run_begins(short, monkeypatch):
    """As on a file system that has none."""

    class Socket(socket.socket):
        def bind(self, address: object) -> None:
            raise OSError(1, "Operation not permitted")

    made = named(short, "t", monkeypatch)
    monkeypatch.setattr(socket, "socket", Socket)
    with pytest.raises(
        Failed, match=f"cannot make a socket in the temporary directory {made}: Operation not"
    ):
        private_dir.check()
    assert list(made.iterdir()) == []


@pytest.mark.parametrize(
    ("repository", "scratch", "descriptors", "refused"),
    [
        (ODD, "s", True, True),
        ("r", ODD, False, True),
        ("r", ODD, True, False),
        ("r\u00e9", "s\u00e9", False, False),
    ],
    ids=["repository", "scratch by name", "scratch by descriptor", "utf-8"],
)
def test_a_name_that_qemu_can_not_be_told_is_refused_before_anything_is_touched(
    short, repository, scratch, descriptors, refused
):
    monitor: Any = SimpleNamespace(passes_descriptors=descriptors)
    access = QmpAccess(Address(path="/nowhere"))
    driver = QmpDriver(VmConfig(VmName("web"), access), access, Timeouts(), monitor)
    if not refused:
        prepare.refuse_directories(short / repository, short / scratch, driver)
        return
    with pytest.raises(Refused, match="is not UTF-8"):
        prepare.refuse_directories(short / repository, short / scratch, driver)
