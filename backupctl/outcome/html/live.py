# SPDX-License-Identifier: GPL-2.0-or-later
"""The report as a page that is served on this machine, and kept up to date while it is looked at.

::

    GET /TOKEN/             the page, made anew if anything has changed or the last one is a minute old
    GET /TOKEN/live.json    what works on each VM now, and `version`, which changes when points come or go

Only reading is offered. Other users of this machine can connect, so the path begins with a token that cannot
be guessed.
"""

import hmac
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from backupctl.cancel import Cancellation
from backupctl.names import VmName
from backupctl.system.http_server import Handler, Server

PAGE_SECONDS = 60.0


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
        server.run(stop)


class _Server(Server):
    """Serves a page."""

    def __init__(self, listening: socket.socket, page: LivePage) -> None:
        super().__init__(listening, _Handler)
        self.page = page
        self.token = secrets.token_urlsafe(18)
        self.address = f"{self.origin}/{self.token}/"


class _Handler(Handler):
    server: _Server

    def find(self, path: str) -> tuple[str, Callable[[], bytes]] | None:
        """Return what is below the token."""
        token, _, name = path.removeprefix("/").partition("/")
        page = self.server.page
        found: dict[str, tuple[str, Callable[[], bytes]]] = {
            "": ("text/html; charset=utf-8", page.content),
            "live.json": ("application/json", lambda: json.dumps(page.look()).encode()),
        }
        known = hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode())
        return found.get(name) if known else None
