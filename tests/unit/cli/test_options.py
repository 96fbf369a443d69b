# SPDX-License-Identifier: GPL-2.0-or-later
"""What is typed or configured reaches the core, with its type; what is wrong is refused at once."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from backupctl.cli import backup, main
from backupctl.cli.main import cli
from backupctl.errors import UsageError
from backupctl.operations import bitmaps, recover, status
from backupctl.operations.backup.context import RunContext
from backupctl.operations.doctor import run as doctor
from backupctl.options import (
    ChainOptions,
    FreezeOptions,
    LibvirtAccess,
    QmpAccess,
    RunOptions,
    ScratchOptions,
    Timeouts,
)
from backupctl.repository.repository import Repository
from backupctl.system.address import Address

CONFIGURED = """
[defaults]
scratch_size = "1G"
command_timeout = 7
keep_checkpoints = 2
max_chain = 0

[vm.web]
qmp = "unix:/q"
freeze = "require"
limit = "50M"
agent_timeout = 2.5
on_broken_chain = "full"
"""


class Reached(Exception):
    """The core was called."""


@pytest.fixture
def reach(tmp_path, monkeypatch):
    """Call a command; return the options with which it calls the core."""
    (tmp_path / "c.toml").write_text(CONFIGURED)
    Repository.create(tmp_path / "r")
    seen: list[RunOptions | Timeouts] = []

    def core(*arguments, **_more):
        options = (one.options if isinstance(one, RunContext) else one for one in arguments)
        seen.extend(one for one in options if isinstance(one, RunOptions | Timeouts))
        raise Reached

    for module, name in (
        *((backup.backup, "run"), (status, "look"), (doctor, "examine")),
        *((recover, "recover"), (bitmaps, "look")),
    ):
        monkeypatch.setattr(module, name, core)

    def call(command: str, *typed: str) -> RunOptions | Timeouts:
        options = ("--config", str(tmp_path / "c.toml"), "--repository", str(tmp_path / "r"))
        with pytest.raises(Reached):
            cli.main([command, "web", *options, *typed], standalone_mode=False)
        return seen.pop()

    return call


def test_a_run_has_what_is_configured_and_what_is_typed_instead(reach):
    said = reach("incremental", "--limit", "1.5M", "--stall-timeout", "9", "--disk", "vda", "--disk", "vdb")
    assert said == RunOptions(
        kind="incremental",
        disks=("vda", "vdb"),
        limit_bytes_per_second=3 << 19,
        freeze=FreezeOptions("require"),
        scratch=ScratchOptions(size_bytes=1 << 30),
        chain=ChainOptions("full", checkpoints=2),
        timeouts=Timeouts(command_seconds=7, agent_seconds=2.5, stall_seconds=9),
    )


def test_recover_and_bitmaps_wait_as_long_as_was_said(reach):
    for command in ("recover", "bitmaps"):
        said = reach(command, "--stall-timeout", "9")
        assert said == Timeouts(command_seconds=7, agent_seconds=2.5, stall_seconds=9)


@pytest.mark.parametrize("command", ["status", "doctor"])
def test_status_and_doctor_look_at_what_an_incremental_would_do(reach, command):
    assert reach(command) == reach("incremental")
    assert reach(command, "--scratch", "/s").scratch.directory == Path("/s")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--limit", text) for text in ("fast", "0", "-1")),
        *(("--scratch-size", text) for text in ("1X", "")),
        *(("--command-timeout", text) for text in ("0", "nan", "3601", "soon")),
        *(("--qmp", text) for text in ("tcp:host", "unix:", "tcp:h:99999")),
        *(("--max-chain", text) for text in ("0", "181")),
        *(("--since", text) for text in ("newest", "../x")),
        ("--keep-checkpoints", "1001"),
        ("--freeze", "sometimes"),
    ],
)
def test_a_wrong_value_is_wrong_use_and_names_its_option(tmp_path, option, value, capsys, monkeypatch):
    Repository.create(tmp_path / "r")
    before = sorted(tmp_path.rglob("*"))
    words = [
        "incremental",
        "web",
        "--qmp",
        "/q",
        "--repository",
        str(tmp_path / "r"),
        option,
        value,
        "--json",
    ]
    monkeypatch.setattr("sys.argv", ["backupctl", *words])
    with pytest.raises(SystemExit) as ended:
        main.main()
    error = json.loads(capsys.readouterr().out)["error"]
    assert (ended.value.code, error["exit_code"], error["state"]) == (2, 2, "nothing was touched")
    assert option in error["message"] or error["kind"] == "InvalidName"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_wrong_option_is_a_document_wherever_json_stands(capsys, monkeypatch):
    for words in (["list", "--json", "--wrong"], ["list", "--wrong", "--json"], ["nonsense", "--json"]):
        monkeypatch.setattr("sys.argv", ["backupctl", *words])
        with pytest.raises(SystemExit):
            main.main()
        assert json.loads(capsys.readouterr().out)["error"]["kind"] == "UsageError"
    monkeypatch.setattr("sys.argv", ["backupctl", "nonsense", "--", "--json"])
    with pytest.raises(SystemExit):
        main.main()
    assert capsys.readouterr().out == ""


def test_nothing_of_a_call_is_left_for_the_next(tmp_path):
    """The configuration that one call names is not that of another."""
    (tmp_path / "c.toml").write_text('[vm.web]\nqmp = "/q"\n')
    done = CliRunner().invoke(cli, ["--config", str(tmp_path / "c.toml"), "config", "check"])
    assert "1 VM" in done.stdout
    with pytest.raises(UsageError, match="not configured"):
        cli.main(["config", "show", "web"], standalone_mode=False)


@pytest.mark.parametrize(
    ("qmp", "agent", "said"),
    [
        ("tcp:192.0.2.1:4444", None, "qmp is tcp:192.0.2.1:4444, and what is said there is not encrypted"),
        ("unix:/q", "tcp:192.0.2.1:4444", "agent is tcp:192.0.2.1:4444"),
        ("ssh://host/q", "unix:/a", "the agent unix:/a is not on the host of the monitor ssh://host/q"),
        ("ssh://host/q", "ssh://other/a", "the agent ssh://other/a is not on the host"),
        ("unix:/q", "ssh://host/a", "the agent ssh://host/a is not on the host"),
    ],
)
def test_a_monitor_or_agent_that_is_not_safe_to_reach_is_refused(
    tmp_path, capsys, monkeypatch, qmp, agent, said
):
    Repository.create(tmp_path / "r")
    words = ["incremental", "web", "--qmp", qmp, "--repository", str(tmp_path / "r")]
    monkeypatch.setattr("sys.argv", ["backupctl", *words, *(["--agent", agent] if agent else [])])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("qmp", ["tcp:127.0.0.1:1", "tcp:localhost:1", "ssh://host/q"])
def test_the_loopback_and_ssh_need_no_permission(reach, qmp):
    assert reach("incremental", "--qmp", qmp)


def test_plain_tcp_to_another_host_is_allowed_where_it_is_said(reach):
    assert reach("incremental", "--qmp", "tcp:192.0.2.1:4444", "--plain-tcp")


LIBVIRT = """
[vm.web]
libvirt = "qemu:///system"
domain = "production"
"""


@pytest.mark.parametrize(
    ("typed", "access"),
    [
        ((), LibvirtAccess("qemu:///system", "production")),
        (("--domain", "other"), LibvirtAccess("qemu:///system", "other")),
        (("--qmp", "unix:/q"), QmpAccess(Address(path="/q"))),
    ],
)
def test_what_is_typed_of_monitor_and_libvirt_wins(tmp_path, monkeypatch, typed, access):
    (tmp_path / "c.toml").write_text(LIBVIRT)
    seen = []

    def core(vm, *_arguments, **_more):
        seen.append(vm.access)
        raise Reached

    monkeypatch.setattr(doctor, "examine", core)
    options = ("--config", str(tmp_path / "c.toml"), "--repository", str(tmp_path / "r"))
    with pytest.raises(Reached):
        cli.main(["doctor", "web", *options, *typed], standalone_mode=False)
    assert seen == [access]
