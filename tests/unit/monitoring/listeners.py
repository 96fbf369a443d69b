# SPDX-License-Identifier: GPL-2.0-or-later
"""Who receives notices in tests: an HTTP server on the loopback, and a sendmail that writes to a file."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Received:
    """One request."""

    path: str
    headers: dict[str, str]
    body: str


@dataclass
class Listener:
    """A server. status: its answer to every request."""

    url: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    seen: list[Received] = field(default_factory=list)

    def paths(self) -> list[str]:
        """Return the paths of the requests so far."""
        return [one.path for one in self.seen]


@contextmanager
def listener() -> Iterator[Listener]:
    """Give a server on the loopback."""
    made = Listener()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            made.seen.append(Received(self.path, dict(self.headers), body))
            self.send_response(made.status)
            for name, value in made.headers.items():
                self.send_header(name, value)
            self.end_headers()

        do_GET = do_POST  # noqa: N815 - the name that the library calls

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield made
        finally:
            server.shutdown()
            thread.join()


def sendmail(directory: Path, *, code: int = 0) -> tuple[Path, Path]:
    """Make a sendmail; returns its path, and that of the file to which it appends what it is given."""
    program, mails = directory / "sendmail", directory / "mails"
    program.write_text(f'#!/bin/sh\n{{ echo "$@"; cat; }} >> {mails}\necho queue is full\nexit {code}\n')
    program.chmod(0o755)
    return program, mails
