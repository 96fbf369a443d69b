# SPDX-License-Identifier: GPL-2.0-or-later
"""The point-in-time view as the copy sees it: an NBD export with its dirty bitmap."""

import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

from backupctl.digests.clusters import CLUSTER_BYTES
from backupctl.errors import ReadFailed
from backupctl.transfer import extents
from backupctl.transfer.extents import BadReply, Status
from backupctl.transfer.nbd_client import ALLOCATION_DEPTH, BASE_ALLOCATION, Connection, Entries


class Source:
    """An open export; `connect` makes one.

    connections: all on the one export; requests are spread over them.
    """

    def __init__(
        self,
        connections: tuple[Connection, ...],
        questions: Sequence[tuple[str, ...]],
        *,
        borne: bool = False,
    ) -> None:
        self.connections = connections
        self._questions = questions
        self._ask = self._ask_bearing if borne else self._ask_all
        self.size = connections[0].size()

    @classmethod
    def connect(
        cls,
        addresses: Sequence[socket.socket | Path],
        export: str,
        bitmap: str | None = None,
        stall_seconds: float = 60.0,
        check: Callable[[], None] = lambda: None,
        *,
        depth: bool = False,
        borne: bool = False,
    ) -> Self:
        """Shake hands on every address.

        bitmap: the dirty bitmap to ask for, None for all data. check: called at least every 100 ms while
        `connect` and `statuses` wait for the server; what it raises ends them. depth: ask which layer stores
        what, too; takes two addresses at least. borne: a cluster whose state can't be told is called data, so
        that reading it fails, and it alone. Raises ReadFailed.
        """
        questions = [(BASE_ALLOCATION, *((f"qemu:dirty-bitmap:{bitmap}",) if bitmap else ()))]
        if depth:  # on a connection of its own: measured, QEMU hangs up when two answers to one are errors
            questions.append((ALLOCATION_DEPTH,))
        made: list[Connection] = []
        try:
            for number, address in enumerate(addresses):
                connection = Connection(export, ReadFailed, stall_seconds, check)
                made.append(connection)
                connection.connect(address, questions[min(number, len(questions) - 1)])
            return cls(tuple(made), questions, borne=borne)
        except BaseException:
            for connection in made:
                connection.close()
            raise

    def statuses(self) -> Iterator[Status]:
        """Return the state of the whole disk: flags of base:allocation, then of the bitmap.

        Raises ReadFailed.
        """
        try:
            contexts = tuple(context for question in self._questions for context in question)
            yield from extents.query_extents(self._ask, self.size, contexts)
        except BadReply as err:
            raise ReadFailed(f"the NBD server lies about its extents: {err}") from err

    def _ask_all(self, offset: int, length: int) -> Entries:
        found: Entries = {}
        for connection, _ in zip(self.connections, self._questions, strict=False):
            found |= connection.block_status(offset, length)
        return found

    def _ask_bearing(self, offset: int, length: int) -> Entries:
        """Ask for the state of a range, or of a shorter one that can be told."""
        while True:
            try:
                return self._ask_all(offset, length)
            except ReadFailed:
                if not all(connection.alive() for connection in self.connections):
                    raise
                if length <= CLUSTER_BYTES:
                    return {BASE_ALLOCATION: [length, 0], ALLOCATION_DEPTH: [length, 1]}
                length = max(length // 2 // CLUSTER_BYTES, 1) * CLUSTER_BYTES

    def close(self) -> None:
        """Close the connections. Never raises."""
        for connection in self.connections:
            connection.close()
