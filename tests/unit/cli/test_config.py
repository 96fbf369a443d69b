# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration file: what is known is read, what is not is an error that names it."""

import os
from pathlib import Path

import pytest

from backupctl.cli import config
from backupctl.cli.main import cli
from backupctl.errors import UsageError
from backupctl.system.address import Address

EXAMPLE = Path(__file__).parents[3] / "fixtures" / "backupctl.example.toml"


def load(tmp_path, text: str) -> config.Config:
    path = tmp_path / "backupctl.toml"
    path.write_text(text)
    return config.load(str(path))


def test_the_sample_configuration_loads(tmp_path):
    found = load(tmp_path, EXAMPLE.read_text())
    vm = found.vm("web", None, None)
    assert vm.qmp == Address(path="/run/qemu/web.qmp")
    assert vm.disk_names == {"virtio0": "system"}
    assert found.repository("web", None) == Path("/backup")
    assert found.repository("db", None) == Path("/backup-db")
    assert found.setting("db", "freeze") == "require"
    assert found.setting("web", "freeze") == "auto"


def test_the_command_line_wins(tmp_path):
    found = load(tmp_path, '[vm.web]\nqmp = "unix:/a"\nrepository = "/r"\n')
    assert found.vm("web", "tcp:localhost:4444", None).qmp == Address(host="localhost", port=4444)
    assert found.repository("web", "/other") == Path("/other")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[vm.web]\nqpm = "unix:/a"\n', "qpm"),
        ("[vm.web]\nqmp = 7\n", "qmp"),
        ('[defaults]\nfreeze_budget = "long"\n', "freeze_budget"),
        ("[defaults]\nfreeze_budget = -1\n", "freeze_budget"),
        ("[defaults]\nmax_chain = 181\n", "a whole number, 0 to 180"),
        ("[defaults]\nkeep_checkpoints = -1\n", "keep_checkpoints"),
        ("[defaults]\nkeep_checkpoints = true\n", "keep_checkpoints"),
        ("[defaults]\nkeep_checkpoints = 1.5\n", "keep_checkpoints"),
        ('[default]\nlimit = "1M"\n', "default"),
        ('[vm.web]\n[vm.web.disks]\nvda = "../../etc"\n', "disk name"),
        ('[vm."../x"]\nqmp = "unix:/a"\n', "VM name"),
        ("[vm\n", "can't be read"),
        ("[defaults]\nfreeze_budget = nan\n", "freeze_budget"),
        ("[defaults]\nfreeze_budget = inf\n", "freeze_budget"),
        ("[defaults]\nfreeze_budget = 1e300\n", "freeze_budget"),
        ('[defaults]\nfreeze = "sometimes"\n', "auto, require, never"),
        ('[vm.web]\nview = "x"\n', "fleecing"),
        ('[vm.web]\non_broken_chain = "x"\n', "scan"),
        ("[vm.web.disks]\nvda = 5\n", "disk name"),
        ("a = " + "[" * 100_000, "can't be read"),
        ("a = " + "9" * 5000, "can't be read"),
        ("a = '\0'\n", "can't be read"),
        ('[defaults]\nrepository = "backup"\n', "repository in [defaults] must be an absolute path"),
        ('[vm.web]\nscratch = "./s"\n', "scratch in [vm.web] must be an absolute path"),
        ('[vm.web]\nqmp = "unix:web.qmp"\n', "qmp in [vm.web] must be an absolute path"),
        ('[vm.web]\nagent = "web.agent"\n', "agent in [vm.web] must be an absolute path"),
        ('[vm.web]\nqmp = "tcp:host"\n', "qmp in [vm.web]"),
        ('[vm.a]\nqmp = "unix:/q"\n[vm.b]\nqmp = "/q"\n', "[vm.a] and [vm.b] have the same qmp"),
        (
            '[defaults]\nrepository = "/r"\n[vm.a]\nqmp = "/q"\n[vm.b]\nqmp = "//q"\nrepository = "/r/"\n',
            "[vm.a] and [vm.b] have the same qmp",
        ),
        (
            '[vm.a]\nqmp = "/q1"\nagent = "/a"\n[vm.b]\nqmp = "/q2"\nagent = "/a"\n',
            "[vm.a] and [vm.b] have the same agent",
        ),
        ('[vm.web.disks]\nvda = "x"\nvdb = "x"\n', "vda and vdb in [vm.web.disks]"),
        ("#" * 300_000, "larger"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, said):
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text)
    assert said in caught.value.message


