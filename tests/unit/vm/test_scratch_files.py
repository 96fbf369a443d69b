# SPDX-License-Identifier: GPL-2.0-or-later
"""Scratch files that have names: QEMU opens those by their names, so nobody else may turn them."""

import os
from unittest.mock import Mock

import pytest

from backupctl.errors import Failed, Refused
from backupctl.names import Namespace, NodeName, VmName
from backupctl.vm.qmp.scratch import ScratchFiles
from backupctl.vm.scratch_directory import left_directories, make_private, sweep

MIB = 1 << 20
NOBODY = 65534
NAMESPACE, VM, NODE = Namespace("0123456789abcdef0123456789abcdef"), VmName("web"), NodeName("tmp0")


@pytest.mark.parametrize("planted", ["link", "file"])
def test_a_named_file_is_made_and_what_lies_there_is_not_taken(tmp_path, planted):
    victim, scratches = tmp_path / "victim", ScratchFiles(Mock(), tmp_path, tmp_path)
    victim.write_bytes(b"precious")
    if planted == "link":
        (tmp_path / "tmp0.qcow2").symlink_to(victim)
    else:
        (tmp_path / "tmp0.qcow2").write_bytes(b"precious")
    with pytest.raises(Failed, match=r"cannot create .*tmp0\.qcow2: File exists"):
        scratches.make(NODE, MIB, MIB)
    assert (tmp_path / "tmp0.qcow2").read_bytes() == victim.read_bytes() == b"precious"
    (tmp_path / "tmp0.qcow2").unlink()
    made = scratches.make(NODE, MIB, MIB)
    assert made.filename == str(tmp_path / "tmp0.qcow2")
    assert os.fstat(made.descriptor).st_mode & 0o777 == 0o600
    scratches.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="the rule is for root, and takes root to try")
def test_root_makes_no_named_file_in_a_directory_that_somebody_else_could_turn(tmp_path):
    made = make_private(NAMESPACE, VM, tmp_path)
    assert made.stat().st_mode & 0o777 == 0o700
    made.rmdir()
    os.chown(tmp_path, NOBODY, 0)
    with pytest.raises(Refused, match="belongs to user"):
        make_private(NAMESPACE, VM, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_a_run_of_another_user_left_is_left_to_that_user_unless_root_asks(
    tmp_path, monkeypatch
):
    made = make_private(NAMESPACE, VM, tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert left_directories(NAMESPACE, VM, tmp_path) == sweep(NAMESPACE, VM, tmp_path) == []
    assert made.is_dir()
    for user in (0, os.getuid()):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        assert left_directories(NAMESPACE, VM, tmp_path) == [str(made)]
    assert sweep(NAMESPACE, VM, tmp_path) == [f"removed the scratch directory {made}"]
