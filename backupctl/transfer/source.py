# SPDX-License-Identifier: GPL-2.0-or-later
"""The point-in-time view as the copy sees it: an NBD export with its dirty bitmap."""

import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

from backupctl.errors import ReadFailed
from backupctl.transfer import extents
from backupctl.transfer.extents import BadReply, Extents
from backupctl.transfer.nbd_client import BASE_ALLOCATION, Connection


class Source:
    """An open export; `connect` makes one.

    connections: all on the one export; requests are spread over them.
    """

    def __init__(self, connections: tuple[Connection, ...], contexts: tuple[str, ...]) -> None:
        self.connections = connections
        self._contexts = contexts
        self.size = connections[0].size()

    @classmethod
    def connect(
        cls,
        addresses: Sequence[socket.socket | Path],
        export: str,
        bitmap: str | None = None,
        stall_seconds: float = 60.0,
        check: Callable[[], None] = lambda: None,
    ) -> Self:
        """Connect to an export, once for each address.

        bitmap: the dirty bitmap to ask for, None for all data. check: called at least every 100 ms while
        `connect` and `statuses` wait for the server; what it raises ends them. Raises ReadFailed.
        """
        contexts = (BASE_ALLOCATION, *((f"qemu:dirty-bitmap:{bitmap}",) if bitmap else ()))
        made: list[Connection] = []
        try:
            for address in addresses:
                connection = Connection(export, ReadFailed, stall_seconds, check)
                made.append(connection)
                connection.connect(address, contexts)
            return cls(tuple(made), contexts)
        except BaseException:
            for connection in made:
                connection.close()
            raise

    def statuses(self) -> Iterator[Extents]:
        """Yield the block status of the whole disk: flags of base:allocation, then of the bitmap.

        Raises ReadFailed.
        """
        try:
            yield from extents.query_extents(self.connections[0].block_status, self.size, self._contexts)
        except BadReply as err:
            raise ReadFailed(f"the NBD server sent an invalid block status: {err}") from err

    def use_check(self, check: Callable[[], None]) -> None:
        """Call another `check` while this waits for the server: the thread's that reads from now on."""
        for connection in self.connections:
            connection.check = check

    def close(self) -> None:
        """Close the connections. Never raises."""
        for connection in self.connections:
            connection.close()
