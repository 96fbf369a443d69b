# SPDX-License-Identifier: GPL-2.0-or-later
"""Which open files of a process may grow: all that it may write to, but the scratch files of a run."""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from backupctl.system import open_files


@pytest.mark.parametrize(
    ("name", "grows"),
    [
        ("web.qcow2", True),
        ("backupctl-server.qcow2", True),
        ("backupctl-images/web@2.qcow2", True),
        ("backupctl-images@home/web.qcow2", True),
        ("backupctl-0123abcd-scr0", False),
        ("backupctl-0123abcd-web@x7y8/vda.qcow2", False),
        ("backupctl-0123abcd-mirror/vda.qcow2", True),
    ],
)
def test_a_file_counts_unless_its_name_is_that_of_a_runs_scratch_file(name, grows, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    with path.open("w"):
        assert (str(path) in written()) is grows
    path.touch()
    with path.open("r"):
        assert str(path) not in written()


def test_a_scratch_file_without_a_name_and_what_is_no_file_do_not_count(tmp_path):
    before = written()
    with ExitStack() as held:
        held.enter_context(tempfile.TemporaryFile(dir=tmp_path))
        for descriptor in (*os.pipe(), os.memfd_create("memory")):
            held.callback(os.close, descriptor)
        assert {path for path in written() - before if not path.startswith("/memfd:")} == set()


def written() -> set[str]:
    found = open_files.written(os.getpid())
    assert found is not None
    return {one.path for one in found if Path(one.path).name}
