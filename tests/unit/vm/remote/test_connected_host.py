# SPDX-License-Identifier: GPL-2.0-or-later
"""NBD clients of another host: on whose side of the relay they leave."""

import socket

from backupctl.errors import MonitorError
from backupctl.options import Timeouts
from backupctl.system.address import Address
from backupctl.vm.remote.connected_host import ConnectedHost


class There:
    """The program on the other host."""

    def __init__(self, *, answers: bool = True) -> None:
        self.asked: list[tuple[str, dict[str, object]]] = []
        self._answers = answers

    def ask(self, do: str, **arguments: object) -> None:
        self.asked.append((do, arguments))
        if not self._answers:
            raise MonitorError("the line is cut")


def host_with(there: There) -> ConnectedHost:
    host = ConnectedHost(Address.parse("ssh://host/q"), Timeouts())
    host._channel = there
    return host


def test_clients_leave_on_the_side_of_qemu():
    """Closing the sockets here does not end them: QEMU's side outlives a line that is cut."""
    there = There()
    host = host_with(there)
    ours, others = socket.socketpair()
    with ours, others:
        host._clients[ours.fileno()] = 17
        host.leave([ours, others])
    assert there.asked == [("leave", {"descriptors": [17]})]


def test_a_host_that_is_out_of_reach_is_left_to_its_guard():
    there = There(answers=False)
    host = host_with(there)
    ours, others = socket.socketpair()
    with ours, others:
        host._clients[ours.fileno()] = 17
        host.leave([ours])
    assert len(there.asked) == 1
