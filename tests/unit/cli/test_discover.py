# SPDX-License-Identifier: GPL-2.0-or-later
"""`discover` waits for libvirt as long as it is told."""

import pytest
from click.testing import CliRunner

from backupctl.cli.main import cli
from backupctl.operations import discover


@pytest.mark.parametrize(
    ("configured", "typed", "seconds"),
    [
        ("", [], 5.0),
        ("command_timeout = 7", [], 7.0),
        ("command_timeout = 7", ["--command-timeout", "9"], 9.0),
    ],
)
def test_a_call_of_libvirt_may_take_as_long_as_is_said(tmp_path, monkeypatch, configured, typed, seconds):
    asked = []
    monkeypatch.setattr(discover, "domains", lambda _uri, timeouts: asked.append(timeouts) or ())
    config = tmp_path / "backupctl.toml"
    config.write_text(f"[defaults]\n{configured}\n")
    config.chmod(0o600)
    done = CliRunner().invoke(cli, ["discover", "--config", str(config), *typed])
    assert done.exit_code == 0, done.output
    assert [one.command_seconds for one in asked] == [seconds]
