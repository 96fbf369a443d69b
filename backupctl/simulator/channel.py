# SPDX-License-Identifier: GPL-2.0-or-later
"""Sockets for text: one client at a time, as with QEMU's character devices, or many.

A client that connects while another is served waits in the listening socket's queue, and receives nothing.
"""

import array
import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

_RECEIVE_BYTES = 1 << 16
_MAX_FDS = 16


class HangUp(Exception):
    """The client has disconnected, or its connection must be closed."""


class Channel:
    """A connected socket with a queue of data to send."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self._out: asyncio.Queue[bytes] = asyncio.Queue()
        self._sender = self._loop.create_task(self._send())
        self.closed = asyncio.Event()

    def post(self, data: bytes) -> None:
        """Queue data to be sent, in order."""
        self._out.put_nowait(data)

    async def flush(self, seconds: float = 1.0) -> None:
        """Wait until all is sent, for this time at most."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._out.join(), seconds)

    async def receive(self) -> tuple[bytes, list[int]]:
        """Return some bytes and the descriptors that came with them. Raises HangUp."""
        while True:
            try:
                return self._receive_now()
            except BlockingIOError:
                await self._readable()
            except OSError as err:
                raise HangUp from err

    def _receive_now(self) -> tuple[bytes, list[int]]:
        size = array.array("i").itemsize * _MAX_FDS
        data, ancillary, _, _ = self._socket.recvmsg(_RECEIVE_BYTES, socket.CMSG_SPACE(size))
        fds = array.array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        for fd in fds:
            os.set_inheritable(fd, False)
        if not data:
            raise HangUp
        return data, list(fds)

    async def _readable(self) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._socket, _wake, ready)
        try:
            await ready
        finally:
            self._loop.remove_reader(self._socket)

    async def _send(self) -> None:
        with suppress(OSError):
            while True:
                parts = [await self._out.get()]
                while not self._out.empty():
                    parts.append(self._out.get_nowait())
                try:
                    await self._loop.sock_sendall(self._socket, b"".join(parts))
                finally:
                    for _ in parts:
                        self._out.task_done()

    def close(self) -> None:
        """Disconnect."""
        self._sender.cancel()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        # The sender must have ended before the descriptor number can be reused, or it would send to another
        # client.
        self._loop.call_soon(self._socket.close)
        self.closed.set()


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


Serve = Callable[[Channel], Awaitable[None]]


class ListeningSocket:
    """A listening unix socket. many: whether clients are served concurrently."""

    def __init__(self, path: Path, serve: Serve, *, many: bool = False) -> None:
        self._path = path
        self._serve = serve
        self._many = many
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._tasks: set[asyncio.Task[None]] = set()
        self.channels: set[Channel] = set()

    def open(self) -> None:
        """Listen. Raises OSError."""
        # The name appears only when the socket listens, so that a client that waits for the name can connect.
        early = self._path.with_name(self._path.name + "~")
        with suppress(FileNotFoundError):
            early.unlink()
        self._listener.bind(str(early))
        self._listener.listen(16)
        self._listener.setblocking(False)
        early.rename(self._path)
        self._start(self._accept())

    def drop_clients(self) -> None:
        """Disconnect all clients; those that wait in the queue come next."""
        for channel in list(self.channels):
            channel.close()

    async def close(self) -> None:
        """Send what is queued, disconnect all clients, stop listening, remove the socket's name."""
        for channel in list(self.channels):
            await channel.flush()
        self.drop_clients()
        for task in self._tasks:
            task.cancel()
        self._listener.close()
        with suppress(FileNotFoundError):
            self._path.unlink()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._listener)
            work = self._converse(Channel(connection))
            if self._many:
                self._start(work)
            else:
                await work

    async def _converse(self, channel: Channel) -> None:
        self.channels.add(channel)
        talk = asyncio.ensure_future(self._serve(channel))
        ended = asyncio.ensure_future(channel.closed.wait())
        try:
            await asyncio.wait({talk, ended}, return_when=asyncio.FIRST_COMPLETED)
            if talk.done():
                with suppress(HangUp):
                    talk.result()
        finally:
            for task in (talk, ended):
                task.cancel()
            self.channels.discard(channel)
            channel.close()

    def _start(self, work: Awaitable[None]) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()  # a bug of the simulator ends the process through the loop's handler
