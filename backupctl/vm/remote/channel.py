# SPDX-License-Identifier: GPL-2.0-or-later
"""The conversation with the program on a remote host: one request, one answer, each within its time."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from backupctl import errors
from backupctl.cancel import Cancellation
from backupctl.errors import BackupctlError, MonitorError, MonitorUnreachable
from backupctl.system import private_dir, ssh
from backupctl.system.address import Address
from backupctl.vm.remote import bundle
from backupctl.vm.remote.names import ALIVE_SECONDS, MONITOR, NBD, READY

_ANSWER_SECONDS = 30.0
_START_SECONDS = 30.0
_LOOK_SECONDS = 0.2
_MOST_NOISE_LINES = 1000
_OLD_PYTHON = 126
_NOT_FOUND = 127
_SSH_FAILED = 255

_log = logging.getLogger("backupctl.vm.remote")


class Channel:
    """An open conversation; `opened` begins one. host: as people know it."""

    def __init__(self, connection: ssh.Connection, host: str) -> None:
        self.host = host
        self.directory = connection.local
        self._connection = connection
        self._writing = threading.Lock()
        self._asking = threading.Lock()
        self._broken = ""
        self._closed = threading.Event()

    @property
    def alive(self) -> bool:
        """Whether the host could be reached when it was last asked."""
        return not self._broken and self._connection.alive

    def ask(self, do: str, within: float = _ANSWER_SECONDS, /, **arguments: object) -> Any:
        """Return the answer to a request, waiting so many seconds.

        Raises MonitorError if there is none, or what the program raised.
        """
        with self._asking:
            if self._broken:
                raise MonitorError(self._broken)
            _log.debug("%s -> %s %s", self.host, do, arguments)
            try:
                self._write(json.dumps({"do": do, **arguments}).encode() + b"\n")
                answer = _read(self._connection.line(time.monotonic() + within))
            except (OSError, EOFError, ValueError) as err:  # an answer that comes late answers nothing else
                self._broken = f"the ssh connection to {self.host} broke: {self._why(err)}"
                raise MonitorError(self._broken) from err
            _log.debug("%s <- %.1000s", self.host, answer)
        return _value(answer)

    def begin(self, options: dict[str, object], cancel: Cancellation | None) -> None:
        """Start the program, and wait until it is ready. Raises MonitorUnreachable, Interrupted."""
        seconds = options.get("lock_seconds", 0.0)
        assert isinstance(seconds, float)
        try:
            text = bundle.content(images=bool(options.get("images"))) + json.dumps(options).encode() + b"\n"
            with self._writing:
                self._connection.send(text, _START_SECONDS, cancel.check if cancel else lambda: None)
            answer = self._greeting(time.monotonic() + _START_SECONDS + seconds, cancel)
        except (OSError, EOFError, ValueError) as err:
            raise self._unreachable(err) from err
        try:
            _value(answer)
        except (BackupctlError, OSError) as err:
            hint = err.hint if isinstance(err, BackupctlError) else ""
            raise MonitorUnreachable(f"{self.host}: {err}", hint=hint) from err
        threading.Thread(target=self._keep_alive, daemon=True).start()

    def close(self) -> None:
        """Say no more. Never raises."""
        self._closed.set()
        self._broken = self._broken or "closed"

    def _greeting(self, deadline: float, cancel: Cancellation | None) -> dict[str, Any]:
        noise = 0
        while noise < _MOST_NOISE_LINES:  # what a login script prints
            if cancel is not None:
                cancel.check()
            try:
                line = self._connection.line(min(deadline, time.monotonic() + _LOOK_SECONDS))
            except TimeoutError:
                if time.monotonic() >= deadline:
                    raise
                continue
            if line == READY.rstrip():
                return _read(self._connection.line(deadline))
            noise += 1
        raise ValueError("it prints something else")

    def _keep_alive(self) -> None:
        while not self._closed.wait(ALIVE_SECONDS) and self.alive:
            try:
                self._write(b"\n")
            except (OSError, ValueError):
                return

    def _write(self, content: bytes) -> None:
        with self._writing:
            self._connection.send(content)

    def _why(self, err: BaseException) -> str:
        if isinstance(err, TimeoutError):
            return "no answer"
        return self._connection.ended().text[-300:] or "it was cut"

    def _unreachable(self, err: BaseException) -> MonitorUnreachable:
        if isinstance(err, TimeoutError):
            return MonitorUnreachable(
                f"{self.host} does not answer over ssh", hint="try it with ssh, as the user that runs this"
            )
        code, text = self._connection.ended()
        said = f": {text[-400:]}" if text else ""
        if code in (_OLD_PYTHON, _NOT_FOUND):
            wanted = ".".join(map(str, bundle.NEEDS_PYTHON))
            return MonitorUnreachable(
                f"there is no python3 of version {wanted} or newer on {self.host}{said}",
                hint=f"install Python {wanted} on {self.host}; the guard there needs its standard library",
            )
        if code == _SSH_FAILED:
            return MonitorUnreachable(f"cannot connect to {self.host} by ssh{said}", hint=_advice(text))
        return MonitorUnreachable(f"cannot run python3 on {self.host} (exit code {code}){said}")


@contextmanager
def opened(
    address: Address, options: dict[str, object], cancel: Cancellation | None = None
) -> Iterator[Channel]:
    """Run the program on an address's host for as long as the block lasts.

    options: for the program, all but the directory, which is named here. Raises MonitorUnreachable,
    Interrupted, Failed if there is no ssh here.
    """
    directory = private_dir.new_name() if options["session"] else Path()
    names = (MONITOR, NBD) if options["session"] else ()
    with ssh.connect(address, bundle.command(), directory, names) as connection:
        channel = Channel(connection, f"{address.user}@{address.host}" if address.user else str(address.host))
        try:
            channel.begin({**options, "directory": str(directory) if names else ""}, cancel)
            yield channel
        finally:
            channel.close()


def _read(line: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(line)
    except RecursionError as err:
        raise ValueError("nested too deep") from err
    if not isinstance(answer, dict):
        raise ValueError("not an object")  # noqa: TRY004 - the caller asks for one kind
    return answer


def _value(answer: dict[str, Any]) -> Any:
    if "error" not in answer:
        return answer.get("value")
    message, state = str(answer.get("message", ""))[:1000], str(answer.get("state", ""))[:300]
    hint = str(answer.get("hint", ""))[:1000]  # a command with a path in it
    if answer["error"] == "OSError":
        number = answer.get("errno")
        raise OSError(number if isinstance(number, int) else 0, message)
    raise errors.received(str(answer["error"]), message, state).add(hint=hint)


def _advice(text: str) -> str:
    if "ost key" in text:
        return (
            "log in once with ssh as the user that runs backupctl, compare the host key's fingerprint, "
            "and accept it"
        )
    if "denied" in text:
        return "backupctl answers no question: install a key that needs none, or an agent that has it"
    return "try it with ssh, as the user that runs backupctl; port, key and jump host belong in ssh_config"
