# SPDX-License-Identifier: GPL-2.0-or-later
"""How the NBD clients of a run end: seen out by the VM's host, then closed, then let go of by the guard."""

import socket

from backupctl.names import vm_name
from backupctl.options import Timeouts
from backupctl.vm.driver import Export
from backupctl.vm.qmp.session import QmpSession


class Host:
    """The VM's host, and its guard."""

    def __init__(self) -> None:
        self.done: list[object] = []

    def leave(self, clients: list[socket.socket]) -> None:
        self.done.append([one.fileno() for one in clients])

    def release(self) -> None:
        self.done.append("release")

    def thaw_if_frozen(self) -> bool:
        return False


def test_the_host_sees_clients_out_before_they_are_closed():
    """A client in its handshake whose end QEMU has not seen makes `nbd-server-stop` hang QEMU 7.2."""
    host = Host()
    session = QmpSession(vm_name("web"), host, Timeouts(), None, host)
    ours, theirs = socket.socketpair()
    number = ours.fileno()
    with theirs:
        session._exports = (Export("e", None, (ours,)),)
        session._clients.callback(ours.close)
        session._close_clients()
        assert ours.fileno() == -1
    assert host.done == [[number], "release"]
