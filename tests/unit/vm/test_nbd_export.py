# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the socket of an export lies."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from backupctl.names import Namespace
from backupctl.system import private_dir
from backupctl.vm.qmp import nbd_export


class Monitor:
    """A QEMU that takes no descriptors and is asked for a server."""

    passes_descriptors = False

    def execute(self, command: str, arguments: Any = None) -> None:
        assert command == "nbd-server-start"


def test_the_directory_of_a_run_that_was_killed_while_it_connected_is_swept(monkeypatch):
    with tempfile.TemporaryDirectory() as temporary:
        monkeypatch.setattr("tempfile.tempdir", temporary)
        with pytest.raises(FileNotFoundError), nbd_export._served(Monitor(), Namespace("0" * 8), 2) as path:  # noqa: PT012
            dead = Path(path).parent.rename(f"{Path(path).parent}-dead")  # as SIGKILL would leave it
            os.utime(dead, (0, 0))
            with private_dir.directory():
                assert dead.exists(), "it is locked for as long as its run lives"
            raise FileNotFoundError
        with private_dir.directory():
            assert not dead.exists()
