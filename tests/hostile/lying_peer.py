# SPDX-License-Identifier: GPL-2.0-or-later
"""A monitor or an agent that lies: it forwards everything to an honest one, but replaces chosen answers.

Both protocols are lines of JSON, answered in order.
"""

import array
import json
import os
import socket
import stat
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from tests.hostile.nbd import LyingServer, Said, say

Lie = Callable[[bytes], Said]
"""Gets the honest line and returns what is sent in its place; an iterable may have no end."""


class LyingPeer:
    """Listens on `path` in front of `target`.

    lies: by command ("query-block"), by its nth call ("query-block@2"), or for "greeting", "event", "*".
    nbd: replaces the NBD server: it gets the listening socket that is meant for QEMU.
    """

    def __init__(
        self, path: Path, target: Path, lies: Mapping[str, Lie], nbd: LyingServer | None = None
    ) -> None:
        self._path, self._target, self._lies, self._nbd = path, target, lies, nbd
        self._calls: Counter[str] = Counter()
        self._listener = socket.socket(socket.AF_UNIX)
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.told = 0

    def __enter__(self) -> Self:
        self._path.unlink(missing_ok=True)
        self._listener.bind(str(self._path))
        self._listener.listen(8)
        self._run(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self._listener, *self._sockets):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for sock in (self._listener, *self._sockets):
            sock.close()
        if self._nbd is not None:
            self._nbd.close()

    def _run(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                self._sockets += [client, server]
                server.connect(str(self._target))
                asked: deque[str] = deque()
                self._run(self._ask, client, server, asked)
                self._run(self._answer, server, client, asked)

    def _ask(self, client: socket.socket, server: socket.socket, asked: "deque[str]") -> None:
        said = b""
        with suppress(OSError):
            while True:
                content, descriptors, _, _ = socket.recv_fds(client, 1 << 20, 8)
                if not content:
                    break
                commands, said = _commands(said + content)
                asked += commands
                descriptors = self._exchange(descriptors)
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
                server.sendmsg([content], rights if descriptors else [])
                for descriptor in descriptors:
                    socket.close(descriptor)
        _hang_up(client, server)

    def _exchange(self, descriptors: list[int]) -> list[int]:
        """Pass the client's listening socket to the lying NBD server, and another one to QEMU."""
        if self._nbd is None:
            return descriptors
        return [self._nbd.take(one) if _is_socket(one) else one for one in descriptors]

    def _answer(self, server: socket.socket, client: socket.socket, asked: "deque[str]") -> None:
        with suppress(OSError, EOFError), server.makefile("rb") as stream:
            for line in stream:
                lie = self._lie(line, asked)
                if lie is None:
                    client.sendall(line)
                    continue
                self.told += 1
                said = lie(line)
                say(client, said)
        _hang_up(client, server)

    def _lie(self, line: bytes, asked: "deque[str]") -> Lie | None:
        message = json.loads(line.lstrip(b"\xff"))
        if "event" in message:
            return self._lies.get("event")
        if "QMP" in message:
            return self._lies.get("greeting")
        command = asked.popleft()
        self._calls[command] += 1
        exact = self._lies.get(f"{command}@{self._calls[command]}")
        return exact or self._lies.get(command) or self._lies.get("*")


def returns(value: Any) -> Lie:
    """Answer with this value under the right id."""
    return lambda line: answer(line, {"return": value})


def changes(change: Callable[[Any], Any]) -> Lie:
    """Answer with the honest value after `change`, which may do its work in place."""

    def lie(line: bytes) -> bytes:
        value = json.loads(line.lstrip(b"\xff")).get("return")
        changed = change(value)
        return answer(line, {"return": value if changed is None else changed})

    return lie


def refuses(description: Any, kind: Any = "GenericError") -> Lie:
    """Answer with an error."""
    return lambda line: answer(line, {"error": {"class": kind, "desc": description}})


def raw(content: bytes) -> Lie:
    """Answer with this text, whatever it is; ID in it stands for the right id."""

    def lie(line: bytes) -> bytes:
        identity = str(json.loads(line.lstrip(b"\xff")).get("id", "")).encode()
        return content.replace(b'"ID"', b'"' + identity + b'"')

    return lie


def hangs_up(_line: bytes) -> bytes:
    """Close the connection."""
    raise EOFError


def answer(line: bytes, message: dict[str, Any]) -> bytes:
    """Return an answer that has the id of the honest one."""
    honest = json.loads(line.lstrip(b"\xff"))
    named = {"id": honest["id"]} if "id" in honest else {}
    return line[: line.startswith(b"\xff")] + json.dumps({**message, **named}).encode() + b"\n"


def endless(part: bytes, before: bytes = b"") -> Lie:
    """Send `part` again and again, until the client disconnects."""

    def parts(_line: bytes) -> Iterable[bytes]:
        yield before
        while True:
            yield part

    return parts


def _commands(said: bytes) -> tuple[list[str], bytes]:
    """Return the names of the commands in what a client sent, and the incomplete rest."""
    found, rest = [], said.decode(errors="replace").lstrip("\ufffd \r\n")
    while rest:
        try:
            command, end = json.JSONDecoder().raw_decode(rest)
        except ValueError:
            break
        found.append(str(command.get("execute") or command.get("exec-oob")))
        rest = rest[end:].lstrip("\ufffd \r\n")
    return found, rest.encode()


def _is_socket(descriptor: int) -> bool:
    return stat.S_ISSOCK(os.fstat(descriptor).st_mode)


def _hang_up(*sockets: socket.socket) -> None:
    for sock in sockets:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
