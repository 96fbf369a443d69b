# SPDX-License-Identifier: GPL-2.0-or-later
"""What QEMU's user is given, and a client that is in its handshake."""

import os
import socket
import stat
import tempfile
import threading
from pathlib import Path

import pytest

from backupctl.errors import Refused
from backupctl.names import Namespace, VmName
from backupctl.vm.guest import handshake
from backupctl.vm.libvirt import run_directory
from backupctl.vm.libvirt.run_files import RunFiles

USER = (64055, 64055)
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def short_directory():
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


@ROOT_ONLY
def test_qemus_user_may_enter_its_own_directory_and_write_to_no_other(tmp_path):
    files = RunFiles(Namespace("0123abcd"), VmName("web"), tmp_path, USER)
    scratch = files.make_scratch("vda", 1 << 20, 1 << 20)
    top, inner = files.directory.stat(), files.socket.parent.stat()
    assert (stat.S_IMODE(top.st_mode), top.st_uid, top.st_gid) == (0o710, 0, USER[1])
    assert (stat.S_IMODE(inner.st_mode), inner.st_uid) == (0o700, USER[0])
    made = files.scratch("vda").stat()
    assert (stat.S_IMODE(made.st_mode), made.st_uid) == (0o600, USER[0])
    assert scratch.filename == str(files.scratch("vda"))
    files.close()


@ROOT_ONLY
def test_a_directory_that_qemus_user_may_not_enter_is_refused(short_directory):
    private = short_directory / "private"
    private.mkdir(mode=0o700)
    with pytest.raises(Refused, match="may not enter"):
        run_directory.check(private, "backupctl-00000000-web@", USER)
    run_directory.check(private, "backupctl-00000000-web@", (0, 0))


def test_a_path_that_is_too_long_for_a_socket_is_refused(tmp_path):
    with pytest.raises(Refused, match="too long"):
        run_directory.check(tmp_path / ("x" * 90), "backupctl-00000000-web@", None)


def left(*, greeted: bool, surely: bool) -> bool:
    """Whether a client left of which nothing else is known."""
    client, server = socket.socketpair()
    with client, server:
        if greeted:
            server.send(b"NBDMAGIC")
        # As QEMU does: when the client has left, so does the server.
        closer = threading.Thread(target=lambda: server.recv(1) or server.shutdown(socket.SHUT_RDWR))
        closer.start()
        handshake.leave([client], surely=surely)
        try:
            client.send(b"x")
            has_left = False
        except OSError:
            has_left = True
        closer.join()
        return has_left


def test_a_client_to_which_the_server_spoke_leaves():
    assert left(greeted=True, surely=False)


def test_a_client_with_an_export_stays():
    assert not left(greeted=False, surely=False)


def test_a_client_that_is_known_to_be_in_its_handshake_leaves():
    assert left(greeted=False, surely=True)
