# SPDX-License-Identifier: GPL-2.0-or-later
"""The versions of everything: each is found where a run finds it, and what is missing is shown as missing."""

import json
import platform

import nbd
import pytest
from click.testing import CliRunner

from backupctl import __version__
from backupctl.cli.main import cli
from backupctl.errors import RepositoryError
from backupctl.operations import versions
from backupctl.system import qemu_tools


def program(directory, name, text):
    path = directory / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Tools of our own: one that tells its version, one that is missing."""
    img = program(tmp_path, "img", 'echo "qemu-img version 9.9.9 (Debian x)"; echo Copyright')
    monkeypatch.setenv("QEMU_IMG", img)
    monkeypatch.setenv("QEMU_STORAGE_DAEMON", str(tmp_path / "none"))
    return img


def test_each_version_is_the_one_that_a_run_would_use(tools):
    found = {one.name: one for one in versions.components()}
    assert found["backupctl"].version == __version__
    assert found["Python"].version == platform.python_version()
    assert found["libnbd"].version == nbd.NBD().get_version()
    assert (found["qemu-img"].version, found["qemu-img"].path) == ("9.9.9 (Debian x)", tools)
    assert all(found[name].version for name in ("qemu.qmp", "click", "rich", "msgspec", "numpy", "blake3"))


def test_a_missing_tool_and_a_missing_library_are_shown_as_missing(tools, monkeypatch):
    monkeypatch.setattr(versions, "_PACKAGES", ("no-such-library",))
    found = {one.name: one for one in versions.components()}
    assert found["qemu-storage-daemon"].version is None
    assert found["qemu-storage-daemon"].path.endswith("/none")
    assert found["no-such-library"].version is None
    shown = CliRunner().invoke(cli, ["version"]).output
    assert "qemu-storage-daemon  not found" in shown


def test_a_tool_that_fails_is_no_version(tmp_path, monkeypatch):
    monkeypatch.setenv("QEMU_IMG", program(tmp_path, "img", "exit 1"))
    assert {one.name: one.version for one in versions.components()}["qemu-img"] is None
    with pytest.raises(RepositoryError):
        qemu_tools.version(str(tmp_path / "img"))


def test_a_tool_that_hangs_is_left_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(qemu_tools, "_VERSION_SECONDS", 0.2)
    with pytest.raises(RepositoryError):
        qemu_tools.version(program(tmp_path, "img", "exec sleep 60"))


def test_programs_get_the_same_as_a_document(tools):
    document = json.loads(CliRunner().invoke(cli, ["version", "--json"]).stdout)
    found = {one["name"]: one["version"] for one in document["components"]}
    assert found["backupctl"] == __version__
    assert found["qemu-img"] == "9.9.9 (Debian x)"
    assert set(document["components"][0]) == {"name", "version", "path"}
