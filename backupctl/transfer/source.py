# SPDX-License-Identifier: GPL-2.0-or-later
"""The point-in-time view as the copy sees it: an NBD export with its dirty bitmap."""

import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from backupctl.errors import ReadFailed
from backupctl.transfer import extents
from backupctl.transfer.connection import ALLOCATION_DEPTH, BASE_ALLOCATION, Connection
from backupctl.transfer.extents import BadReply, Status


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
        *,
        depth: bool = False,
    ) -> Self:
        """Shake hands on every address.

        bitmap: the dirty bitmap to ask for, None for all data. depth: ask which layer stores what, too.
        Raises ReadFailed.
        """
        contexts = (BASE_ALLOCATION,) + ((f"qemu:dirty-bitmap:{bitmap}",) if bitmap else ())
        contexts += (ALLOCATION_DEPTH,) if depth else ()
        made: list[Connection] = []
        try:
            for address in addresses:
                connection = Connection(export, ReadFailed, stall_seconds)
                made.append(connection)
                connection.connect(address, contexts)
            return cls(tuple(made), contexts)
        except BaseException:
            for connection in made:
                connection.close()
            raise

    def statuses(self) -> Iterator[Status]:
        """Return the state of the whole disk: flags of base:allocation, then of the bitmap.

        Raises ReadFailed.
        """
        try:
            yield from extents.survey(self.connections[0].block_status, self.size, self._contexts)
        except BadReply as err:
            raise ReadFailed(f"the NBD server lies about its extents: {err}") from err

    def close(self) -> None:
        """Close the connections. Never raises."""
        for connection in self.connections:
            connection.close()
