# SPDX-License-Identifier: GPL-2.0-or-later
"""Serves the metrics of VMs to Prometheus: ``GET /metrics``, and nothing else.

There is no token in the path, since what is told here is what everybody may read in the file for
node_exporter. The text is made when it is asked for, and kept for some seconds: who asks more often than that
causes no more work.
"""

import socket
import threading
import time
from collections.abc import Callable

from backupctl.cancel import Cancellation
from backupctl.monitoring import exposition
from backupctl.system.http_server import Handler, Server

PATH = "/metrics"
KEPT_SECONDS = 5.0


class Metrics:
    """The text, kept until it is out of date. make: makes it anew, by one caller at a time."""

    def __init__(self, make: Callable[[], str]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._content = b""
        self._until = 0.0

    def content(self) -> bytes:
        """Return the text, encoded. Raises what `make` raises."""
        with self._lock:
            if time.monotonic() >= self._until:
                self._content = self._make().encode()
                self._until = time.monotonic() + KEPT_SECONDS
            return self._content


def serve(
    listening: socket.socket, found: Metrics, *, ready: Callable[[str], None], stop: Cancellation
) -> None:
    """Serve the text until asked to stop. ready: called with its URL."""
    with _Server(listening, found) as server:
        ready(server.origin + PATH)
        server.run(stop)


class _Server(Server):
    def __init__(self, listening: socket.socket, metrics: Metrics) -> None:
        super().__init__(listening, _Handler)
        self.metrics = metrics


class _Handler(Handler):
    server: _Server
    any_port = True  # a tunnel or a proxy may lead here from another port

    def find(self, path: str) -> tuple[str, Callable[[], bytes]] | None:
        """Return the text; Prometheus may be configured to add parameters, which mean nothing here."""
        if path.partition("?")[0] != PATH:
            return None
        return exposition.CONTENT_TYPE, self.server.metrics.content
