# SPDX-License-Identifier: GPL-2.0-or-later
import pytest
from click.testing import CliRunner

from backupctl.cli.main import cli


@pytest.mark.parametrize(
    "wrong",
    [
        ["--disk", "vda=1M", "--disk", "vda=2M"],
        ["--disk", "vda=1M", "--cdrom", "vda"],
        ["--disk", "vda=1M,node=n", "--disk", "vdb=1M,node=n"],
        ["--disk", "vda=1M,node=9x"],
        ["--disk", f"vda=1M,node={'n' * 32}"],
        ["--writes", "-1"],
    ],
    ids=" ".join,
)
def test_what_can_not_be_one_vm_is_wrong_use(tmp_path, wrong):
    done = CliRunner().invoke(cli, ["simulate", "--qmp", str(tmp_path / "qmp"), *wrong])
    assert not (tmp_path / "qmp").exists()
    assert done.exception is not None
    assert getattr(done.exception, "exit_code", done.exit_code) == 2
