# SPDX-License-Identifier: GPL-2.0-or-later
"""How ssh is called, and how its end is told."""

import os
import time
from pathlib import Path

import pytest

from backupctl.errors import Failed, Refused
from backupctl.system import ssh
from backupctl.system.address import Address

ADDRESS = Address.parse("ssh://backup@host:2222/run/q")


@pytest.fixture
def as_ssh(tmp_path, monkeypatch):
    """Have this shell script be `ssh`."""

    def put(script: str) -> None:
        program = tmp_path / "ssh"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return put


def lines(connection: ssh.Connection) -> list[str]:
    found = []
    while True:
        try:
            found.append(connection.line(time.monotonic() + 10).decode())
        except EOFError:
            return found


def test_ssh_asks_nothing_checks_the_host_key_shares_no_connection_and_forwards_the_sockets(as_ssh):
    as_ssh('for each; do printf "%s\\n" "$each"; done')
    with ssh.connect(ADDRESS, "the program", Path("/tmp/far"), ("m",)) as connection:
        words = lines(connection)
        assert f"-L{connection.local}/m:/tmp/far/m" in words
    assert words[-3:] == ["--", "host", "the program"]
    options = [words[at + 1] for at, word in enumerate(words) if word == "-o"]
    assert {
        "BatchMode=yes",
        "StrictHostKeyChecking=yes",
        "ControlPath=none",
        "ExitOnForwardFailure=yes",
        "ForwardAgent=no",
        "ServerAliveInterval=5",
    } <= set(options)
    assert words[words.index("-l") + 1] == "backup"
    assert words[words.index("-p") + 1] == "2222"
    assert not connection.local.exists()


def test_another_ssh_config_is_read_if_the_environment_names_one(as_ssh, monkeypatch, tmp_path):
    as_ssh('for each; do printf "%s\\n" "$each"; done')
    other = tmp_path / "other"
    other.touch(0o600)
    monkeypatch.setenv(ssh.CONFIG_VARIABLE, str(other))
    with ssh.connect(ADDRESS, "p", Path("/far"), ()) as connection:
        words = lines(connection)
    assert words[words.index("-F") + 1] == str(other)


def test_an_ssh_config_that_others_could_change_is_refused(as_ssh, monkeypatch, tmp_path):
    """Its ProxyCommand would run as root."""
    as_ssh("exit 0")
    other = tmp_path / "other"
    monkeypatch.setenv(ssh.CONFIG_VARIABLE, str(other))
    with pytest.raises(Refused, match="cannot open"), ssh.connect(ADDRESS, "p", Path("/far"), ()):
        pass
    other.touch(0o600)
    other.chmod(0o666)
    with pytest.raises(Refused) as caught, ssh.connect(ADDRESS, "p", Path("/far"), ()):
        pass
    said = f"{ssh.CONFIG_VARIABLE} is set, but {other} is not trusted: it is writable by other users"
    assert caught.value.message.startswith(said)
    assert caught.value.next_command == f"chmod go-w {other}"


def test_what_ssh_says_last_is_kept(as_ssh):
    as_ssh("echo 'Host key verification failed.' >&2; exit 255")
    with ssh.connect(ADDRESS, "p", Path("/far"), ()) as connection:
        with pytest.raises(EOFError):
            connection.line(time.monotonic() + 10)
        assert connection.ended() == (255, "Host key verification failed.")
        assert not connection.alive


def test_a_wait_for_a_line_has_an_end_and_so_has_a_line(as_ssh, monkeypatch):
    as_ssh("exec cat /dev/zero")
    monkeypatch.setattr(ssh, "_MOST_LINE_BYTES", 1 << 20)
    with ssh.connect(ADDRESS, "p", Path("/far"), ()) as connection, pytest.raises(ValueError, match="end"):
        connection.line(time.monotonic() + 10)
    as_ssh("exec sleep 60")
    with ssh.connect(ADDRESS, "p", Path("/far"), ()) as connection:
        with pytest.raises(TimeoutError):
            connection.line(time.monotonic() + 0.05)
        monkeypatch.setattr(ssh, "_END_SECONDS", 0.05)


def test_an_ssh_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with (
        pytest.raises(Failed, match="cannot run ssh: No such file"),
        ssh.connect(ADDRESS, "p", Path("/far"), ()),
    ):
        pass
