# SPDX-License-Identifier: GPL-2.0-or-later
"""NBD clients that leave before their handshake has ended. The guard imports this: only what loads quickly.

QEMU 7.2 stands still for ever, and its guest with it, when its NBD server is stopped while a client is in its
handshake, even if that client leaves then, or has just left and QEMU has not seen it
(``test_a_guard_that_dies_while_clients_connect_costs_the_run_and_no_guest``). A client whose handshake
has ended must not leave before its export has gone, though: see `guard_process`.
"""

import select
import socket
import time
from collections.abc import Iterable
from contextlib import suppress

SPEAKS_SECONDS = 0.1
"""Within which a server in a handshake has said something that nobody read."""
LEAVE_SECONDS = 2.0


def leave(sockets: Iterable[socket.socket], *, surely: bool) -> None:
    """Have clients leave that are in their handshake, and wait until the server knows. Never raises.

    surely: whether all of them are. Otherwise those are on which the server's words wait to be read: it says
    nothing between the end of a handshake and the first request.
    """
    leaving = [one for one in sockets if surely or _is_spoken_to(one)]
    for one in leaving:
        with suppress(OSError):
            one.shutdown(socket.SHUT_WR)
    deadline = time.monotonic() + LEAVE_SECONDS
    for one in leaving:
        with suppress(OSError):
            one.setblocking(True)
            while (left := deadline - time.monotonic()) > 0:
                one.settimeout(left)
                if not one.recv(1 << 16):
                    break


def _is_spoken_to(one: socket.socket) -> bool:
    waiting = select.poll()
    waiting.register(one, select.POLLIN)
    if not waiting.poll(SPEAKS_SECONDS * 1000):
        return False
    with suppress(OSError):
        return bool(one.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    return False
