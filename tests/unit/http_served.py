# SPDX-License-Identifier: GPL-2.0-or-later
"""A server of ours in a thread, and what it answers."""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message

from backupctl.cancel import Cancellation
from backupctl.system import listen

PATIENCE = 20


class HttpServed:
    """What is known of a running server. address: its URL, as it announced it."""

    def __init__(self) -> None:
        self.address = ""
        self._ready = threading.Event()

    def announce(self, address: str) -> None:
        self.address = address
        self._ready.set()

    @property
    def port(self) -> int:
        return int(self.address.split(":")[2].split("/")[0])

    @property
    def path(self) -> str:
        return "/" + self.address.split("/", 3)[3]

    def ask(
        self, path: str | None = None, method: str = "GET", host: str | None = None
    ) -> tuple[int, bytes, Message]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(
                method, self.path if path is None else path, headers={"Host": host} if host else {}
            )
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers
        finally:
            connection.close()

    @contextmanager
    def running(self, serve: Callable[..., None], *content: object) -> Iterator[None]:
        """Serve `content` on a port of the loopback."""
        stop = Cancellation()
        with listen.tcp("127.0.0.1", 0) as listening:
            thread = threading.Thread(
                target=serve,
                args=(listening, *content),
                kwargs={"ready": self.announce, "stop": stop},
            )
            thread.start()
            try:
                assert self._ready.wait(PATIENCE)
                yield
            finally:
                stop.request("the test's end")
                thread.join(PATIENCE)
                assert not thread.is_alive()