def test_an_unknown_vm_is_told_with_those_there_are(tmp_path):
    found = load(tmp_path, '[vm.web]\nqmp = "unix:/a"\n')
    with pytest.raises(UsageError, match="web"):
        found.vm("db", None, None)


@pytest.mark.parametrize(
    "text", ["tcp:host", "tcp:host:0", "tcp:h:" + "1" * 5000, "tcp:host:99999", "tcp::1", "unix:", ""]
)
def test_an_address_that_is_none_is_refused(text):
    with pytest.raises(UsageError):
        Address.parse(text)


def test_one_vm_may_be_backed_up_to_two_repositories(tmp_path):
    text = '[vm.web]\nqmp = "/q"\nrepository = "/r1"\n[vm.web-offsite]\nqmp = "/q"\nrepository = "/r2"\n'
    assert load(tmp_path, text).repositories() == (Path("/r1"), Path("/r2"))


def test_a_home_may_begin_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert load(tmp_path, '[defaults]\nrepository = "~/r"\n').repository(None, None) == Path("/home/me/r")


def test_nothing_is_read_from_the_current_folder(tmp_path, monkeypatch):
    """There anybody may have put it."""
    (tmp_path / "backupctl.toml").write_text('[vm.web]\nqmp = "unix:/theirs"\n')
    (tmp_path / "backupctl").mkdir()
    (tmp_path / "backupctl/backupctl.toml").write_text('[vm.web]\nqmp = "unix:/theirs"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BACKUPCTL_CONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("", ".", "./"):
        monkeypatch.setenv("XDG_CONFIG_HOME", folder)
        assert "web" not in config.load(None).vms


@pytest.mark.parametrize("given", ["--config", "BACKUPCTL_CONFIG", "XDG_CONFIG_HOME"])
def test_a_file_that_others_may_write_is_refused_wherever_it_was_named(tmp_path, monkeypatch, given):
    path = tmp_path / "backupctl" / "backupctl.toml"
    path.parent.mkdir()
    path.write_text("")
    path.chmod(0o666)
    monkeypatch.delenv("BACKUPCTL_CONFIG", raising=False)
    if given != "--config":
        monkeypatch.setenv(given, str(path if given == "BACKUPCTL_CONFIG" else tmp_path))
    with pytest.raises(UsageError, match=r"backupctl.toml is not trusted: .* \(mode 0666\)"):
        config.load(str(path) if given == "--config" else None)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_home_of_somebody_else_is_passed_over_if_there_is_nothing_in_it(tmp_path, monkeypatch):
    """As `sudo -E` leaves it to root."""
    home, system = tmp_path / "home", tmp_path / "system.toml"
    folder = home / ".config" / "backupctl"
    folder.mkdir(parents=True)
    os.chown(home, 12345, 12345)
    system.write_text('[vm.web]\nqmp = "/q"\n')
    for name in ("BACKUPCTL_CONFIG", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(config, "SYSTEM_FILE", system)
    assert list(config.load(None).vms) == ["web"]
    (folder / "backupctl.toml").write_text("")
    with pytest.raises(UsageError, match="home is not trusted: it belongs to user 12345"):
        config.load(None)


def test_a_named_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="can't be read: No such file"):
        config.load(str(tmp_path / "none"))


@pytest.mark.parametrize("budget", ["nan", "inf", "-1", "0", "1e300"])
def test_a_freeze_budget_that_can_not_be_is_wrong_use(tmp_path, budget):
    command = ["full", "web", "--qmp", "unix:/x", "--repository", str(tmp_path / "r")]
    with pytest.raises(UsageError, match="freeze budget"):
        cli.main([*command, f"--freeze-budget={budget}"], standalone_mode=False)
