# SPDX-License-Identifier: GPL-2.0-or-later
"""The conversation with the program on another host: the program itself without ssh, and peers that lie."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time

import pytest

from backupctl.cancel import Cancellation
from backupctl.errors import AgentUnavailable, Interrupted, MonitorError, MonitorUnreachable, Refused
from backupctl.options import QmpAccess, Timeouts
from backupctl.system import private_dir, ssh
from backupctl.system.address import Address
from backupctl.vm.remote import bundle, channel, connected_host, host

ADDRESS = Address.parse("ssh://host/nowhere/q")
HERE = 'for last; do :; done; exec /bin/sh -c "$last"'
"""An ssh that runs the command on this machine."""
READS = "exec 3<&0; cat <&3 >/dev/null &"
READY = "printf 'backupctl remote program 1\\n'"


@pytest.fixture
def as_ssh(tmp_path, monkeypatch):
    """Have this shell script be `ssh`."""

    def put(script: str) -> None:
        program = tmp_path / "ssh"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr(ssh, "_END_SECONDS", 0.5)

    return put


def options(**more: object) -> dict[str, object]:
    asked = host.options_for(QmpAccess(ADDRESS), Timeouts(), session=False)
    return {**asked, **more}


def test_the_program_needs_nothing_but_the_standard_library():
    assert bundle.IMAGES not in bundle.modules()
    for name, path in bundle.modules(images=True).items():
        for imported in bundle._imports(path):
            top = imported.partition(".")[0]
            assert top == "backupctl" or top in sys.stdlib_module_names, f"{name} imports {imported}"


def test_the_remote_command_is_one_line_that_any_shell_takes():
    command = bundle.command()
    assert "\n" not in command
    assert "!" not in command  # a C shell would look for an earlier command
    assert shlex.split(command)[:5] == ["exec", "python3", "-I", "-S", "-c"]


def test_the_program_runs_from_its_input_alone_and_asks_the_agent(as_ssh, tmp_path):
    as_ssh(HERE)
    missing = str(tmp_path / "agent")
    with channel.opened(ADDRESS, options(agent=missing)) as there:
        with pytest.raises(AgentUnavailable, match="No such file"):
            there.ask("thaw")
        assert there.ask("files", call="free_bytes", arguments=["/"]) > 0
        with pytest.raises(Refused, match="not a directory we can write to"):
            there.ask("files", call="check_directory", arguments=[missing])
        assert there.alive


def test_the_program_with_a_session_has_a_guard_and_a_lock_and_leaves_nothing(as_ssh, tmp_path):
    as_ssh(HERE)
    monitor = tmp_path / "q"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(monitor))
        listener.listen()
        asked = options(session=True, monitor=str(monitor), lock_seconds=10.0)
        with channel.opened(ADDRESS, asked) as there:
            answer = there.ask("guard", request={"do": "frozen"}, descriptors=[], seconds=5.0)
            assert answer == {"value": False}
            again = {**asked, "lock_seconds": 0.1}
            with (
                pytest.raises(
                    MonitorUnreachable, match="host: another run, or the guard of one that was cut off"
                ) as refused,
                channel.opened(ADDRESS, again),
            ):
                pass
            assert refused.value.hint == "a run works on one VM at a time; wait until it has ended"
        with channel.opened(ADDRESS, asked) as there:
            assert there.alive, "the lock is free again"


def test_what_a_login_script_prints_is_passed_over(as_ssh):
    as_ssh(f"echo Welcome to host; echo; {HERE}")
    with channel.opened(ADDRESS, options()) as there:
        assert there.ask("files", call="free_bytes", arguments=["/"]) > 0


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 127", "no python3 of version 3.11 or newer on host"),
        ("exit 126", "no python3 of version 3.11 or newer on host"),
        ("echo Host key verification failed. >&2; exit 255", "ssh: Host key verification failed"),
        (f"{READS} yes", "cannot run python3 on host"),
        (f"{READS} {READY}; echo 7", "cannot run python3 on host"),
        (f"{READS} {READY}; echo '[]'", "cannot run python3 on host"),
        (f"{READS} {READY}; printf '%0.s[' $(seq 99999); echo", "cannot run python3 on host"),
        ("exec sleep 60", "host does not answer over ssh"),
    ],
)
def test_a_host_that_does_not_run_the_program_is_unreachable(as_ssh, monkeypatch, script, said):
    as_ssh(script)
    monkeypatch.setattr(channel, "_START_SECONDS", 3.0)
    with pytest.raises(MonitorUnreachable, match=said), channel.opened(ADDRESS, options()):
        pass


@pytest.mark.parametrize("answer", ["", "7", "{", '{"value":'])
def test_an_answer_that_makes_no_sense_breaks_the_connection(as_ssh, answer):
    asked = shlex.quote(answer)
    as_ssh(f"{READY}; echo '{{}}'; echo {asked}; exec cat >/dev/null")
    with channel.opened(ADDRESS, options()) as there:
        with pytest.raises(MonitorError, match="the ssh connection to host broke"):
            there.ask("monitor")
        assert not there.alive
        with pytest.raises(MonitorError, match="broke"):
            there.ask("monitor")


def test_an_answer_that_does_not_come_is_not_taken_for_the_next_one(as_ssh):
    as_ssh(f"{READS} {READY}; echo '{{}}'; sleep 1; echo '{{\"value\": 1}}'; wait")
    with channel.opened(ADDRESS, options()) as there:
        with pytest.raises(MonitorError, match="no answer"):
            there.ask("monitor", 0.1)
        time.sleep(1.0)
        with pytest.raises(MonitorError, match="no answer"):
            there.ask("send_fd", descriptor=3)


def test_a_request_to_end_is_obeyed_while_nobody_answers(as_ssh):
    as_ssh("exec sleep 60")
    cancel = Cancellation()
    cancel.request("SIGTERM")
    begun = time.monotonic()
    with pytest.raises(Interrupted), channel.opened(ADDRESS, options(), cancel):
        pass
    assert time.monotonic() - begun < 20


def test_the_program_ends_when_nobody_speaks_to_it(tmp_path):
    given = bundle.content().replace(b"SILENCE_SECONDS = 30.0", b"SILENCE_SECONDS = 0.50")
    text = given + json.dumps(options(directory="")).encode() + b"\n"
    with subprocess.Popen(
        ["/bin/sh", "-c", bundle.command()], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as program:
        assert program.stdin is not None
        program.stdin.write(text)
        program.stdin.flush()
        assert program.wait(60) == 0


@pytest.mark.parametrize("left", [True, False], ids=["a socket that nobody listens on", "no socket"])
def test_a_vm_that_is_off_is_told_from_a_line_that_broke(as_ssh, monkeypatch, tmp_path, left):
    as_ssh(HERE)
    far = private_dir.new_name()
    monkeypatch.setattr(private_dir, "new_name", lambda: far)
    monitor = tmp_path / "q"
    if left:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(monitor))
    asked = options(session=True, monitor=str(monitor), lock_seconds=10.0)
    with channel.opened(ADDRESS, asked) as there:
        assert not (there.directory / "m").exists()
        with pytest.raises(ConnectionError, match="the socket that ssh forwards") as broken:
            connected_host.MonitorLine(there, "monitor").connect(1.0)
        assert not isinstance(broken.value, ConnectionRefusedError)
        (there.directory / "m").symlink_to(far / "m")  # as ssh would forward it
        with pytest.raises(ConnectionRefusedError if left else FileNotFoundError):
            connected_host.MonitorLine(there, "monitor").connect(1.0)
