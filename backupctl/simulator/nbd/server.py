# SPDX-License-Identifier: GPL-2.0-or-later
"""The listening side: the exports, the connected clients, and how both end."""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass

from backupctl.simulator.failure import CommandError
from backupctl.simulator.faults import Faults
from backupctl.simulator.nbd.export import Export
from backupctl.simulator.nbd.option_haggling import OptionHaggling
from backupctl.simulator.nbd.serve import Conversation
from backupctl.simulator.nbd.wire import Dropped, Gone, Peer


@dataclass(eq=False)
class Client:
    """A connection; export is None during option haggling."""

    peer: Peer
    export: Export | None = None


class NbdServer:
    """The one NBD server that a QEMU can have.

    on_left: called with an export whose client disconnected while the export still existed.
    """

    def __init__(self, faults: Faults, on_left: Callable[[Export], None]) -> None:
        self._faults = faults
        self._on_left = on_left
        self._listener: socket.socket | None = None
        self._tasks: dict[asyncio.Task[None], Client | None] = {}
        self._left = asyncio.Event()
        self.exports: dict[str, Export] = {}

    @property
    def running(self) -> bool:
        """Whether it listens."""
        return self._listener is not None

    def start(self, listener: socket.socket, most: int = 0) -> None:
        """Serve on a listening socket, which the server then owns. Raises CommandError.

        most: clients served at a time, 0 for no limit; others wait.
        """
        if self._listener is not None:
            listener.close()
            raise CommandError("NBD server already running")
        listener.setblocking(False)
        self._listener = listener
        self._run(self._accept(listener, most), None)

    def stop(self) -> list[Export]:
        """Stop listening and disconnect all clients. Returns the exports that this removed."""
        if self._listener is None:
            raise CommandError("NBD server not running")
        self._listener.close()
        self._listener = None
        gone = list(self.exports.values())
        self.exports = {}
        for task, client in self._tasks.items():
            if client is not None:
                client.peer.close()
            task.cancel()
        return gone

    def check_new(self, name: str) -> None:
        """Raise CommandError unless an export of that name can be added."""
        if self._listener is None:
            raise CommandError("NBD server not running")
        if name in self.exports:
            raise CommandError(f"NBD server already has export named '{name}'")

    def withdraw(self, export: Export) -> None:
        """Remove an export and disconnect its clients."""
        export.shutting_down = True
        self.exports.pop(export.name, None)
        for task, client in self._tasks.items():
            if client is not None and client.export is export:
                client.peer.close()
                task.cancel()

    async def _accept(self, listener: socket.socket, most: int) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while most and sum(client is not None for client in self._tasks.values()) >= most:
                self._left.clear()
                await self._left.wait()
            connection, _ = await loop.sock_accept(listener)
            client = Client(Peer(connection))
            self._run(self._serve(client), client)

    async def _serve(self, client: Client) -> None:
        left = True
        try:
            await self._converse(client)
        except Dropped:
            left = False
        except Gone:
            pass
        finally:
            client.peer.close()
            client.peer.release()
            if client.export is not None:
                client.export.clients -= 1
        if left and client.export is not None and not client.export.shutting_down:
            self._on_left(client.export)

    async def _converse(self, client: Client) -> None:
        choice = await OptionHaggling(client.peer, self.exports).run()
        if choice.export is not None:
            client.export = choice.export
            client.export.clients += 1
            await Conversation(client.peer, choice, self._faults).run()

    def _run(self, work: "asyncio.Future[None] | object", client: Client | None) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)  # type: ignore[arg-type]
        self._tasks[task] = client
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.pop(task, None)
        self._left.set()
        if not task.cancelled():
            task.result()  # a bug of the simulator ends the process through the loop's handler
