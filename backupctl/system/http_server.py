# SPDX-License-Identifier: GPL-2.0-or-later
"""An HTTP server that only reads: of few connections at once, each within its time.

Other users of this machine can connect, and any page in a browser of this machine can make it connect. So a
request whose `Host` header has a name that is not ours is refused: a foreign page may have had its own name
changed to our address (DNS rebinding).
"""

import logging
import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from backupctl.cancel import Cancellation

_log = logging.getLogger("backupctl.system.http_server")

REQUEST_SECONDS = 60.0
"""All that one connection may take; a large page is made in seconds."""
MOST_CONNECTIONS = 16
_CHECK_SECONDS = 0.2
_PORT = re.compile(r":[0-9]{1,5}\Z")
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Server(ThreadingMixIn, TCPServer):
    """Answers each connection in a thread, of a limited number. origin: the URL, without a path."""

    daemon_threads = True
    block_on_close = False
    timeout = _CHECK_SECONDS

    def __init__(self, listening: socket.socket, handler: type["Handler"]) -> None:
        super().__init__(listening.getsockname()[:2], handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening.dup()
        # A client that is gone between select and accept must not make accept wait for the next one.
        self.socket.settimeout(_CHECK_SECONDS)
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        self.names = frozenset({shown, "localhost"})
        self.port = port
        self.origin = f"http://{shown}:{port}"

    def run(self, stop: Cancellation) -> None:
        """Answer until asked to stop."""
        while not stop.requested:
            self.handle_request()  # returns after _CHECK_SECONDS without one

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection, or close it if there are too many."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a connection within its time."""
        timer = threading.Timer(REQUEST_SECONDS, _cut, (request,))
        timer.daemon = True
        timer.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            timer.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the base's signature
        """Note that a connection broke; nobody else is concerned."""
        _log.debug("a connection broke", exc_info=True)


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection. any_port: whether `Host` may have another port."""

    server: Server
    server_version = "backupctl"
    sys_version = ""
    timeout = 10  # for each read and write
    any_port = False

    def find(self, path: str) -> tuple[str, Callable[[], bytes]] | None:
        """Return the type of a content, and what makes it; None if there is nothing at that path."""
        raise NotImplementedError

    def do_GET(self) -> None:
        """Answer."""
        self._answer(body=True)

    def do_HEAD(self) -> None:
        """Answer without a body."""
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        named = self.headers.get_all("Host") or []
        if not named or not all(map(self._is_ours, named)):
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
            return
        found = self.find(self.path)
        if found is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        kind, make = found
        content = make()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _is_ours(self, host: str) -> bool:
        if self.any_port:
            return _PORT.sub("", host) in self.server.names
        return any(host == f"{name}:{self.server.port}" for name in self.server.names)

    def end_headers(self) -> None:
        """Send what every answer has."""
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the base's signature
        """Log a request; its path may have a token, which is nobody's business."""
        _log.debug("a request was answered: %s", arguments[-2:-1] if arguments else format)
