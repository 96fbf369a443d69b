# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest agent's protocol: real qemu-ga where nothing can be harmed, the simulator for all of it.

A real qemu-ga runs beside the tests, on their own host, so it is started with every command that changes
anything blocked; what freezing does is told by QEMU's documentation and asked of the simulator alone.
"""

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fixtures import builds, debian
from tests.conformance import subjects

REAL = "qemu-ga"
HARMLESS = ("guest-sync", "guest-sync-delimited", "guest-ping", "guest-info", "guest-fsfreeze-status")
FREEZING = ("guest-fsfreeze-freeze", "guest-fsfreeze-freeze-list", "guest-fsfreeze-thaw")


class Agent:
    """A connection to an agent's socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        deadline = time.monotonic() + 60
        while self._socket.connect_ex(str(path)):  # its name is there before it listens
            assert time.monotonic() < deadline, f"nobody listens at {path}"
            time.sleep(0.02)
        self._file = self._socket.makefile("rb")

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def line(self) -> bytes:
        return self._file.readline()

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        message = {"execute": command} | ({"arguments": arguments} if arguments else {})
        self.send(json.dumps(message).encode() + b"\n")
        return json.loads(self.line())


@pytest.fixture(params=[REAL, *subjects.SIMULATED])
def agent(request: pytest.FixtureRequest, short_directory: Path) -> Iterator[Agent]:
    with _started(request.param, short_directory) as found:
        yield found


@pytest.fixture(params=list(subjects.SIMULATED))
def freezer(request: pytest.FixtureRequest, short_directory: Path) -> Iterator[Agent]:
    with _started(request.param, short_directory) as found:
        yield found


@contextmanager
def _started(name: str, directory: Path) -> Iterator[Agent]:
    with _qemu_ga(directory) if name == REAL else _simulator(name, directory):
        found = Agent(directory / "agent")
        try:
            yield found
        finally:
            found.close()


@contextmanager
def _simulator(name: str, directory: Path) -> Iterator[None]:
    subjects.required(name)
    with subjects.started(name, directory):
        yield


@contextmanager
def _qemu_ga(directory: Path) -> Iterator[None]:
    program = os.environ.get("QEMU_GA") or _debians_qemu_ga()
    # What may harm the host is asked of the program itself, so that a newer one's commands are blocked too.
    listed = subprocess.run([program, "-b", "help"], capture_output=True, text=True, timeout=20, check=True)
    blocked = sorted(set(listed.stdout.split()) - set(HARMLESS))
    assert set(FREEZING) <= set(blocked), f"{program} does not list its commands"
    command = [program, "-m", "unix-listen", "-p", str(directory / "agent"), "-t", str(directory)]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "-b", ",".join(blocked)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        _wait_for(directory / "agent", process)
        yield
    finally:
        process.kill()
        process.wait(60)


def _debians_qemu_ga() -> str:
    """Unpacked, not installed: installed it would serve the host that the tests run on."""
    try:
        debian.unpack(["qemu-guest-agent"], debian.CACHE / "qemu-ga")
    except debian.CannotBeHad as error:
        if builds.required():
            raise
        pytest.skip(f"qemu-ga: {error}")
    return str(debian.CACHE / "qemu-ga/usr/sbin/qemu-ga")


def _wait_for(path: Path, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 20
    while not path.exists():
        assert process.poll() is None, "qemu-ga ended"
        assert time.monotonic() < end, "qemu-ga does not listen"
        time.sleep(0.01)


def test_sync_returns_its_number(agent: Agent) -> None:
    """The reply to guest-sync is the number that was sent."""
    assert agent.ask("guest-sync", id=123456) == {"return": 123456}


def test_a_delimited_sync_starts_with_the_byte_ff(agent: Agent) -> None:
    """So that a client can skip what an earlier client left unread."""
    agent.send(b'\xff{"execute": "guest-sync-delimited", "arguments": {"id": 77}}\n')
    first = agent.line()
    # The byte 0xFF from us resets the agent's parser, which some versions answer with an error line first.
    answer = first if b"77" in first else agent.line()
    assert answer.startswith(b"\xff")
    assert json.loads(answer[1:]) == {"return": 77}


def test_ping_and_status_of_a_guest_that_is_not_frozen(agent: Agent) -> None:
    """Nothing is frozen by looking."""
    assert agent.ask("guest-ping") == {"return": {}}
    assert agent.ask("guest-fsfreeze-status") == {"return": "thawed"}


def test_info_names_the_commands_that_freeze(agent: Agent) -> None:
    """A client can learn whether freezing can be had."""
    found = agent.ask("guest-info")["return"]
    commands = {each["name"]: each for each in found["supported_commands"]}
    assert {"version", "supported_commands"} <= found.keys()
    assert set(HARMLESS) | set(FREEZING) <= commands.keys()
    assert commands["guest-ping"].keys() >= {"name", "enabled", "success-response"}


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (b'{"execute": "no-such-command"}\n', "CommandNotFound"),
        (b'{"execute": "guest-sync"}\n', "GenericError"),
        (b'{"execute": "guest-sync", "arguments": {"id": "text"}}\n', "GenericError"),
        (b'{"execute": "guest-ping", "arguments": {"surplus": 1}}\n', "GenericError"),
        (b'{"nothing": 1}\n', "GenericError"),
        (b"{]\n", "GenericError"),
    ],
)
def test_a_wrong_request_is_answered_and_forgotten(agent: Agent, request_: bytes, kind: str) -> None:
    """An error has a class and a text, and the agent goes on."""
    agent.send(request_)
    reply = json.loads(agent.line())
    assert reply["error"]["class"] == kind
    assert reply["error"]["desc"]
    assert agent.ask("guest-sync", id=5) == {"return": 5}


def test_freezing_and_thawing_count_file_systems(freezer: Agent) -> None:
    """Freeze and thaw return how many file systems they touched; the status follows."""
    frozen = freezer.ask("guest-fsfreeze-freeze")["return"]
    assert isinstance(frozen, int)
    assert frozen > 0
    assert freezer.ask("guest-fsfreeze-status") == {"return": "frozen"}
    assert freezer.ask("guest-fsfreeze-thaw") == {"return": frozen}
    assert freezer.ask("guest-fsfreeze-status") == {"return": "thawed"}
    assert freezer.ask("guest-fsfreeze-thaw") == {"return": 0}


def test_a_frozen_guest_takes_only_what_is_safe(freezer: Agent) -> None:
    """While frozen, a second freeze is an error; sync, ping, status and thaw are answered."""
    freezer.ask("guest-fsfreeze-freeze")
    assert "error" in freezer.ask("guest-fsfreeze-freeze")
    assert freezer.ask("guest-sync", id=6) == {"return": 6}
    assert freezer.ask("guest-ping") == {"return": {}}
    assert freezer.ask("guest-fsfreeze-thaw")["return"] > 0
