# SPDX-License-Identifier: GPL-2.0-or-later
"""The point-in-time view as the copy sees it: an NBD export with its dirty bitmap."""

import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

from backupctl.digests.clusters import CLUSTER_BYTES
from backupctl.errors import ReadFailed
from backupctl.transfer import extents
from backupctl.transfer.extents import BadReply, Extents
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
        tolerate_errors: bool = False,
    ) -> None:
        self.connections = connections
        self._questions = questions
        self._ask = self._ask_tolerant if tolerate_errors else self._ask_all
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
        tolerate_errors: bool = False,
    ) -> Self:
        """Connect to an export, once for each address.

        bitmap: the dirty bitmap to ask for, None for all data. check: called at least every 100 ms while
        `connect` and `statuses` wait for the server; what it raises ends them. depth: also ask which layer
        stores what; needs at least two addresses. tolerate_errors: a cluster without a block status counts
        as data, so that a later read of it, and of it alone, fails. Raises ReadFailed.
        """
        questions = [(BASE_ALLOCATION, *((f"qemu:dirty-bitmap:{bitmap}",) if bitmap else ()))]
        # On a connection of its own: QEMU closes a connection when two contexts of one reply are errors
        # (measured: test_an_entry_of_a_table_that_leads_nowhere_costs_its_cluster_and_no_other).
        if depth:
            questions.append((ALLOCATION_DEPTH,))
        made: list[Connection] = []
        try:
            for number, address in enumerate(addresses):
                connection = Connection(export, ReadFailed, stall_seconds, check)
                made.append(connection)
                connection.connect(address, questions[min(number, len(questions) - 1)])
            return cls(tuple(made), questions, tolerate_errors=tolerate_errors)
        except BaseException:
            for connection in made:
                connection.close()
            raise

    def statuses(self) -> Iterator[Extents]:
        """Yield the block status of the whole disk: flags of base:allocation, then of the bitmap or depth.

        Raises ReadFailed.
        """
        try:
            contexts = tuple(context for question in self._questions for context in question)
            yield from extents.query_extents(self._ask, self.size, contexts)
        except BadReply as err:
            raise ReadFailed(f"the NBD server sent an invalid block status: {err}") from err

    def _ask_all(self, offset: int, length: int) -> Entries:
        found: Entries = {}
        for connection, _ in zip(self.connections, self._questions, strict=False):
            found |= connection.block_status(offset, length)
        return found

    def _ask_tolerant(self, offset: int, length: int) -> Entries:
        """Ask about a range, or about a shorter one whose status can be read."""
        while True:
            try:
                return self._ask_all(offset, length)
            except ReadFailed:
                if not all(connection.alive() for connection in self.connections):
                    raise
                if length <= CLUSTER_BYTES:
                    return {BASE_ALLOCATION: [length, 0], ALLOCATION_DEPTH: [length, 1]}
                length = max(length // 2 // CLUSTER_BYTES, 1) * CLUSTER_BYTES

    def use_check(self, check: Callable[[], None]) -> None:
        """Call another `check` while this waits for the server: the thread's that reads from now on."""
        for connection in self.connections:
            connection.check = check

    def close(self) -> None:
        """Close the connections. Never raises."""
        for connection in self.connections:
            connection.close()
