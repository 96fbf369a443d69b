# SPDX-License-Identifier: GPL-2.0-or-later
"""Between a forwarded socket and QEMU's own."""

import os
import socket
import struct
from contextlib import ExitStack
from pathlib import Path

import pytest

from backupctl.errors import Refused
from backupctl.vm.remote import relay
from backupctl.vm.remote.relay import Relay
from backupctl.vm.remote.vm_lock import VmLock

USER = os.getuid() or 12345
"""Not root, whose locks are elsewhere."""


@pytest.fixture
def ends():
    """A relay of each kind: `client, qemu, relay = ends(outlives=True)`."""
    with ExitStack() as held:

        def make(*, outlives: bool) -> tuple[socket.socket, socket.socket, Relay]:
            client, forwarded = socket.socketpair()
            ours, qemu = socket.socketpair()
            for one in (client, qemu):
                one.settimeout(60)
                held.enter_context(one)
            made = Relay(forwarded, ours, outlives=outlives)
            held.callback(made.close)
            return client, qemu, made

        yield make


def test_bytes_pass_in_both_directions(ends):
    client, qemu, _ = ends(outlives=True)
    client.sendall(b"ask")
    assert qemu.recv(10) == b"ask"
    qemu.sendall(b"answer")
    assert client.recv(10) == b"answer"


def test_an_nbd_client_stays_with_qemu_when_the_line_is_cut_and_takes_what_qemu_says(ends):
    client, qemu, made = ends(outlives=True)
    client.close()
    qemu.sendall(bytes(8 << 20))  # more than any buffer holds
    qemu.settimeout(0.2)
    with pytest.raises(TimeoutError):
        qemu.recv(1)
    qemu.settimeout(60)
    made.close()
    assert qemu.recv(1) == b""


def test_a_monitor_is_free_for_the_guard_when_the_line_is_cut(ends):
    client, qemu, _ = ends(outlives=False)
    client.close()
    assert qemu.recv(1) == b""


def test_the_end_of_qemu_reaches_the_client(ends):
    client, qemu, _ = ends(outlives=True)
    qemu.close()
    assert client.recv(1) == b""


def test_a_directory_for_locks_that_others_could_write_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(
        Refused, match=f"not a directory of this user alone .its owner: user {os.getuid()}"
    ) as refused:
        VmLock.acquire("/q", 0.0)
    assert refused.value.hint.endswith(f"root may run: rm -r {tmp_path}/backupctl-12345")
    (tmp_path / "backupctl-12345").rmdir()
    (tmp_path / "backupctl-12345").symlink_to("/")
    with pytest.raises(Refused, match="not a directory of this user alone: Not a directory"):
        VmLock.acquire("/q", 0.0)


def test_who_ends_removes_the_lock_and_who_waits_gets_a_new_one(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: USER)
    made = tmp_path / f"backupctl-{USER}"
    made.mkdir(mode=0o700)
    os.chown(made, USER, -1)
    lock = VmLock.acquire("/q", 0.0)
    with pytest.raises(Refused, match="still works on this VM"):
        VmLock.acquire("/q", 0.1)
    other = VmLock.acquire("/other", 0.0)
    lock.remove()
    again = VmLock.acquire("/q", 0.0)
    assert again.descriptor != lock.descriptor
    other.remove()
    assert len(list(made.iterdir())) == 1
    again.remove()
    assert not list(tmp_path.iterdir())


def test_a_directory_for_locks_that_goes_as_another_program_ends_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: USER)
    mkdir, goes = Path.mkdir, [True, True, False]

    def vanishing(path: Path, mode: int) -> None:
        if not goes.pop(0):
            mkdir(path, mode)
            os.chown(path, USER, -1)

    monkeypatch.setattr(Path, "mkdir", vanishing)
    lock = VmLock.acquire("/q", 20.0)
    assert goes == []
    lock.remove()
    assert not list(tmp_path.iterdir())


GREETING = b"NBDMAGICIHAVEOPT\0\3"


def replied(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


HANDSHAKE = [
    GREETING,
    replied(8, 1),
    replied(10, 4, b"\0\0\0\1base:allocation"),
    replied(10, 1),
    replied(7, 3, b"\0\0" + bytes(10)),
    replied(7, 1),
]


@pytest.mark.parametrize("step", [1, 3, 19, 20, 21, 1000])
def test_a_handshake_has_ended_with_the_reply_to_go_and_not_before(step):
    told = b"".join(HANDSHAKE)
    reader = relay.HandshakeReader()
    for start in range(0, len(told), step):
        assert not reader.ended
        reader.read(told[start : start + step])
    assert reader.ended


def test_replies_before_the_last_do_not_end_a_handshake():
    reader = relay.HandshakeReader()
    for one in HANDSHAKE[:-1]:
        reader.read(one)
    assert not reader.ended
    reader.read(HANDSHAKE[-1] + b"what the transmission begins with")
    assert reader.ended
