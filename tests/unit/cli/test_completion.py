# SPDX-License-Identifier: GPL-2.0-or-later
"""What the shell offers: VMs of the configuration, points of the repository; never an error."""

import pytest
from click.shell_completion import ShellComplete

from backupctl.cli.main import cli
from backupctl.repository.repository import Repository
from tests.unit.points import P1, P2, Builder, disk_entry


def offered(*words: str) -> list[str]:
    """Return what is offered for the last word of a command line."""
    *typed, incomplete = words
    found = ShellComplete(cli, {}, "backupctl", "_BACKUPCTL_COMPLETE").get_completions(typed, incomplete)
    return [one.value for one in found]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two points of `vm1`, which the configuration names beside `web`."""
    builder = Builder(Repository.create(tmp_path / "r"))
    for point in (P1, P2):
        builder.point(point, (disk_entry(), [(0, b"x")]))
    path = tmp_path / "backupctl.toml"
    path.write_text(f'[defaults]\nrepository = "{tmp_path}/r"\n[vm.web]\nqmp = "/q"\n[vm.vm1]\nqmp = "/p"\n')
    monkeypatch.setenv("BACKUPCTL_CONFIG", str(path))
    return builder.repository


def test_vms_are_those_of_the_configuration(repository):
    assert offered("full", "") == ["web", "vm1"]
    assert offered("list", "w") == ["web"]
    assert offered("--config", "/dev/null", "full", "") == []


def test_points_are_those_of_the_vm_newest_first(repository):
    assert offered("show", "vm1", "") == ["latest", P2, P1]
    assert offered("show", "vm1", "2") == [P2, P1]
    assert offered("diff", "vm1", P1, "l") == ["latest"]
    assert offered("delete", "vm1", "") == [P2, P1]
    assert offered("delete", "vm1", P1, "2") == [P2, P1]
    assert offered("incremental", "vm1", "--since", "2") == [P2, P1]
    assert offered("show", "--repository", "/nowhere", "vm1", "2") == []


def test_what_is_wrong_completes_nothing_and_raises_nothing(repository, tmp_path):
    (tmp_path / "backupctl.toml").write_text("[vm\n")
    for words in (("full", ""), ("show", "vm1", ""), ("show", "../x", "")):
        assert offered(*words) == []


def test_points_before_the_newest_are_offered_once_they_are_begun(repository):
    assert offered("show", "vm1", "latest~") == ["latest~1"]
