# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration file: what is known is read, what is not is an error that names it."""

from pathlib import Path

import pytest

from backupctl.cli import config
from backupctl.cli.main import cli
from backupctl.errors import UsageError
from backupctl.settings import Address

EXAMPLE = Path(__file__).parents[3] / "fixtures" / "backupctl.example.toml"


def load(tmp_path, text: str) -> config.Config:
    path = tmp_path / "backupctl.toml"
    path.write_text(text)
    return config.load(str(path))


def test_the_sample_configuration_loads():
    found = config.load(str(EXAMPLE))
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


@pytest.mark.parametrize("budget", ["nan", "inf", "-1", "0", "1e300"])
def test_a_freeze_budget_that_can_not_be_is_wrong_use(tmp_path, budget):
    command = ["full", "web", "--qmp", "unix:/x", "--repository", str(tmp_path / "r")]
    with pytest.raises(UsageError, match="freeze budget"):
        cli.main([*command, f"--freeze-budget={budget}"], standalone_mode=False)
