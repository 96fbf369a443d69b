# SPDX-License-Identifier: GPL-2.0-or-later
"""The report as a page that is served on this machine, and kept up to date while it is looked at.

::

    GET /TOKEN/             the page, made anew if anything has changed or the last one is a minute old
    GET /TOKEN/live.json    what works on each VM now, and `version`, which changes when points come or go

Only reading is offered. Other users of this machine can connect, so the path begins with a token that cannot
be guessed. A foreign page in the user's browser cannot get at it by a name of its own, since the Host header
must be ours.
"""

import hmac
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, ClassVar

from backupctl.cancel import Cancellation
from backupctl.names import VmName

_log = logging.getLogger("backupctl.outcome.html.live")

PAGE_SECONDS = 60.0
REQUEST_SECONDS = 60.0
"""All that one connection may take; a large page is made in seconds."""
MOST_CONNECTIONS = 16
_CHECK_SECONDS = 0.2
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class LivePage:
    """The page, kept until it is out of date. render: makes it, of a version. look: what changes in between.

    A `look` is cheap; its `version` says whether the page has to be made anew.
    """

    def __init__(self, render: Callable[[str], bytes], look: Callable[[], Mapping[str, Any]]) -> None:
        self._render = render
        self.look = look
        self._lock = threading.Lock()
        self._content = b""
        self._version = ""
        self._made = 0.0

    def content(self) -> bytes:
        """Return the page. Only one is made at a time, whoever asks."""
        with self._lock:
            version = str(self.look()["version"])
            now = time.monotonic()
            if not self._content or version != self._version or now - self._made > PAGE_SECONDS:
                self._content, self._version, self._made = self._render(version), version, now
            return self._content


def document(doing: Iterable[tuple[int, VmName, str]], version: str) -> dict[str, Any]:
    """Return what a look found. doing: the number of a repository, a VM, and what works on it now, or ""."""
    vms = [{"repository": number, "vm": vm, "doing": said} for number, vm, said in doing]
    return {"version": version, "vms": vms}


def serve(
    listening: socket.socket, page: LivePage, *, ready: Callable[[str], None], stop: Cancellation
) -> None:
    """Serve the page until asked to stop. ready: called with its address."""
    with _Server(listening, page) as server:
        ready(server.address)
        while not stop.requested:
            server.handle_request()  # returns after _CHECK_SECONDS without one


class _Server(ThreadingMixIn, TCPServer):
    """Answers each connection in a thread, of which there is a limited number."""

    daemon_threads = True
    block_on_close = False
    timeout = _CHECK_SECONDS

    def __init__(self, listening: socket.socket, page: LivePage) -> None:
        super().__init__(listening.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening.dup()
        # A client that is gone between select and accept must not make accept wait for the next one.
        self.socket.settimeout(_CHECK_SECONDS)
        self.page = page
        self.token = secrets.token_urlsafe(18)
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        self.hosts = frozenset({f"{shown}:{port}", f"localhost:{port}"})
        self.address = f"http://{shown}:{port}/{self.token}/"

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


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "backupctl"
    sys_version = ""
    timeout = 10  # for each read and write
    _KINDS: ClassVar[dict[str, str]] = {"": "text/html; charset=utf-8", "live.json": "application/json"}

    def do_GET(self) -> None:
        """Answer."""
        self._answer(body=True)

    def do_HEAD(self) -> None:
        """Answer without a body."""
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        if not self.server.hosts.issuperset(self.headers.get_all("Host") or ["none"]):
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
            return
        token, _, name = self.path.removeprefix("/").partition("/")
        known = hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode())
        if not known or name not in self._KINDS:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        page = self.server.page
        content = page.content() if not name else json.dumps(page.look()).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", self._KINDS[name])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def end_headers(self) -> None:
        """Send what every answer has."""
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the base's signature
        """Log a request; its path has the token, which is nobody's business."""
        _log.debug("a request was answered: %s", arguments[-2:-1] if arguments else format)
